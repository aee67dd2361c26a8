package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Clients that wait for what becomes of an order: Prefer: wait, events, and what
// they are told to expect.

// event is one server-sent event.
type event struct {
	id, name string
	order    order
}

// events is a stream of them, open until its context ends.
type events struct {
	header http.Header
	body   io.ReadCloser
	lines  *bufio.Scanner
}

// many are connections that each have a request for long.
var many = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

// follow opens the stream of an order. Its errors can be returned to a test
// from any goroutine.
func follow(ctx context.Context, url, id string, header ...string) (*events, int, error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, url+"/orders/"+id+"/events", nil)
	if err != nil {
		return nil, 0, err
	}
	req.Header.Set("Accept", "text/event-stream")
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := many.Do(req) //nolint:bodyclose // the stream's reader closes it
	if err != nil {
		return nil, 0, err
	}
	return &events{res.Header, res.Body, bufio.NewScanner(res.Body)}, res.StatusCode, nil
}

// next returns the next event, or io.EOF at the end of the stream.
func (e *events) next() (event, error) {
	var got event
	for e.lines.Scan() {
		switch name, value, _ := strings.Cut(e.lines.Text(), ": "); name {
		case "id":
			got.id = value
		case "event":
			got.name = value
		case "data":
			if err := json.Unmarshal([]byte(value), &got.order); err != nil {
				return event{}, err
			}
		case "":
			if got.name != "" {
				return got, nil
			}
		}
	}
	if err := e.lines.Err(); err != nil {
		return event{}, err
	}
	return event{}, io.EOF
}

// rest returns the ids of all events to come, and closes the stream.
func (e *events) rest() (ids []string, err error) {
	defer e.body.Close()
	for {
		got, err := e.next()
		if err == io.EOF { //nolint:errorlint // next returns it as it is
			return ids, nil
		}
		if err != nil {
			return ids, err
		}
		if got.name != got.order.Status {
			return ids, fmt.Errorf("event %q of an order that is %q", got.name, got.order.Status)
		}
		ids = append(ids, got.id)
	}
}

func openStream(t *testing.T, g *gateway, id string, header ...string) *events {
	t.Helper()
	s, status, err := follow(t.Context(), g.url, id, header...)
	require.NoError(t, err)
	require.Equal(t, http.StatusOK, status)
	return s
}

func TestEventsTellTheLifeOfAnOrder(t *testing.T) { eachHome(t, testEventsTellTheLifeOfAnOrder) }

// The time limits for requests and answers are shorter than the streams.
func testEventsTellTheLifeOfAnOrder(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, h, fast(b, "http.read_header_timeout", "300ms", "http.read_timeout", "300ms", "http.write_timeout", "300ms", "dispatch.max_attempts", "4"))
	b.control(t, `{"failNext": 2}`)
	id := g.accept(t, "A-1").ID
	s := openStream(t, g, id)
	require.Equal(t, "text/event-stream", s.header.Get("Content-Type"))
	require.Equal(t, "no", s.header.Get("X-Accel-Buffering"))
	require.NotEmpty(t, s.header.Get("Cache-Control"))
	ids, err := s.rest()
	require.NoError(t, err)
	require.Equal(t, "0-saved", ids[len(ids)-1])
	require.Subset(t, []string{"0-accepted", "0-retrying", "0-saved"}, ids, "what was over before the stream began is not told")

	// A client that comes back hears what it has not heard, also from the next
	// process, and is told when there is nothing more to come.
	b.control(t, `{"latency": "1200ms"}`)
	id = g.accept(t, "A-2").ID
	s = openStream(t, g, id)
	first, err := s.next()
	require.NoError(t, err)
	require.Equal(t, event{id: "0-accepted", name: "accepted", order: first.order}, first)
	require.Equal(t, id, first.order.ID)
	ended := make(chan error, 1)
	go func() { _, err := s.rest(); ended <- err }()
	require.Zero(t, g.terminate(t), "an open stream does not hold up the stop")
	require.NoError(t, <-ended, "and it ends in good order")
	g = serve(t, true, h, fast(b))
	s = openStream(t, g, id, "Last-Event-ID", "0-accepted")
	ids, err = s.rest()
	require.NoError(t, err)
	require.Equal(t, []string{"0-saved"}, ids)
	_, status, err := follow(t.Context(), g.url, id, "Last-Event-ID", "0-saved")
	require.NoError(t, err)
	require.Equal(t, http.StatusNoContent, status)

	id = g.accept(t, "A-3").ID
	s = openStream(t, g, id)
	first, err = s.next()
	require.NoError(t, err)
	require.Equal(t, "0-accepted", first.id)
	last, err := s.next()
	require.NoError(t, err, "it has lived longer than any time limit")
	require.Equal(t, event{id: "0-saved", name: "saved", order: do(t, http.MethodGet, g.url+"/orders/"+id, "", nil).order(t)}, last, "whoever follows gets the whole order")
	do(t, http.MethodGet, g.url+"/orders/"+missingID+"/events", "", nil).problem(t, http.StatusNotFound, "order-not-found")
	do(t, http.MethodGet, g.url+"/orders/"+id+"/events", "", map[string]string{"Accept": "application/json"}).problem(t, http.StatusNotAcceptable, "not-acceptable")
}

// Each of two processes has half of the clients, and either handles the outcomes:
// with RabbitMQ so few that one of them gets them all, of its own clients and of
// the other's.
func TestClientsWaitForWhatAnotherProcessHandles(t *testing.T) {
	inEach(t, sharedHomes(), func(t *testing.T, h home) {
		const n = 200
		b := backend(t, "--latency", "300ms")
		s := settings{"backend.url": b.ordersURL(), "dispatch.concurrency": "32"}
		launchServe(t, true, h, s, "--modules", "dispatch").field(t, "ready", "admin_addr")
		var intakes []*gateway
		for range 2 {
			p := launchServe(t, true, h, s, "--modules", "intake")
			intakes = append(intakes, &gateway{process: p, url: "http://" + p.field(t, "ready", "addr"), admin: "http://" + p.field(t, "ready", "admin_addr")})
		}
		var lag lags
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() {
				g := intakes[i%2]
				if i%4 < 2 {
					lag.wait(t.Context(), g, fmt.Sprintf("W-%d", i))
					return
				}
				lag.follow(t.Context(), g, fmt.Sprintf("E-%d", i))
			})
		}
		wg.Wait()
		took := lag.require(t, n)
		finished := []float64{intakes[0].metric(t, "sluice_orders_finished_total"), intakes[1].metric(t, "sluice_orders_finished_total")}
		require.Equal(t, n, int(finished[0]+finished[1]))
		t.Logf("%d clients of two processes, which handled %.0f and %.0f outcomes: answered %s after their order's end", n, finished[0], finished[1], took)
	})
}

// lags are how long after their order's end clients hear of it.
type lags struct {
	mu    sync.Mutex
	took  []time.Duration
	fails []error
}

func (l *lags) add(o order, at time.Time, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case err != nil:
		l.fails = append(l.fails, err)
	case o.FinishedAt == nil:
		l.fails = append(l.fails, fmt.Errorf("order %s is %s", o.ID, o.Status))
	default:
		l.took = append(l.took, at.Sub(*o.FinishedAt))
	}
}

// wait submits an order and waits for its end.
func (l *lags) wait(ctx context.Context, g *gateway, number string) {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, g.url+"/orders", strings.NewReader(body(number)))
	if err != nil {
		l.add(order{}, time.Time{}, err)
		return
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Prefer", "wait=30")
	res, err := many.Do(req)
	if err != nil {
		l.add(order{}, time.Time{}, err)
		return
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	at := time.Now()
	var o order
	if err == nil {
		err = json.Unmarshal(data, &o)
	}
	l.add(o, at, err)
}

// follow submits an order and follows its events to the end.
func (l *lags) follow(ctx context.Context, g *gateway, number string) {
	a, err := try(ctx, http.MethodPost, g.url+"/orders", body(number), jsonHeader())
	var o order
	if err == nil {
		err = json.Unmarshal(a.body, &o)
	}
	if err != nil {
		l.add(order{}, time.Time{}, err)
		return
	}
	l.followOrder(ctx, g, o.ID, func() {})
}

// followOrder follows an order's events to the end, and calls began when the
// stream has.
func (l *lags) followOrder(ctx context.Context, g *gateway, id string, began func()) {
	s, _, err := follow(ctx, g.url, id)
	if err != nil {
		l.add(order{}, time.Time{}, err)
		return
	}
	defer s.body.Close()
	last, err := s.next()
	began()
	at := time.Now()
	for err == nil && last.order.FinishedAt == nil {
		last, err = s.next()
		at = time.Now()
	}
	l.add(last.order, at, err)
}

// require returns median and 99th percentile.
func (l *lags) require(t testing.TB, n int) string {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	require.Empty(t, l.fails[:min(3, len(l.fails))])
	require.Len(t, l.took, n)
	return fmt.Sprintf("%v in the median, 99 %% within %v", percentile(l.took, 0.5).Round(time.Millisecond/10), percentile(l.took, 0.99).Round(time.Millisecond/10))
}

// sized returns what the environment says, for the full size of a proof, or the
// default.
func sized(t *testing.T, variable string, normal int) (n int, full bool) {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return normal, false
	}
	n, err := strconv.Atoi(text)
	require.NoError(t, err, variable)
	return n, true
}

func onLinux(t *testing.T) {
	t.Helper()
	if runtime.GOOS != "linux" {
		t.Skip("resident memory is read from /proc, which only Linux has")
	}
}

const memoryOfClients = 200 << 20

// In full size, with its numbers:
//
//	E2E_WAITERS=2000 go test -v -count=1 -run ManyClientsWait ./e2e
func TestManyClientsWaitAtOnce(t *testing.T) {
	onLinux(t)
	n, full := sized(t, "E2E_WAITERS", 300)
	eachHome(t, func(t *testing.T, h home) {
		b := backend(t, "--latency", "100ms")
		g := serve(t, false, h, settings{"backend.url": b.ordersURL()})
		var lag lags
		var wg sync.WaitGroup
		for i := range n {
			wg.Go(func() { lag.wait(t.Context(), g, fmt.Sprintf("W-%d", i)) })
		}
		wg.Wait()
		most := peakMemory(t, g.process)
		t.Logf("%d clients with Prefer: wait, answered %s after their order's end; memory %.1f MiB at most", n, lag.require(t, n), mib(most))
		if full {
			require.LessOrEqual(t, percentile(lag.took, 0.5), 50*time.Millisecond)
			require.LessOrEqual(t, most, int64(memoryOfClients))
		}
	})
}

// In full size, with its numbers:
//
//	E2E_STREAMS=5000 go test -v -count=1 -run ManyStreams ./e2e
func TestManyStreamsOfEventsAreOpenAtOnce(t *testing.T) {
	onLinux(t)
	n, _ := sized(t, "E2E_STREAMS", 500)
	h := embedded(t.TempDir())
	b := backend(t, "--latency", "10m")
	g := serve(t, false, h, settings{"backend.url": b.ordersURL(), "backend.timeout": "10m", "dispatch.retry_initial": "1ms"})
	ids, err := g.flood(t.Context(), 64, n, func(i int) string { return fmt.Sprintf("E-%d", i) })
	require.NoError(t, err)
	before := goroutines(t, g)
	var lag lags
	var wg sync.WaitGroup
	var open atomic.Int64
	for _, id := range ids {
		wg.Go(func() { lag.followOrder(t.Context(), g, id, func() { open.Add(1) }) })
	}
	eventually(t, 2*time.Minute, func() bool { return open.Load() == int64(n) }, "not all streams are open")
	each := float64(goroutines(t, g)-before) / float64(n)
	atRest := g.memoryAtRest(t)
	b.control(t, `{"latency": "1ms", "down": true}`) // ends the calls that are stuck
	b.control(t, `{"down": false}`)
	wg.Wait()
	most := peakMemory(t, g.process)
	t.Logf("%d streams: %.2f goroutines each, of which net/http has two; memory %.1f MiB at rest, %.1f MiB at most; told %s after the order's end",
		n, each, mib(atRest), mib(most), lag.require(t, n))
	require.Greater(t, each, 0.9)
	require.Less(t, each, 2.5)
}

// goroutines returns how many the gateway has.
func goroutines(t *testing.T, g *gateway) (n int) {
	t.Helper()
	a := do(t, http.MethodGet, g.admin+"/debug/pprof/goroutine?debug=1", "", nil)
	_, err := fmt.Sscanf(string(a.body), "goroutine profile: total %d", &n)
	require.NoError(t, err)
	return n
}

// peakMemory returns the most resident memory that the process ever had, in
// bytes (Linux).
func peakMemory(t *testing.T, p *process) int64 {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	require.NoError(t, err)
	_, rest, found := strings.Cut(string(data), "VmHWM:")
	require.True(t, found)
	var kib int64
	_, err = fmt.Sscanf(rest, "%d kB", &kib)
	require.NoError(t, err)
	return kib << 10
}

func TestWaitingOrdersHaveAPlaceAndAnEstimate(t *testing.T) {
	eachHome(t, testWaitingOrdersHaveAPlaceAndAnEstimate)
}

func testWaitingOrdersHaveAPlaceAndAnEstimate(t *testing.T, h home) {
	b := backend(t, "--latency", "20ms")
	g := serve(t, false, h, settings{"backend.url": b.ordersURL(), "dispatch.concurrency": "4"})
	const n = 800
	ids, err := g.flood(t.Context(), 8, n, func(i int) string { return fmt.Sprintf("P-%d", i) })
	require.NoError(t, err)
	newest := ids[fmt.Sprintf("P-%d", n-1)]
	var last order
	eventually(t, 30*time.Second, func() bool {
		last = g.get(t, newest)
		return last.FinishedAt != nil || last.Completion != nil
	}, "no estimate")
	require.NotNil(t, last.Completion, "all is saved and there was no estimate")
	a := do(t, http.MethodGet, g.url+"/orders/"+newest, "", nil)
	if a.order(t).FinishedAt == nil {
		after, err := strconv.Atoi(a.header.Get("Retry-After"))
		require.NoError(t, err)
		require.Positive(t, after)
		require.True(t, strings.HasPrefix(a.header.Get("ETag"), `W/"`))
	}
	// Of one answer, so at one time.
	var page struct{ Orders []order }
	getJSON(t, g.url+"/orders?status=accepted&limit=500", &page)
	require.NotEmpty(t, page.Orders)
	for i, o := range page.Orders {
		require.NotNil(t, o.QueuePosition)
		require.Positive(t, *o.QueuePosition)
		require.LessOrEqual(t, *o.QueuePosition, int64(n))
		require.NotNil(t, o.Completion)
		if i > 0 { // newest first; orders are saved while the list is made
			require.LessOrEqual(t, *o.QueuePosition, *page.Orders[i-1].QueuePosition+20)
		}
	}
	g.drained(t, time.Minute)
	saved := g.get(t, newest)
	require.Nil(t, saved.QueuePosition)
	require.Nil(t, saved.Completion)
}

// An order that waits for its next attempt is not to be asked for before, and an
// order of a backend that is down has no estimate.
func TestNoEstimateOfABackendThatIsDown(t *testing.T) {
	b := backend(t, "--latency", "1ms")
	b.control(t, `{"down": true}`)
	g := serve(t, false, embedded(t.TempDir()), settings{"backend.url": b.ordersURL(), "dispatch.retry_initial": "1h", "dispatch.retry_max": "1h"})
	o := g.await(t, g.accept(t, "A-1").ID, "retrying")
	require.NotNil(t, o.NextAttemptAt)
	require.Nil(t, o.Completion)
	require.Nil(t, o.QueuePosition)
	a := do(t, http.MethodGet, g.url+"/orders/"+o.ID, "", nil)
	after, err := strconv.Atoi(a.header.Get("Retry-After"))
	require.NoError(t, err)
	require.InDelta(t, time.Until(*o.NextAttemptAt).Seconds(), after, 60)
	b.control(t, `{"latency": "1m", "down": false}`)
	waiting := g.accept(t, "A-2")
	require.EqualValues(t, 1, *g.get(t, waiting.ID).QueuePosition)
	require.Nil(t, g.get(t, waiting.ID).Completion)
}

// BenchmarkEstimate prints how far off the estimated completion is with a steady
// backend: the error as a part of the time that was left.
//
//	go test -run '^$' -bench Estimate -benchtime 1x ./e2e
func BenchmarkEstimate(b *testing.B) {
	for _, backlog := range []int{1000, 50_000} {
		for _, kind := range homes() {
			b.Run(fmt.Sprintf("backlog=%d/%s", backlog, kind.name), func(b *testing.B) {
				for b.Loop() {
					errors := estimateErrors(b, kind.open(b), backlog)
					slices.Sort(errors)
					b.ReportMetric(errors[len(errors)/2]*100, "median-%")
					b.ReportMetric(errors[len(errors)*9/10]*100, "p90-%")
					b.ReportMetric(0, "ns/op")
				}
			})
		}
	}
}

// estimateErrors asks for orders all over a backlog, three times while it is
// saved, and compares.
func estimateErrors(b *testing.B, h home, backlog int) (errors []float64) {
	b.Helper()
	const (
		asked       = 100
		concurrency = 64
	)
	rate := backlog / 10 // 10 s at a thousand; no more than a small machine can do
	rate = min(rate, 800)
	stand := backend(b, "--latency", (time.Second * time.Duration(concurrency) / time.Duration(rate)).String())
	g := serve(b, false, h, settings{"backend.url": stand.ordersURL(), "dispatch.concurrency": strconv.Itoa(concurrency)})
	ids, err := g.flood(context.Background(), 32, backlog, func(i int) string { return fmt.Sprintf("F-%d", i) })
	require.NoError(b, err)
	newest := ids[fmt.Sprintf("F-%d", backlog-1)]
	eventually(b, time.Minute, func() bool { return g.get(b, newest).Completion != nil }, "no estimate")
	type answer struct {
		at       time.Time
		estimate time.Time
	}
	told := map[string][]answer{}
	start := g.status(b).Backlog
	for _, left := range []int{start, start * 2 / 3, start / 3} {
		eventually(b, 5*time.Minute, func() bool { return g.status(b).Backlog <= left }, "the backlog does not drain")
		for i := range asked {
			id := ids[fmt.Sprintf("F-%d", i*(backlog/asked)+backlog/asked/2)]
			if o := g.get(b, id); o.Completion != nil {
				told[id] = append(told[id], answer{time.Now(), *o.Completion})
			}
		}
	}
	g.drained(b, 5*time.Minute)
	for id, answers := range told {
		finished := *g.get(b, id).FinishedAt
		for _, a := range answers {
			if left := finished.Sub(a.at).Seconds(); left > 0 {
				errors = append(errors, math.Abs(a.estimate.Sub(finished).Seconds())/left)
			}
		}
	}
	require.NotEmpty(b, errors)
	return errors
}
