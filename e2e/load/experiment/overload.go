package experiment

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"
)

// deadlineOverload is how long clients wait in parts overload and stall. It must not be scaled with the durations of a
// test, or nothing would be in time.
const deadlineOverload = time.Second

// syncLimit is the fair limit of synchronous orders: as many in service, and as many again waiting for it.
func syncLimit(p plan) int { return 2 * p.workers }

// permits is how many calls the asynchronous gateway makes at once: a quarter more than the backend has workers, so that
// none of them waits for the way from an answer to the next call.
func permits(p plan) int { return p.workers + p.workers/4 }

func overload() part {
	return part{
		name: "overload", title: "A. Overload: more orders than the backend can save",
		about: aboutOverload, caveats: caveatsOverload,
		points: overloadPoints, judge: judgeOverload, tables: overloadTables, charts: overloadCharts,
	}
}

func aboutOverload(p plan) string {
	arrive, serve := "evenly", "50 ms for each order"
	if p.Arrivals == ArrivalsPoisson {
		arrive = "at random (Poisson)"
	}
	if p.Service == ServiceExponential {
		serve = "50 ms for each order on average (exponential)"
	}
	text := "A backend with a fixed number of workers, " + serve + " and a queue in front of them gets from half of what it can save up to three times that. " +
		"Clients arrive " + arrive + " and on their own (open loop, latency counted from the moment at which the order was to be sent) and leave after one second. "
	if p.Cancellation == CancellationHonoured {
		text += "The backend is told and gives their orders up: a synchronous gateway is expected to lose those who leave, and not to collapse. "
	} else {
		text += "The backend does not know that, since their orders are in its queue already: synchronous orders are expected to wait in that queue until nobody " +
			"wants them any more, with a backend that is as busy as ever, and all of it in vain. "
	}
	return text + "Asynchronous orders are expected to be answered at once, and saved at the pace of the backend. The third curve is fair to the first: " +
		"synchronous with a limit of concurrent orders, beyond which the answer is 503 at once."
}

func caveatsOverload(p plan) []string {
	assumption := "That the backend works for clients who have left is an assumption, typical where work is queued. If leaving is passed on and really honoured, it does not hold: "
	switch {
	case p.Cancellation == CancellationHonoured:
		assumption = "That the backend gives up the work for clients who have left is an assumption: it takes one that is told, and that can still stop. Typically work that is queued goes on " +
			"(`--cancellation ignored`, the default)."
	case p.Quick:
		assumption += "`--cancellation honoured` measures that, and so do the variants of the full experiment."
	default:
		assumption += "see the variants."
	}
	return []string{
		"The queue does not make the backend faster. Above its capacity the backlog grows for as long as the load lasts, and a 202 is a promise and no saved order.",
		"A limit prevents the collapse as well, without any queue. What the queue adds is that the excess orders are kept, instead of refused.",
		assumption,
		"All processes share one machine; the deadline, the 50 ms and the workers are chosen, not found in a real system.",
		"The plot over time is of the first run.",
	}
}

// warmupOverload is until the queue of the backend is so long that nobody gets an answer in time: with a load of r times
// the capacity it grows by r−1 seconds a second, and r times as fast for those who join it later.
func warmupOverload(p plan, mode string, r float64) time.Duration {
	if mode == modeSync && r > 1 {
		return p.seconds(math.Ceil(deadlineOverload.Seconds()*r/(r-1)) + 1)
	}
	return p.either(1, 2)
}

func overloadPoints(p plan) []point {
	loads := []float64{0.5, 0.95, 1.25, 2, 3}
	if p.Quick {
		loads = []float64{0.5, 2, 3}
	}
	var points []point
	for _, mode := range []string{modeSync, modeAsync, modeSyncLimit} {
		for _, r := range loads {
			points = append(points, overloadPoint(p, mode, r, p.Arrivals, p.Service, p.Cancellation))
		}
	}
	if p.Quick {
		return points
	}
	for _, v := range overloadVariants {
		point := overloadPoint(p, modeSync, 2, v.arrivals, v.service, v.cancellation)
		point.variant = v.variant
		points = append(points, point)
	}
	return points
}

// overloadVariants are those of the synchronous gateway at twice the capacity.
var overloadVariants = []struct{ variant, arrivals, service, cancellation string }{
	{"random arrivals and service times", ArrivalsPoisson, ServiceExponential, CancellationIgnored},
	{"cancellation honoured", ArrivalsConstant, ServiceConstant, CancellationHonoured},
	{"random, cancellation honoured", ArrivalsPoisson, ServiceExponential, CancellationHonoured},
}

func overloadPoint(p plan, mode string, r float64, arrivals, service, cancellation string) point {
	settings := map[string]string{"dispatch.concurrency": strconv.Itoa(permits(p))}
	if mode == modeSyncLimit {
		settings["intake.sync_limit"] = strconv.Itoa(syncLimit(p))
	}
	return point{
		part: "overload", mode: mode, rate: math.Round(r * p.capacity()), arrivals: arrivals,
		warmup: warmupOverload(p, mode, r), window: p.either(3, 6), deadline: deadlineOverload,
		backend:  []string{"--latency", latency.String(), "--capacity", strconv.Itoa(p.workers), "--service", service, "--cancellation", cancellation},
		settings: settings, capacity: p.capacity(),
	}
}

func judgeOverload(p plan, rows []row) []verdict {
	c := p.capacity()
	sync, async, limited := of(rows, modeSync, ""), of(rows, modeAsync, ""), of(rows, modeSyncLimit, "")
	at := func(rows []row, r float64) row {
		return first(rows, func(row row) bool { return row.load == math.Round(r*c) })
	}
	half, twice, bounded := at(sync, 0.5), at(sync, 2), at(limited, 2)
	verdicts := []verdict{
		atLeast("synchronous goodput at half the capacity", half.goodput, 0.95*half.load, "/s", "95 % of the load", half),
	}
	if p.Cancellation == CancellationHonoured {
		verdicts = append(verdicts, judgeHonoured("synchronous goodput at twice the capacity, cancellation honoured", c, p.Arrivals, p.Service, twice))
	} else {
		verdicts = append(verdicts,
			atMost("synchronous goodput at twice the capacity", twice.goodput, 0.1*c, "/s", "10 % of the capacity", twice),
			atLeast("saved at the same time, for nobody", twice.saved, 0.9*c, "/s", "90 % of the capacity", twice))
	}
	verdicts = append(verdicts, judgeAsync(c, async)...)
	verdicts = append(verdicts,
		atLeast("synchronous goodput at twice the capacity with a limit", bounded.goodput, 0.8*c, "/s", "80 % of the capacity", bounded))
	if p.Quick {
		return verdicts
	}
	for _, v := range overloadVariants {
		measured := first(rows, func(r row) bool { return r.variant == v.variant })
		name := "synchronous at twice the capacity: " + v.variant
		if v.cancellation == CancellationHonoured {
			verdicts = append(verdicts, judgeHonoured(name, c, v.arrivals, v.service, measured))
		} else {
			verdicts = append(verdicts, atMost(name, measured.goodput, 0.1*c, "/s", "10 % of the capacity", measured))
		}
	}
	return verdicts
}

// judgeHonoured is the check of a synchronous gateway at twice the capacity of a backend that gives up the work for clients
// who have left. With a constant load nearly all that it saves is in time; where chance has a part, a worker that is free
// too early or too late costs some of it.
func judgeHonoured(name string, capacity float64, arrivals, service string, r row) verdict {
	if arrivals == ArrivalsConstant && service == ServiceConstant {
		return atLeast(name, r.goodput, 0.8*capacity, "/s", "80 % of the capacity: no collapse", r)
	}
	return atLeast(name, r.goodput, 0.5*capacity, "/s", "half of the capacity: no collapse", r)
}

func judgeAsync(c float64, rows []row) []verdict {
	accepted, latest, lowest, highest, grows := 1.0, 0.0, math.Inf(1), 0.0, math.Inf(1)
	if len(rows) == 0 {
		accepted, latest, lowest, highest, grows = math.NaN(), math.NaN(), math.NaN(), math.NaN(), math.NaN()
	}
	var above []row
	for _, r := range rows {
		accepted, latest = min(accepted, r.accepted/r.offered), max(latest, r.p99)
		if r.load > c {
			above = append(above, r)
			lowest, highest = min(lowest, r.saved), max(highest, r.saved)
			grows = min(grows, r.backlog/(r.load-c))
		}
	}
	return []verdict{
		atLeast("asynchronous orders accepted, at every load", 100*accepted, 99, " %", "of those offered", rows...),
		atMost("99th percentile of their 202, at every load", latest, 100, " ms", "a tenth of the clients' patience", rows...),
		atLeast("asynchronously saved above the capacity", lowest, 0.9*c, "/s", "90 % of the capacity", above...),
		atMost("and flat: least below most, above the capacity", 100*(1-lowest/highest), 5, " %", "", above...),
		atLeast("while the backlog grows: seconds of excess in it", grows, 1, " s", "it is not lost, and not for free", above...),
	}
}

// atLeast is a verdict that rests on the numbers of those rows.
func atLeast(name string, is, want float64, unit, why string, rows ...row) verdict {
	return compared(name, is, want, unit, why, "at least", is >= want, rows)
}

// atMost is a verdict that rests on the numbers of those rows.
func atMost(name string, is, want float64, unit, why string, rows ...row) verdict {
	return compared(name, is, want, unit, why, "at most", is <= want, rows)
}

func compared(name string, is, want float64, unit, why, relation string, ok bool, rows []row) verdict {
	expected := relation + " " + figure(want) + unit
	if why != "" {
		expected += ", " + why
	}
	v := verdict{Name: name, Measured: figure(is) + unit, Expected: expected, OK: ok}
	for _, r := range rows {
		if r.note != "" {
			v.Doubts = append(v.Doubts, r.name())
		}
	}
	return v
}

// figure writes a number as briefly as it can be read.
func figure(x float64) string {
	switch size := math.Abs(x); {
	case math.IsNaN(x):
		return "–"
	case size >= 100 || x == math.Trunc(x):
		return strconv.FormatFloat(x, 'f', 0, 64)
	case size >= 10:
		return strconv.FormatFloat(x, 'f', 1, 64)
	default:
		return strconv.FormatFloat(x, 'f', 2, 64)
	}
}

func overloadTables(p plan, rows []row) []table {
	t := table{
		Title:   fmt.Sprintf("A backend of %d workers and 50 ms (%.0f/s), clients that wait 1 s", p.workers, p.capacity()),
		Columns: []string{"way", "load /s", "answered 2xx /s", "in time /s", "saved by the backend /s", "backlog", "2xx p50 ms", "2xx p99 ms", "any answer p99 ms"},
	}
	variants := table{Title: "The synchronous gateway at twice the capacity, and what it depends on",
		Columns: []string{"variant", "load /s", "in time /s", "saved by the backend /s", "gave up"}}
	for _, r := range rows {
		if r.variant == "" {
			t.add(r.marked(r.mode), figure(r.load), figure(r.accepted), figure(r.goodput), figure(r.saved), figure(math.Round(r.backlog)), figure(r.p50), figure(r.p99), figure(r.answerP99))
			continue
		}
		variants.add(r.marked(r.variant), figure(r.load), figure(r.goodput), figure(r.saved), figure(100*r.timedOut)+" %")
	}
	if len(variants.Rows) == 0 {
		return []table{t}
	}
	return []table{t, variants}
}

func overloadCharts(p plan, r partResult) []chart {
	c := p.capacity()
	load := func(r *row) *float64 { return &r.load }
	throughput := chart{
		name: "overload-throughput", title: "Orders answered in time, or saved", x: "offered load (orders/s)", y: "orders/s",
		lines: []line{
			{label: "backend's capacity", colour: colourIdeal, dashed: true, points: []xy{{x: 0, y: 0}, {x: c, y: c}, {x: 3 * c, y: c}}},
			{label: "sync: answered in time", colour: modeSync, points: r.curve(modeSync, "", load, func(r *row) *float64 { return &r.goodput })},
			{label: "sync with a limit: answered in time", colour: modeSyncLimit, points: r.curve(modeSyncLimit, "", load, func(r *row) *float64 { return &r.goodput })},
			{label: "async: saved", colour: modeAsync, points: r.curve(modeAsync, "", load, func(r *row) *float64 { return &r.saved })},
		},
	}
	answer := func(r *row) *float64 { return &r.answerP99 }
	latencies := chart{
		name: "overload-latency", title: "Time until 99 % of the clients knew", x: "offered load (orders/s)", y: "ms (logarithmic)", logY: true,
		lines: []line{
			{label: "sync (clients leave after 1,000 ms)", colour: modeSync, points: r.curve(modeSync, "", load, answer)},
			{label: "sync with a limit (200 or 503)", colour: modeSyncLimit, points: r.curve(modeSyncLimit, "", load, answer)},
			{label: "async (202)", colour: modeAsync, points: r.curve(modeAsync, "", load, answer)},
		},
	}
	backlog := chart{name: "overload-backlog", title: "Accepted orders that wait, asynchronous", x: "time (s)", y: "orders"}
	for i, l := range loadsOf(r.series, modeAsync) {
		backlog.lines = append(backlog.lines, line{label: fmt.Sprintf("%.0f/s", l), colour: shades[i%len(shades)],
			points: r.course(func(i instant) bool { return i.mode == modeAsync && i.variant == "" && i.load == l }, func(i *instant) *float64 { return &i.backlog })})
	}
	return []chart{throughput, latencies, backlog}
}

// loadsOf are the loads of a mode, ascending.
func loadsOf(series []instant, mode string) []float64 {
	var loads []float64
	for _, i := range series {
		if i.mode == mode && !slices.Contains(loads, i.load) {
			loads = append(loads, i.load)
		}
	}
	slices.Sort(loads)
	return loads
}
