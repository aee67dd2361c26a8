package experiment

import (
	"fmt"
	"maps"
	"math"
	"slices"
	"strings"
	"time"
)

// The ways of an order, which are the values of column mode.
const (
	modeSync      = "sync"       // POST /orders/sync: the backend is called inside the request
	modeAsync     = "async"      // POST /orders: 202, and the backend is called when there is a permit
	modeSyncLimit = "sync-limit" // POST /orders/sync with a limit, beyond which the answer is 503 at once
)

// point is one thing to measure, with processes of its own.
type point struct {
	part    string
	mode    string
	variant string // what is different from the part's main course, "" if nothing is

	// How orders arrive: at a rate (open loop), or a number of them from clients that wait for each other (closed loop).
	rate     float64
	arrivals string
	orders   int
	clients  int
	size     int // of an order in bytes, 0 = as small as it can be

	warmup, window time.Duration // of an open loop: not counted, counted
	deadline       time.Duration // of a client
	retries        int           // of a client, beyond its first attempt
	pause          time.Duration // before the first of them; it doubles
	pauseMax       time.Duration // up to that, 0 = without end

	backend     []string          // flags of the stand-in
	settings    map[string]string // of the gateway, by configuration key
	memoryLimit string            // GOMEMLIMIT of the gateway, "" = none
	processors  int               // GOMAXPROCS of the gateway, 0 = those of the machine
	capacity    float64           // of the backend in orders per second, 0 if it is not limited

	stallAfter, stallFor time.Duration // when in the window the backend stalls, and for how long
	settle               bool          // work off what is queued when the load has ended, and count it
	takes                time.Duration // of a closed loop, roughly
}

func (p point) String() string {
	what := fmt.Sprintf("%.0f/s", p.rate)
	if p.orders > 0 {
		what = fmt.Sprintf("%d orders", p.orders)
	}
	name := strings.Join([]string{p.part, p.mode, what}, " ")
	if p.variant != "" {
		name += " (" + p.variant + ")"
	}
	return name
}

func (p point) path() string {
	if p.mode == modeAsync {
		return "/orders"
	}
	return "/orders/sync"
}

// parameters are what the processes of the point are told, for the report.
func (p point) parameters() []string {
	var gateway []string
	if p.processors > 0 {
		gateway = append(gateway, fmt.Sprintf("GOMAXPROCS=%d", p.processors))
	}
	if p.memoryLimit != "" {
		gateway = append(gateway, "GOMEMLIMIT="+p.memoryLimit)
	}
	for _, key := range slices.Sorted(maps.Keys(p.settings)) {
		gateway = append(gateway, key+"="+p.settings[key])
	}
	clients := []string{"leave after " + p.deadline.String()}
	if p.retries > 0 {
		pauses := p.pause.String()
		if p.pauseMax > 0 {
			pauses += ", later " + p.pauseMax.String()
		}
		clients = append(clients, fmt.Sprintf("try again up to %d times, first after about %s", p.retries, pauses))
	}
	if p.size > 0 {
		clients = append(clients, fmt.Sprintf("orders of %d bytes", p.size))
	}
	times := fmt.Sprintf("%d at once, until all are saved", p.clients)
	switch p.orders {
	case 0:
		clients = append(clients, p.arrivals+" arrivals")
		times = fmt.Sprintf("%s + %s", p.warmup, p.window)
	case p.clients:
		times = "all at once, until all are saved"
	}
	if p.stallFor > 0 {
		times += fmt.Sprintf(", stall of %s after %s", p.stallFor, p.warmup+p.stallAfter)
	}
	return []string{strings.Join(p.backend, " "), strings.Join(gateway, " "), strings.Join(clients, ", "), times}
}

// parameters has a line for the points of a way and a variant that are told the same.
func parameters(points []point) table {
	t := table{Title: "Parameters", Columns: []string{"way", "load /s or N", "sluice backend", "sluice serve", "clients", "warm-up + measured"}}
	for _, p := range points {
		name, amount := p.mode, fmt.Sprintf("%.0f/s", p.rate)
		if p.variant != "" {
			name += " (" + p.variant + ")"
		}
		if p.orders > 0 {
			amount = fmt.Sprintf("N = %d", p.orders)
		}
		told := p.parameters()
		i := slices.IndexFunc(t.Rows, func(line []string) bool { return line[0] == name && slices.Equal(line[2:], told) })
		if i < 0 {
			t.add(append([]string{name, amount}, told...)...)
			continue
		}
		t.Rows[i][1] += ", " + strings.TrimPrefix(amount, "N = ")
	}
	return t
}

// overhead is how long it takes to start and end the processes of a point, roughly.
const overhead = 700 * time.Millisecond

// expected is how long it takes to measure the point, roughly.
func (p point) expected() time.Duration {
	if p.orders > 0 {
		return overhead + p.takes
	}
	took := overhead + p.warmup + p.window
	if p.mode == modeSync {
		took += p.deadline*time.Duration(1+p.retries) + p.pause*time.Duration(1<<p.retries-1) // the last orders come to their end
	}
	if p.settle {
		took += time.Second
	}
	return took
}

// row is what was measured at a point: a line of the CSV file. Numbers that do not apply are NaN.
type row struct {
	part, mode, variant, note string
	run                       int
	orders                    int // of a closed loop

	load                                                   float64 // what the point was to have; 0 in a closed loop
	capacity, offered, accepted, goodput, saved, perMinute float64
	before, after, backlog, waiting                        float64
	p50, p99, p999, max, answerP99                         float64
	attempts, failed, timedOut, adopted, copies, lost      float64
	memory, resident, goroutines, collector                float64
	gatewayCores, loadCores                                float64
	late, tries                                            float64
}

// name is what a reader knows the point by: its way, its load or its orders, and its variant.
func (r row) name() string {
	name := fmt.Sprintf("%s %.0f/s", r.mode, r.load)
	if r.orders > 0 {
		name = fmt.Sprintf("%s N = %d", r.mode, r.orders)
	}
	if r.variant != "" {
		name += " (" + r.variant + ")"
	}
	return name
}

// instant is what was seen at one moment: a line of the CSV file of a part's course in time.
type instant struct {
	part, mode, variant string
	run                 int
	load                float64 // offered by the point, which tells the points of a part apart

	t                                              float64
	offered, accepted, goodput, errors, saved      float64
	backlog, waiting, goroutines, memory, resident float64
	collector                                      float64
	p50, p99                                       float64
}

// column is a number of a row.
type column[T any] struct {
	name, doc string
	of        func(*T) *float64
}

// rowColumns are the numbers of a row, in the order of the CSV file.
var rowColumns = []column[row]{
	{"capacity", "orders per second that the backend can save; empty if it has no limit", func(r *row) *float64 { return &r.capacity }},
	{"load", "orders per second that the point was to have", func(r *row) *float64 { return &r.load }},
	{"offered", "orders per second that clients had, by the plan", func(r *row) *float64 { return &r.offered }},
	{"accepted", "2xx answers per second, to the orders of the measured time whenever they came", func(r *row) *float64 { return &r.accepted }},
	{"goodput", "2xx answers per second that came while the client was still waiting", func(r *row) *float64 { return &r.goodput }},
	{"goodput_before", "goodput before the stall", func(r *row) *float64 { return &r.before }},
	{"goodput_after", "goodput in the last half of the time after the stall", func(r *row) *float64 { return &r.after }},
	{"saved", "orders per second that the backend saved, whether or not anybody still waited for them; like all that is asked of the backend and the gateway it is sampled, and interpolated to the ends of the measured time", func(r *row) *float64 { return &r.saved }},
	{"orders_per_minute", "closed loop: from the first order to the last one saved", func(r *row) *float64 { return &r.perMinute }},
	{"backlog", "orders that the gateway had accepted and not saved, at the end of the measured time", func(r *row) *float64 { return &r.backlog }},
	{"backend_waiting", "calls in service or waiting at the backend, at the end of the measured time", func(r *row) *float64 { return &r.waiting }},
	{"p50_ms", "median time to a 2xx answer, from the moment at which the order was to be sent", func(r *row) *float64 { return &r.p50 }},
	{"p99_ms", "99th percentile of it", func(r *row) *float64 { return &r.p99 }},
	{"p999_ms", "99.9th percentile of it", func(r *row) *float64 { return &r.p999 }},
	{"max_ms", "longest", func(r *row) *float64 { return &r.max }},
	{"answer_p99_ms", "99th percentile of the time until a client knew, with refusals and time-outs", func(r *row) *float64 { return &r.answerP99 }},
	{"attempts", "requests per order, with those of clients that try again", func(r *row) *float64 { return &r.attempts }},
	{"failed", "share of orders that were refused or failed", func(r *row) *float64 { return &r.failed }},
	{"timed_out", "share of orders whose client gave up", func(r *row) *float64 { return &r.timedOut }},
	{"adopted", "share of synchronous orders that were answered 202, since an earlier attempt was still there: they went on as asynchronous ones", func(r *row) *float64 { return &r.adopted }},
	{"copies", "how many times the backend saved each order; in part stall, of those since the stall", func(r *row) *float64 { return &r.copies }},
	{"lost", "accepted orders that the backend has not saved when all is worked off", func(r *row) *float64 { return &r.lost }},
	{"memory_mib", "most memory that the Go runtime of the gateway held, which is what GOMEMLIMIT bounds", func(r *row) *float64 { return &r.memory }},
	{"rss_mib", "most resident memory of the gateway's process: beside the Go runtime's also what SQLite allocates from the system, and the program", func(r *row) *float64 { return &r.resident }},
	{"goroutines", "most goroutines of the gateway", func(r *row) *float64 { return &r.goroutines }},
	{"gc_cores", "processor time of the gateway's garbage collector per second, without what was idle anyway", func(r *row) *float64 { return &r.collector }},
	{"gateway_cores", "processor time of the gateway per second", func(r *row) *float64 { return &r.gatewayCores }},
	{"load_cores", "processor time of the load generator per second", func(r *row) *float64 { return &r.loadCores }},
	{"late_ms", "how much later than planned the load generator sent, at worst", func(r *row) *float64 { return &r.late }},
	{"tries", "2 if the point was measured twice in this run, since it had a note the first time; what stands here is the better one", func(r *row) *float64 { return &r.tries }},
}

// instantColumns are the numbers of an instant, in the order of the CSV file.
var instantColumns = []column[instant]{
	{"load", "orders per second of the point", func(i *instant) *float64 { return &i.load }},
	{"t_s", "seconds since the load began, warm-up included", func(i *instant) *float64 { return &i.t }},
	{"offered", "orders per second that clients had, by the plan and the second for which they were planned", func(i *instant) *float64 { return &i.offered }},
	{"accepted", "2xx answers per second, by the second in which they came", func(i *instant) *float64 { return &i.accepted }},
	{"goodput", "orders per second that were answered 2xx while the client was still waiting, by the second in which the order was to be sent", func(i *instant) *float64 { return &i.goodput }},
	{"errors", "attempts per second that failed or were refused, by the second in which they did; an order that is tried again can have several", func(i *instant) *float64 { return &i.errors }},
	{"saved", "orders per second that the backend saved (this and all below but the latencies is sampled about once a second, and interpolated in between)", func(i *instant) *float64 { return &i.saved }},
	{"backlog", "orders that the gateway had accepted and not saved", func(i *instant) *float64 { return &i.backlog }},
	{"backend_waiting", "calls in service or waiting at the backend", func(i *instant) *float64 { return &i.waiting }},
	{"goroutines", "goroutines of the gateway", func(i *instant) *float64 { return &i.goroutines }},
	{"memory_mib", "memory that the Go runtime of the gateway held", func(i *instant) *float64 { return &i.memory }},
	{"rss_mib", "resident memory of the gateway's process", func(i *instant) *float64 { return &i.resident }},
	{"gc_cores", "processor time of its garbage collector per second, without what was idle anyway", func(i *instant) *float64 { return &i.collector }},
	{"p50_ms", "median time to a 2xx answer, by the second in which it came", func(i *instant) *float64 { return &i.p50 }},
	{"p99_ms", "99th percentile of it", func(i *instant) *float64 { return &i.p99 }},
}

// medians makes one row of those that differ in nothing but the run.
func medians(rows []row) []row {
	type key struct {
		mode, variant string
		orders        int
		load          float64
	}
	var order []key
	groups := map[key][]row{}
	for _, r := range rows {
		k := key{r.mode, r.variant, r.orders, r.load}
		if groups[k] == nil {
			order = append(order, k)
		}
		groups[k] = append(groups[k], r)
	}
	var middle []row
	for _, k := range order {
		group := groups[k]
		m := group[0]
		m.run, m.note = 0, ""
		for _, c := range rowColumns {
			*c.of(&m), _, _ = spread(group, c.of)
		}
		m.note = notes(group)
		middle = append(middle, m)
	}
	return middle
}

// notes are those of some runs of a point, with the run where there are several.
func notes(runs []row) string {
	var notes []string
	for _, r := range runs {
		switch {
		case r.note == "":
		case len(runs) == 1:
			notes = append(notes, r.note)
		default:
			notes = append(notes, fmt.Sprintf("run %d: %s", r.run, r.note))
		}
	}
	return strings.Join(notes, "; ")
}

// spread is the median, the least and the most of a number in some rows; NaN counts only where there is nothing else.
func spread(rows []row, of func(*row) *float64) (middle, low, high float64) {
	var values []float64
	for i := range rows {
		if x := *of(&rows[i]); !math.IsNaN(x) {
			values = append(values, x)
		}
	}
	n := len(values)
	if n == 0 {
		return math.NaN(), math.NaN(), math.NaN()
	}
	slices.Sort(values)
	return (values[(n-1)/2] + values[n/2]) / 2, values[0], values[n-1]
}

// of returns the rows of a mode and a variant.
func of(rows []row, mode, variant string) []row {
	var some []row
	for _, r := range rows {
		if r.mode == mode && r.variant == variant {
			some = append(some, r)
		}
	}
	return some
}

// first returns the first row that is wanted; one of nothing but NaN if there is none, which fails every check.
func first(rows []row, want func(row) bool) row {
	for _, r := range rows {
		if want(r) {
			return r
		}
	}
	var none row
	for _, c := range rowColumns {
		*c.of(&none) = math.NaN()
	}
	return none
}
