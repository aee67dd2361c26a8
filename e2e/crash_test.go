package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

func TestFiveKillsUnderLoadLoseNoOrderAndRepeatFewCalls(t *testing.T) {
	eachHome(t, testFiveKillsUnderLoadLoseNoOrderAndRepeatFewCalls)
}

func testFiveKillsUnderLoadLoseNoOrderAndRepeatFewCalls(t *testing.T, h home) {
	const (
		kills       = 5
		concurrency = 64
		// An order's call can come again if it had begun and its outcome was
		// not committed. It is then one of those that dispatch has from the
		// broker: as many as there are permits, and the margin of those whose
		// outcome is being stored. What the relay has published beyond them
		// has not been called.
		margin = 64
		// A broker that keeps messages has those that were published and not
		// yet marked as that: two groups, and they are published again.
		group = 2 * 64
	)
	bound := concurrency + margin
	if h.durable {
		bound += group
	}
	seed := uint64(time.Now().UnixNano())
	if s := os.Getenv("E2E_SEED"); s != "" { // SLUICE_… would be a setting of the gateway
		var err error
		seed, err = strconv.ParseUint(s, 10, 64)
		require.NoError(t, err)
	}
	t.Logf("E2E_SEED=%d", seed)
	random := rand.New(rand.NewPCG(seed, 0))

	b := backend(t, "--latency", "50ms")
	s := settings{"backend.url": b.ordersURL(), "http.addr": freePort(t), "dispatch.concurrency": strconv.Itoa(concurrency)}
	g := serve(t, false, h, s)
	// Together up to 2,000 orders a second, where 1,280 can be saved.
	c := g.submitSteadily(t, "C", 16, 8*time.Millisecond)

	told := 0 // repeats that have been printed
	for kill := 1; kill <= kills; kill++ {
		// From the first moment of a life to somewhere in the middle of it.
		c.await(t, random.Int64N(1500))
		inFlight := g.status(t).InFlight
		g.kill()
		repeats := b.stats(t).Repeats
		t.Logf("kill %d: %d orders promised, %d calls in flight; %d repeats since the last kill, at most %d", kill, c.accepted.Load(), inFlight, repeats-told, bound)
		// A call that an earlier kill interrupted may be repeated late, so the
		// bounds add up.
		require.LessOrEqual(t, repeats, (kill-1)*bound)
		told = repeats
		g = serve(t, false, h, s)
	}
	c.await(t, 500)
	promised := c.stop()
	g.drained(t, time.Minute)

	requireSaved(t, promised, g.all(t))
	stats := b.stats(t)
	t.Logf("after the last kill: %d repeats, at most %d", stats.Repeats-told, bound)
	t.Logf("%d orders promised, all saved; %d kills, %d repeats, at most %d", len(promised), kills, stats.Repeats, kills*bound)
	require.LessOrEqual(t, stats.Repeats, kills*bound)
	// The stand-in goes on with a call whose caller was killed, so all that
	// arrive are there twice. Fewer would mean that the kills hit nothing.
	require.NotZero(t, stats.Repeats)
	require.Equal(t, len(promised), stats.Orders)
	require.Zero(t, g.terminate(t))
}

func TestAGracefulStopFinishesTheCallsInFlightAndRepeatsNone(t *testing.T) {
	eachHome(t, testAGracefulStopFinishesTheCallsInFlightAndRepeatsNone)
}

func testAGracefulStopFinishesTheCallsInFlightAndRepeatsNone(t *testing.T, h home) {
	const n, concurrency = 300, 64
	// With one worker, calls of 300 ms wait in the stand-in until the test has
	// seen enough and gives it all the workers it likes.
	b := backend(t, "--latency", "300ms", "--capacity", "1")
	s := settings{"backend.url": b.ordersURL(), "dispatch.concurrency": strconv.Itoa(concurrency), "backend.timeout": "50s",
		"intake.max_wait": "10m", "http.shutdown_timeout": "50s"}
	g := serve(t, false, h, s)
	ids, err := g.flood(t.Context(), 16, n, func(i int) string { return fmt.Sprintf("S-%d", i) })
	require.NoError(t, err)
	eventually(t, 30*time.Second, func() bool { return b.stats(t).InFlight == concurrency }, "not all permits are in use")
	waiting := g.waitFor(t, "W-1")

	require.NoError(t, g.cmd.Process.Signal(syscall.SIGTERM))
	a := waiting.answer(t)
	require.Equal(t, http.StatusAccepted, a.status, string(a.body))
	require.Equal(t, "accepted", a.order(t).Status)
	ids["W-1"] = a.order(t).ID
	eventually(t, 30*time.Second, func() bool { return refused(t, g.url) }, "the public port is open")
	var ready struct{ Status string }
	eventually(t, 30*time.Second, func() bool {
		a, err := try(t.Context(), http.MethodGet, g.admin+"/readyz", "", nil)
		require.NoError(t, err, "the gateway has ended and was never seen draining")
		require.NoError(t, json.Unmarshal(a.body, &ready))
		return a.status == http.StatusServiceUnavailable && ready.Status == "draining"
	}, "the gateway is not draining")
	stats := b.stats(t)
	require.Positive(t, stats.InFlight, "the client's wait, the port and the readiness did not wait for the calls")
	t.Logf("while draining, with %d calls in flight: %s, the port is closed, the waiting client has its 202", stats.InFlight, ready.Status)

	// Calls that end leave a gap: no further one is begun.
	eventually(t, 50*time.Second, func() bool { return b.stats(t).InFlight <= concurrency-4 }, "new calls are begun")
	stopped := b.stats(t)
	require.Less(t, stopped.Requests-stats.Requests, concurrency/2, "calls that were begun while the gateway was draining")
	b.control(t, `{"capacity": 0}`)
	began := time.Now()
	require.Zero(t, g.exit(t))
	after := b.stats(t)
	t.Logf("with all workers it ended %v later with exit code 0; %d calls were begun in the meantime", time.Since(began).Round(time.Millisecond), after.Requests-stats.Requests)
	require.Equal(t, stopped.Requests, after.Requests)
	require.Zero(t, after.InFlight)
	require.Equal(t, after.Requests, after.Orders, "no call was cut off")

	b.control(t, `{"latency": "5ms"}`)
	g = serve(t, false, h, s)
	g.drained(t, time.Minute)
	requireSaved(t, ids, g.all(t))
	require.Equal(t, backendStats{Requests: n + 1, Orders: n + 1, MaxInFlight: concurrency}, b.stats(t))
	require.Zero(t, g.terminate(t))
}

func TestASecondSignalEndsTheProcessAtOnce(t *testing.T) {
	eachHome(t, testASecondSignalEndsTheProcessAtOnce)
}

func testASecondSignalEndsTheProcessAtOnce(t *testing.T, h home) {
	const concurrency = 8
	b := backend(t, "--latency", "30s")
	s := settings{"backend.url": b.ordersURL(), "dispatch.concurrency": strconv.Itoa(concurrency), "backend.timeout": "5m", "http.shutdown_timeout": "5m"}
	g := serve(t, false, h, s)
	ids := map[string]string{}
	for i := range 2 * concurrency {
		number := fmt.Sprintf("S-%d", i)
		ids[number] = g.accept(t, number).ID
	}
	eventually(t, 30*time.Second, func() bool { return b.stats(t).InFlight == concurrency }, "no calls")
	require.NoError(t, g.cmd.Process.Signal(syscall.SIGTERM))
	eventually(t, 30*time.Second, func() bool { return refused(t, g.url) }, "the first signal has no effect")
	began := time.Now()
	require.Equal(t, 128+int(syscall.SIGTERM), g.terminate(t))
	t.Logf("ended %v after the second signal", time.Since(began).Round(time.Millisecond))
	require.Equal(t, backendStats{Requests: concurrency, InFlight: concurrency, MaxInFlight: concurrency}, b.stats(t), "the calls hang")
	b.kill()

	b = backend(t, "--latency", "5ms")
	s["backend.url"] = b.ordersURL()
	g = serve(t, false, h, s)
	g.drained(t, time.Minute)
	requireSaved(t, ids, g.all(t))
}

func TestAStopThatTakesTooLongSaysSoAndLosesNothing(t *testing.T) {
	eachHome(t, testAStopThatTakesTooLongSaysSoAndLosesNothing)
}

func testAStopThatTakesTooLongSaysSoAndLosesNothing(t *testing.T, h home) {
	const n, concurrency = 40, 8
	b := backend(t, "--latency", "30s")
	s := settings{"backend.url": b.ordersURL(), "dispatch.concurrency": strconv.Itoa(concurrency), "backend.timeout": "5m", "http.shutdown_timeout": "1s"}
	g := serve(t, false, h, s)
	ids, err := g.flood(t.Context(), 8, n, func(i int) string { return fmt.Sprintf("S-%d", i) })
	require.NoError(t, err)
	eventually(t, 30*time.Second, func() bool { return b.stats(t).InFlight == concurrency }, "no calls")
	began := time.Now()
	require.Equal(t, 1, g.terminate(t))
	t.Logf("ended after %v with exit code 1", time.Since(began).Round(time.Millisecond))
	require.Equal(t, concurrency, b.stats(t).InFlight, "the calls hang")

	// All that is no line of the JSON log is what `sluice` itself has to say.
	var said []string
	for line := range strings.Lines(g.log()) {
		if !strings.HasPrefix(line, "{") {
			said = append(said, line)
		}
	}
	require.Len(t, said, 1)
	t.Log(said[0])
	require.True(t, strings.HasPrefix(said[0], "sluice: "), said[0])
	require.Contains(t, said[0], "backend calls in flight")

	b.control(t, `{"latency": "5ms"}`)
	g = serve(t, false, h, s)
	g.drained(t, time.Minute)
	requireSaved(t, ids, g.all(t))
	stats := b.stats(t)
	t.Logf("%d orders, all saved after the restart; %d repeats, for the calls that were given up", n, stats.Repeats)
	require.LessOrEqual(t, stats.Repeats, concurrency)
	require.Zero(t, g.terminate(t))
}

func TestASlowClientDoesNotTakeTheTimeInWhichCallsEnd(t *testing.T) {
	const concurrency = 2
	b, dir := backend(t, "--latency", "300ms"), t.TempDir()
	s := settings{"backend.url": b.ordersURL(), "dispatch.concurrency": strconv.Itoa(concurrency), "http.shutdown_timeout": "3s"}
	g := serve(t, false, embedded(dir), s)
	conn, err := net.Dial("tcp", strings.TrimPrefix(g.url, "http://"))
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close()) }()
	_, err = conn.Write([]byte("POST /orders HTTP/1.1\r\nHost: sluice\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n{"))
	require.NoError(t, err)
	// Another request, begun later and answered: the half one has arrived too.
	ids, err := g.flood(t.Context(), 8, 40, func(i int) string { return fmt.Sprintf("S-%d", i) })
	require.NoError(t, err)
	eventually(t, 30*time.Second, func() bool { return b.stats(t).InFlight == concurrency }, "no calls")
	require.Zero(t, g.terminate(t), "the client was cut off, and that is no failure")

	b.control(t, `{"latency": "5ms"}`)
	g = serve(t, false, embedded(dir), s)
	g.drained(t, time.Minute)
	requireSaved(t, ids, g.all(t))
	require.Zero(t, b.stats(t).Repeats)
	require.Zero(t, g.terminate(t))
}

// freePort returns an address of this machine that nobody listens on. It is
// below the ports that systems give to outgoing connections: one of those
// could be taken by a client while the gateway is down.
func freePort(t testing.TB) string {
	t.Helper()
	for range 100 {
		addr := net.JoinHostPort("127.0.0.1", strconv.Itoa(10_000+rand.IntN(20_000)))
		if listener, err := net.Listen("tcp", addr); err == nil {
			require.NoError(t, listener.Close())
			return addr
		}
	}
	require.FailNow(t, "no free port")
	return ""
}

// refused reports whether a new connection to the URL's port is refused.
func refused(t testing.TB, url string) bool {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(url, "http://"))
	if err != nil {
		return true
	}
	require.NoError(t, conn.Close())
	return false
}

// pending is a request that has no answer yet.
type pending struct {
	done chan struct{}
	got  answer
	err  error
}

// waitFor submits an order with a Prefer: wait that is longer than any test,
// and returns when it is accepted and the gateway holds the request.
func (g *gateway) waitFor(t testing.TB, number string) *pending {
	t.Helper()
	p := &pending{done: make(chan struct{})}
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(func() { cancel(); <-p.done })
	go func() {
		defer close(p.done)
		p.got, p.err = try(ctx, http.MethodPost, g.url+"/orders", body(number), jsonHeader("Prefer", "wait=600"))
	}()
	eventually(t, 30*time.Second, func() bool {
		var list struct{ Orders []order }
		getJSON(t, g.url+"/orders?orderNumber="+number, &list)
		return len(list.Orders) == 1
	}, "order %s is not accepted", number)
	return p
}

// answer waits for the answer.
func (p *pending) answer(t testing.TB) answer {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(40 * time.Second):
		require.FailNow(t, "no answer")
	}
	require.NoError(t, p.err)
	return p.got
}

// clients submit orders until they are stopped, whatever happens to the
// gateway.
type clients struct {
	accepted atomic.Int64 // orders that got a 202
	refusals atomic.Int64 // answers other than that
	quit     chan struct{}
	cancel   context.CancelFunc
	wg       sync.WaitGroup

	mu       sync.Mutex
	promised map[string]string // ids by number, from the answers
	took     []time.Duration   // the 202s since they were last asked for
	tookNot  []time.Duration   // all other answers
}

// submitSteadily starts clients that submit one order each at every beat. Who
// gets no answer, or not a 202, sends the order again at the next beat, with
// the same number, until it gets one. The numbers begin with name.
func (g *gateway) submitSteadily(t testing.TB, name string, n int, beat time.Duration) *clients {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	c := &clients{quit: make(chan struct{}), cancel: cancel, promised: map[string]string{}}
	for i := range n {
		c.wg.Go(func() { c.submit(ctx, g.url, fmt.Sprintf("%s-%d", name, i), beat) })
	}
	t.Cleanup(func() { cancel(); c.wg.Wait() })
	return c
}

func (c *clients) submit(ctx context.Context, url, name string, beat time.Duration) {
	tick := time.NewTicker(beat)
	defer tick.Stop()
	for i := 0; ; {
		number := fmt.Sprintf("%s-%d", name, i)
		began := time.Now()
		a, err := try(ctx, http.MethodPost, url+"/orders", body(number), jsonHeader())
		if err == nil && c.note(number, a, time.Since(began)) {
			i++
			select {
			case <-c.quit: // only between two orders
				return
			default:
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// note keeps an answer, and reports whether it is a promise.
func (c *clients) note(number string, a answer, took time.Duration) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if a.status != http.StatusAccepted {
		c.refusals.Add(1)
		c.tookNot = append(c.tookNot, took)
		return false
	}
	_, c.promised[number], _ = strings.Cut(a.header.Get("Location"), "/orders/")
	c.took = append(c.took, took)
	c.accepted.Add(1)
	return true
}

// latencies returns how long the 202s since the last call of it took.
func (c *clients) latencies() []time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	took := c.took
	c.took = nil
	return took
}

// refused returns how long all other answers took.
func (c *clients) refused() []time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.tookNot)
}

// await returns when so many more orders were accepted.
func (c *clients) await(t testing.TB, more int64) {
	t.Helper()
	goal := c.accepted.Load() + more
	eventually(t, time.Minute, func() bool { return c.accepted.Load() >= goal }, "clients get no answers")
}

// stop lets every client get its last 202, and returns the ids of all orders
// that were promised.
func (c *clients) stop() map[string]string {
	close(c.quit)
	c.wg.Wait()
	c.cancel()
	return c.promised
}

// abandon is stop where there is nobody left to answer.
func (c *clients) abandon() map[string]string {
	c.cancel()
	c.wg.Wait()
	return c.promised
}
