package experiment

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"sort"
	"strconv"
	"strings"
	"time"

	"sluice/e2e/load"
)

// bench measures points, one after the other.
type bench struct {
	binary  string
	environ []string // of who started the experiment
	dir     string   // for the data of the processes
	broker  string
	again   int // how many more points may be measured twice
}

// mostAgain is how many points may be measured twice, for each run of them all: with more, the machine is not disturbed, it
// is too slow.
const mostAgain = 1

// measured is what came of a point.
type measured struct {
	row    row
	series []instant
}

// measureSoundly measures a point, and once more if the load generator could not do what it was told: the machine may have
// been disturbed. If that happens twice, the row says so.
func (b *bench) measureSoundly(ctx context.Context, p point, run int) (measured, error) {
	m, err := b.measure(ctx, p, run)
	if err != nil || m.row.note == "" || b.again == 0 {
		return m, err
	}
	b.again--
	again, err := b.measure(ctx, p, run)
	if err != nil || again.row.note == "" || again.row.late < m.row.late {
		m = again
	}
	m.row.tries = 2
	return m, err
}

// trial is one point being measured.
type trial struct {
	point
	standIn, gateway, load *process
	standInURL, url, admin string
	standInStarted         time.Time
	started                time.Time // the load
	samples                []sample
	missed, inARow         int // samples
	client                 *http.Client
}

// measure starts the processes of a point, measures, and ends them. Nothing of them is left when it returns.
func (b *bench) measure(ctx context.Context, p point, run int) (m measured, err error) {
	dir, err := os.MkdirTemp(b.dir, p.part+"-")
	if err != nil {
		return measured{}, fmt.Errorf("make a directory for the gateway: %w", err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	queues, err := newQueues(b.broker, b.environ)
	if err != nil {
		return measured{}, err
	}
	// Also when ctx has ended: nobody else knows these names.
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), removeTimeout)
		defer cancel()
		err = errors.Join(err, queues.remove(ctx))
	}()

	transport := &http.Transport{MaxIdleConnsPerHost: 8}
	defer transport.CloseIdleConnections()
	t := &trial{point: p, client: &http.Client{Transport: transport, Timeout: 10 * time.Second}}
	defer t.stop()
	if err := b.startTrial(ctx, t, filepath.Join(dir, "sluice.db"), queues.settings); err != nil {
		return measured{}, err
	}
	if err := t.watch(ctx); err != nil {
		return measured{}, err
	}
	return t.conclude(ctx, run)
}

// removeTimeout bounds how long removing what is left in a broker may take.
const removeTimeout = 20 * time.Second

// startTrial starts the backend, then the gateway, and when both do their work, the load.
func (b *bench) startTrial(ctx context.Context, t *trial, database string, queues map[string]string) (err error) {
	if t.standIn, err = b.startStandIn(ctx, t.backend); err != nil {
		return err
	}
	values, err := t.standIn.attributes(ctx, standInReady, "addr")
	if err != nil {
		return err
	}
	t.standInStarted, t.standInURL = time.Now(), "http://"+values[0]
	if t.gateway, err = b.startGateway(ctx, t.point, database, t.standInURL, queues); err != nil {
		return err
	}
	if values, err = t.gateway.attributes(ctx, gatewayReady, "addr", "admin_addr"); err != nil {
		return err
	}
	t.url, t.admin = "http://"+values[0], "http://"+values[1]
	t.started = time.Now()
	if t.load, err = start(ctx, b.binary, b.environ, t.loadArgs()...); err != nil {
		return err
	}
	return t.stall(ctx)
}

// What the processes say when they do their work.
const (
	standInReady = `"backend is listening"`
	gatewayReady = "ready"
)

// stop ends the processes, the load first.
func (t *trial) stop() {
	for _, p := range []*process{t.load, t.gateway, t.standIn} {
		if p != nil {
			p.stop()
		}
	}
}

func (b *bench) startStandIn(ctx context.Context, flags []string) (*process, error) {
	return start(ctx, b.binary, b.environ, append([]string{"backend", "--addr", "127.0.0.1:0"}, flags...)...)
}

// startGateway runs the gateway with nothing of the environment's settings but where the broker is.
func (b *bench) startGateway(ctx context.Context, p point, database, backend string, queues map[string]string) (*process, error) {
	settings := map[string]string{
		"http.addr": "127.0.0.1:0", "http.admin_addr": "127.0.0.1:0", "store.driver": "sqlite", "store.dsn": database,
		"backend.url": backend + "/orders", "log.format": "text",
	}
	maps.Copy(settings, queues)
	maps.Copy(settings, p.settings)
	environ := foreign(b.environ)
	for key, value := range settings {
		environ = append(environ, "SLUICE_"+strings.ToUpper(strings.ReplaceAll(key, ".", "_"))+"="+value)
	}
	if p.memoryLimit != "" {
		environ = append(environ, "GOMEMLIMIT="+p.memoryLimit)
	}
	if p.processors > 0 {
		environ = append(environ, "GOMAXPROCS="+strconv.Itoa(p.processors))
	}
	return start(ctx, b.binary, environ, "serve")
}

// foreign leaves out what would change the gateway: its own settings, exporters of telemetry, the runtime's settings.
func foreign(environ []string) []string {
	var kept []string
	for _, line := range environ {
		name, _, _ := strings.Cut(line, "=")
		if strings.HasPrefix(name, "SLUICE_") || strings.HasPrefix(name, "OTEL_") || name == "GOGC" || name == "GOMEMLIMIT" || name == "GOMAXPROCS" {
			continue
		}
		kept = append(kept, line)
	}
	return kept
}

func (t *trial) loadArgs() []string {
	args := []string{"load", "--json", "--deadline", t.deadline.String(), "--retries", strconv.Itoa(t.retries), "--retry-pause", t.pause.String(),
		"--retry-pause-max", t.pauseMax.String()}
	if t.size > 0 {
		args = append(args, "--size", strconv.Itoa(t.size)+"B")
	}
	if t.orders > 0 {
		args = append(args, "--closed", strconv.Itoa(t.clients), "--orders", strconv.Itoa(t.orders))
	} else {
		args = append(args, "--rate", fmt.Sprint(t.rate), "--arrivals", t.arrivals, "--warmup", t.warmup.String(),
			"--duration", (t.warmup + t.window).String())
	}
	return append(args, t.url+t.path())
}

// stall arranges the stall of the backend, which is so long after the beginning of its own time.
func (t *trial) stall(ctx context.Context) error {
	if t.stallFor == 0 {
		return nil
	}
	from := t.started.Sub(t.standInStarted) + t.warmup + t.stallAfter
	return t.control(ctx, fmt.Sprintf(`{"stallFrom": %q, "stallFor": %q}`, from, t.stallFor))
}

func (t *trial) control(ctx context.Context, knobs string) error {
	_, err := t.fetch(ctx, http.MethodPut, t.standInURL+"/control", knobs)
	return err
}

// watch takes samples until the load has ended.
func (t *trial) watch(ctx context.Context) error {
	every := time.Second
	if t.orders > 0 || t.window < 3*time.Second {
		every = 100 * time.Millisecond
	}
	ticker := time.NewTicker(every)
	defer ticker.Stop()
	for {
		if err := t.look(ctx); err != nil {
			return err
		}
		select {
		case <-ticker.C:
		case <-t.load.done:
			if t.load.err != nil {
				return errors.Join(t.load.died(), ctx.Err())
			}
			return t.sample(ctx)
		case <-t.gateway.done:
			return errors.Join(t.gateway.died(), ctx.Err())
		case <-t.standIn.done:
			return errors.Join(t.standIn.died(), ctx.Err())
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// mostMissed is how many samples may be missed one after the other.
const mostMissed = 5

// look takes a sample, or misses it: a process that lives can be too short of something to answer once. Without the first
// sample there is nothing to count from.
func (t *trial) look(ctx context.Context) error {
	err := t.sample(ctx)
	if err == nil {
		t.inARow = 0
		return nil
	}
	t.missed++
	t.inARow++
	if len(t.samples) == 0 || t.inARow > mostMissed || ctx.Err() != nil {
		return err
	}
	return nil
}

// sample is what was seen of the stand-in and the gateway at one moment. Counts are since the start.
type sample struct {
	at                             time.Duration // since the load was started
	saved, numbers, saves, waiting float64
	accepted, backlog, goroutines  float64
	memory, resident               float64
	collector, processor           float64 // seconds
}

func (t *trial) sample(ctx context.Context) error {
	s := sample{at: time.Since(t.started)}
	var stats struct {
		Requests, Orders, InFlight, Rejected, Failed, Numbers float64
	}
	if err := t.get(ctx, t.standInURL+"/stats", &stats); err != nil {
		return t.explain(err)
	}
	s.saved, s.numbers, s.waiting = stats.Orders, stats.Numbers, stats.InFlight
	s.saves = stats.Requests - stats.InFlight - stats.Rejected - stats.Failed
	var status struct{ Backlog float64 }
	if err := t.get(ctx, t.admin+"/admin/status", &status); err != nil {
		return t.explain(err)
	}
	s.backlog = status.Backlog
	text, err := t.fetch(ctx, http.MethodGet, t.admin+"/metrics", "")
	if err != nil {
		return t.explain(err)
	}
	metrics := parseMetrics(text)
	s.accepted = metrics.sum("sluice_orders_accepted_total")
	s.goroutines = metrics.sum("go_goroutines")
	s.memory = (metrics.sum("go_memory_classes_total_bytes") - metrics.sum("go_memory_classes_heap_released_bytes")) / (1 << 20)
	s.resident = metrics.sum("process_resident_memory_bytes") / (1 << 20)
	s.processor = metrics.sum("process_cpu_seconds_total")
	s.collector = metrics.sum("go_cpu_classes_gc_total_cpu_seconds_total") - metrics.sum("go_cpu_classes_gc_mark_idle_cpu_seconds_total")
	t.samples = append(t.samples, s)
	return nil
}

// explain prefers the reason why a process does not answer.
func (t *trial) explain(err error) error {
	for _, p := range []*process{t.gateway, t.standIn} {
		select {
		case <-p.done:
			return p.died()
		default:
		}
	}
	return err
}

func (t *trial) get(ctx context.Context, address string, into any) error {
	document, err := t.fetch(ctx, http.MethodGet, address, "")
	if err != nil {
		return err
	}
	if err := json.Unmarshal(document, into); err != nil {
		return fmt.Errorf("read %s: %w", address, err)
	}
	return nil
}

func (t *trial) fetch(ctx context.Context, method, address, body string) ([]byte, error) {
	request, err := http.NewRequestWithContext(ctx, method, address, strings.NewReader(body))
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", address, err)
	}
	response, err := t.client.Do(request)
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", address, err)
	}
	defer response.Body.Close()
	document, err := io.ReadAll(response.Body)
	if err == nil && response.StatusCode != http.StatusOK {
		err = fmt.Errorf("answered %d: %s", response.StatusCode, document)
	}
	if err != nil {
		return nil, fmt.Errorf("ask %s: %w", address, err)
	}
	return document, nil
}

// metrics are the samples of a Prometheus text, by the name of the metric: its labels are added up.
type metrics map[string]float64

func parseMetrics(text []byte) metrics {
	m := metrics{}
	for line := range bytes.Lines(text) {
		name, rest, ok := strings.Cut(strings.TrimSpace(string(line)), " ")
		if i := strings.IndexByte(name, '{'); i >= 0 {
			// Labels can have spaces in their values.
			end := strings.LastIndexByte(string(line), '}')
			name, rest = name[:i], strings.TrimSpace(string(line)[end+1:])
		}
		if !ok || name == "#" {
			continue
		}
		number, _, _ := strings.Cut(rest, " ") // a time may follow
		if value, err := strconv.ParseFloat(number, 64); err == nil {
			m[name] += value
		}
	}
	return m
}

// sum is NaN where the gateway does not tell, as on some systems.
func (m metrics) sum(name string) float64 {
	if value, ok := m[name]; ok {
		return value
	}
	return math.NaN()
}

// conclude works off what is left, where that is asked for, and makes a row of it all.
func (t *trial) conclude(ctx context.Context, run int) (measured, error) {
	var result load.Result
	if err := json.Unmarshal(t.load.stdout.Bytes(), &result); err != nil {
		return measured{}, fmt.Errorf("read what the load generator says: %w", err)
	}
	m := measured{row: t.row(result, run), series: t.series(result, run)}
	switch {
	case t.orders > 0:
		minutes, err := t.minutes(ctx, result)
		if err != nil {
			return measured{}, err
		}
		m.row.perMinute = float64(t.orders) / minutes
		m.row.saved = m.row.perMinute / 60
	case t.settle:
		// What is queued is queued; how fast it is worked off changes nothing about how often each order is in it.
		if err := t.control(ctx, `{"latency": "0s", "stallFrom": "0s", "stallFor": "0s"}`); err != nil {
			return measured{}, err
		}
		if err := t.settled(ctx, func(s sample) bool { return s.waiting == 0 && s.backlog == 0 }); err != nil {
			return measured{}, err
		}
		before, after := t.at(t.warmup+t.stallAfter), t.samples[len(t.samples)-1]
		m.row.copies = (after.saves - before.saves) / (after.numbers - before.numbers)
		if t.mode == modeAsync {
			m.row.lost = after.accepted - after.numbers
		}
	}
	return m, nil
}

// settleTimeout is how long the backend and the gateway may take to work off what is left.
const settleTimeout = 2 * time.Minute

// settled samples until all is done.
func (t *trial) settled(ctx context.Context, done func(sample) bool) error {
	ctx, cancel := context.WithTimeoutCause(ctx, settleTimeout, fmt.Errorf("orders are left after %s", settleTimeout))
	defer cancel()
	ticker := time.NewTicker(20 * time.Millisecond)
	defer ticker.Stop()
	for {
		if err := t.sample(ctx); err != nil {
			return err
		}
		if done(t.samples[len(t.samples)-1]) {
			return nil
		}
		select {
		case <-ticker.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for the backend: %w", context.Cause(ctx))
		}
	}
}

// minutes is how long a closed loop took until the backend had saved the last order. The gateway knows it best: from the
// first order that it accepted to the last one that became final; or what the clients waited, if that is longer.
func (t *trial) minutes(ctx context.Context, result load.Result) (float64, error) {
	err := t.settled(ctx, func(s sample) bool { return s.numbers >= float64(t.orders) && s.backlog == 0 })
	if err != nil {
		return 0, err
	}
	var first, last time.Time
	for cursor := ""; ; {
		var page struct {
			Orders []struct{ AcceptedAt, FinishedAt time.Time }
			Next   *string
		}
		if err := t.get(ctx, t.url+"/orders?limit=500&cursor="+url.QueryEscape(cursor), &page); err != nil {
			return 0, err
		}
		for _, o := range page.Orders {
			if first.IsZero() || o.AcceptedAt.Before(first) {
				first = o.AcceptedAt
			}
			if o.FinishedAt.After(last) {
				last = o.FinishedAt
			}
		}
		if page.Next == nil {
			return max(last.Sub(first).Minutes(), result.MeasuredSeconds/60), nil
		}
		cursor = *page.Next
	}
}

// at is what a sample at that time would have seen: between two samples, counts grow evenly.
func (t *trial) at(when time.Duration) sample {
	i := sort.Search(len(t.samples), func(i int) bool { return t.samples[i].at >= when })
	switch {
	case i == 0:
		return t.samples[0]
	case i == len(t.samples):
		return t.samples[i-1]
	}
	a, b := t.samples[i-1], t.samples[i]
	share := float64(when-a.at) / float64(b.at-a.at)
	between := func(x, y float64) float64 { return x + (y-x)*share }
	return sample{
		at: when, saved: between(a.saved, b.saved), numbers: between(a.numbers, b.numbers), saves: between(a.saves, b.saves),
		waiting: between(a.waiting, b.waiting), accepted: between(a.accepted, b.accepted), backlog: between(a.backlog, b.backlog),
		goroutines: between(a.goroutines, b.goroutines), memory: between(a.memory, b.memory), resident: between(a.resident, b.resident),
		collector: between(a.collector, b.collector), processor: between(a.processor, b.processor),
	}
}

// row is what the load generator and the samples say of the measured time.
func (t *trial) row(result load.Result, run int) row {
	nan := math.NaN()
	r := row{
		part: t.part, mode: t.mode, variant: t.variant, run: run, orders: t.orders, load: t.rate,
		capacity: orNaN(t.capacity), offered: result.Offered, accepted: result.Accepted, goodput: result.Goodput, perMinute: nan,
		saved: nan, backlog: nan, waiting: nan, before: nan, after: nan, copies: nan, lost: nan,
		p50: nan, p99: nan, p999: nan, max: nan, answerP99: nan,
		attempts: share(result.Attempts, result.Orders.Offered), failed: share(result.Orders.Failed, result.Orders.Offered),
		timedOut: share(result.Orders.TimedOut, result.Orders.Offered), late: result.Late.WorstMS,
		loadCores: result.CPUSeconds / (result.WarmupSeconds + result.MeasuredSeconds + result.DrainSeconds), tries: 1,
	}
	if l := result.LatencyMS; l != nil {
		r.p50, r.p99, r.p999, r.max = l.P50, l.P99, l.P999, l.Max
	}
	if l := result.LatencyAllMS; l != nil {
		r.answerP99 = l.P99
	}
	if r.adopted = nan; t.mode != modeAsync {
		r.adopted = share(result.Statuses["202"], result.Orders.Offered)
	}
	from, to := t.warmup, t.warmup+t.window
	if t.orders == 0 {
		r.note = result.Why // in a closed loop nobody is late: what counts is when all is done
		if r.adopted > mostAdopted {
			r.remark("%.1f %% of the synchronous orders went on as asynchronous ones", 100*r.adopted)
		}
		if t.missed > 0 {
			r.remark("samples missed, which are interpolated: %d", t.missed)
		}
	} else {
		from, to = 0, time.Duration(result.MeasuredSeconds*float64(time.Second))
	}
	a, b := t.at(from), t.at(to)
	seconds := (to - from).Seconds()
	r.saved, r.backlog, r.waiting = (b.saved-a.saved)/seconds, b.backlog, b.waiting
	r.collector, r.gatewayCores = (b.collector-a.collector)/seconds, (b.processor-a.processor)/seconds
	for _, s := range t.samples {
		if s.at >= from && s.at <= to {
			r.memory, r.resident, r.goroutines = max(r.memory, s.memory), max(r.resident, s.resident), max(r.goroutines, s.goroutines)
		}
	}
	if t.stallFor > 0 {
		over := t.warmup + t.stallAfter + t.stallFor
		r.before = goodBetween(result.Series, t.warmup, t.warmup+t.stallAfter)
		// The last half of the time after it, when what came during the stall should long be dealt with.
		r.after = goodBetween(result.Series, to-(to-over)/2, to)
	}
	return r
}

// remark adds to the note.
func (r *row) remark(format string, args ...any) {
	r.note = strings.TrimPrefix(r.note+"; ", "; ") + fmt.Sprintf(format, args...)
}

// mostAdopted is the share of synchronous orders that may turn into asynchronous ones: a client that tries again before
// the gateway has noticed that it had left is promised its first attempt.
const mostAdopted = 0.01

func orNaN(x float64) float64 {
	if x == 0 {
		return math.NaN()
	}
	return x
}

func share(n, of int64) float64 { return float64(n) / float64(of) }

// goodBetween is the goodput of the whole seconds in a time.
func goodBetween(series []load.Second, from, to time.Duration) float64 {
	good, seconds := int64(0), 0
	for _, s := range series {
		if begins := time.Duration(s.T) * time.Second; begins >= from && begins+time.Second <= to {
			good += s.Good
			seconds++
		}
	}
	return float64(good) / float64(seconds)
}

// series puts what the load generator counted in each second beside what was sampled at its end.
func (t *trial) series(result load.Result, run int) []instant {
	if t.orders > 0 {
		return nil
	}
	var series []instant
	for _, s := range result.Series {
		end := time.Duration(s.T+1) * time.Second
		if end > t.warmup+t.window {
			break
		}
		a, b := t.at(end-time.Second), t.at(end)
		series = append(series, instant{
			part: t.part, mode: t.mode, variant: t.variant, run: run, load: t.rate, t: end.Seconds(),
			offered: float64(s.Offered), accepted: float64(s.Accepted), goodput: float64(s.Good), errors: float64(s.Errors),
			saved: b.saved - a.saved, backlog: b.backlog, waiting: b.waiting, goroutines: b.goroutines, memory: b.memory, resident: b.resident,
			collector: b.collector - a.collector, p50: deref(s.P50MS), p99: deref(s.P99MS),
		})
	}
	return series
}

func deref(x *float64) float64 {
	if x == nil {
		return math.NaN()
	}
	return *x
}
