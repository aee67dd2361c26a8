package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/url"
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

// What a machine does in a second is printed and never asserted: only the
// benchmarks are about speed. The gateway is built without the race detector
// here, so that the numbers mean something.

func TestTwentyThousandOrdersAreSavedOnceAndNeverMoreThanTheLimitAtATime(t *testing.T) {
	eachHome(t, testTwentyThousandOrdersAreSavedOnceAndNeverMoreThanTheLimitAtATime)
}

func testTwentyThousandOrdersAreSavedOnceAndNeverMoreThanTheLimitAtATime(t *testing.T, h home) {
	const (
		n, connections, concurrency = 20_000, 64, 64
		latency                     = 50 * time.Millisecond
	)
	b := backend(t, "--latency", latency.String())
	g := serve(t, false, h, settings{"backend.url": b.ordersURL(), "dispatch.concurrency": strconv.Itoa(concurrency)})
	began := time.Now()
	ids, err := g.flood(t.Context(), connections, n, func(i int) string { return fmt.Sprintf("L-%d", i) })
	require.NoError(t, err)
	require.Len(t, ids, n)
	flooded := time.Since(began)

	// Quietly: on two cores whoever asks all the time slows down what it asks.
	g.awaitQuietly(t, ids[fmt.Sprintf("L-%d", n-1)])
	g.drained(t, time.Minute)
	orders := g.all(t)
	requireSaved(t, ids, orders)
	require.Equal(t, backendStats{Requests: n, Orders: n, MaxInFlight: concurrency}, b.stats(t))

	finished := make([]time.Time, 0, n)
	var accepted time.Time
	for _, o := range orders {
		finished = append(finished, *o.FinishedAt)
		if o.AcceptedAt.After(accepted) {
			accepted = o.AcceptedAt
		}
	}
	slices.SortFunc(finished, time.Time.Compare)
	undisturbed, _ := slices.BinarySearchFunc(finished, accepted, time.Time.Compare)
	ideal := concurrency / latency.Seconds()
	t.Logf("%d orders accepted from %d connections in %v, %.0f/s", n, connections, flooded.Round(time.Millisecond), n/flooded.Seconds())
	t.Logf("saved %s, from the first to the last", pace(finished, ideal))
	t.Logf("saved %s, since no more were coming in", pace(finished[undisturbed:], ideal))
	t.Logf("at most %d at once at the backend, 0 repeats", concurrency)
}

// pace describes how fast orders that ended at these times, in ascending order,
// were saved. The first only starts the clock.
func pace(finished []time.Time, ideal float64) string {
	if len(finished) < 2 {
		return "too few to tell"
	}
	took := finished[len(finished)-1].Sub(finished[0])
	rate := float64(len(finished)-1) / took.Seconds()
	return fmt.Sprintf("%d in %v: %.0f/s, %.3f of the ideal %.0f/s", len(finished), took.Round(time.Millisecond), rate, rate/ideal, ideal)
}

func TestABacklogTakesDiskAndNotMemory(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("resident memory is read from /proc, which only Linux has")
	}
	const (
		few, many, connections, concurrency = 10_000, 200_000, 64, 64
	)
	// The worst way to be down: calls are taken and never answered. Then, too,
	// the broker inside the process holds as many orders as it may.
	b := backend(t, "--latency", "10m")
	g := serve(t, false, embedded(t.TempDir()), settings{"backend.url": b.ordersURL(), "backend.timeout": "10m",
		"dispatch.concurrency": strconv.Itoa(concurrency), "dispatch.max_attempts": "1000"})
	began := time.Now()
	g.pour(t, connections, 0, few)
	require.Equal(t, few, g.status(t).Backlog)
	small := g.memoryAtRest(t)
	poured := time.Now()
	g.pour(t, connections, few, many)
	flooded := time.Since(poured)
	require.Equal(t, many, g.status(t).Backlog)
	large := g.memoryAtRest(t)
	ratio := float64(large) / float64(small)
	t.Logf("%d orders accepted from %d connections in %v, %.0f/s", many-few, connections,
		flooded.Round(time.Millisecond), (many-few)/flooded.Seconds())
	t.Logf("resident memory: %.1f MiB at %d waiting, %.1f MiB at %d waiting: %.3f times as much",
		mib(small), few, mib(large), many, ratio)
	require.LessOrEqual(t, ratio, 1.25)

	// The other way to be down: every call is cut at once.
	b.control(t, `{"down": true}`)
	eventually(t, 30*time.Second, func() bool { return b.stats(t).Failed >= 10*concurrency }, "attempts do not go on")
	stats := b.stats(t)
	require.Equal(t, stats.Requests, stats.Failed+stats.InFlight, "nothing was saved before the backend was back")
	b.control(t, `{"down": false, "latency": "50ms"}`)
	back := time.Now()
	eventually(t, 30*time.Second, func() bool { return b.stats(t).Orders > 0 }, "the backend is back and no order is saved")
	t.Logf("an order was saved %v after the backend was back, with %d failed attempts before that; the test took %v",
		time.Since(back).Round(time.Millisecond), stats.Failed, time.Since(began).Round(time.Millisecond))
}

func mib(bytes int64) float64 { return float64(bytes) / (1 << 20) }

// memoryAtRest returns the resident memory that the process comes down to.
func (g *gateway) memoryAtRest(t testing.TB) int64 {
	t.Helper()
	// The runtime gives memory back some time after a collection. The process
	// is at rest when that has ended: the last samples are all alike.
	const (
		samples = 20
		alike   = 0.02
	)
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var last []int64
	for {
		do(t, http.MethodGet, g.admin+"/debug/pprof/heap?gc=1", "", nil)
		last = append(last, residentMemory(t, g.process))
		last = last[max(0, len(last)-samples):]
		lowest, highest := slices.Min(last), slices.Max(last)
		if len(last) == samples && float64(highest-lowest) <= alike*float64(highest) {
			return lowest
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Logf("memory is not at rest: from %.1f to %.1f MiB", mib(lowest), mib(highest))
			return lowest
		}
	}
}

// pour submits the orders numbered from first to end, without end itself, which
// must all be accepted. It does what flood does with less effort: no
// http.Client, and nothing is kept of the answers.
func (g *gateway) pour(t testing.TB, connections, first, end int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
	defer cancel()
	target, err := url.Parse(g.url)
	require.NoError(t, err)
	var next atomic.Int64
	next.Store(int64(first))
	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		fails []error
	)
	for range connections {
		wg.Go(func() {
			err := pourInto(ctx, target.Host, func() (int, bool) {
				i := int(next.Add(1)) - 1
				return i, i < end
			})
			mu.Lock()
			defer mu.Unlock()
			fails = append(fails, err)
		})
	}
	wg.Wait()
	require.NoError(t, errors.Join(fails...))
}

// pourInto submits orders over one connection, one after the other.
func pourInto(ctx context.Context, addr string, next func() (int, bool)) (err error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })() // what fails by it has its error
	defer func() { err = errors.Join(err, conn.Close()) }()
	answers := bufio.NewReader(conn)
	// All requests are alike up to the digits of the order's number.
	order := body("P-000000")
	request := fmt.Appendf(nil, "POST /orders HTTP/1.1\r\nHost: %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", addr, len(order), order)
	digits := bytes.LastIndex(request, []byte("000000"))
	for i, ok := next(); ok; i, ok = next() {
		copy(request[digits:], fmt.Sprintf("%06d", i))
		if _, err := conn.Write(request); err != nil {
			return fmt.Errorf("order P-%d: %w", i, err)
		}
		if err := skipAccepted(answers); err != nil {
			return fmt.Errorf("order P-%d: %w", i, err)
		}
	}
	return nil
}

// skipAccepted reads an answer that must be a 202 with a Content-Length.
func skipAccepted(r *bufio.Reader) error {
	length := -1
	for first := true; ; first = false {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		line = bytes.TrimSpace(line)
		if first && !bytes.HasPrefix(line, []byte("HTTP/1.1 202 ")) {
			return fmt.Errorf("answered %q", line)
		}
		if len(line) == 0 {
			break
		}
		if value, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
			if length, err = strconv.Atoi(string(value)); err != nil {
				return err
			}
		}
	}
	if length < 0 {
		return errors.New("answered without Content-Length")
	}
	_, err := r.Discard(length)
	return err
}

// awaitQuietly lets the gateway say when the order is final, instead of asking
// again and again.
func (g *gateway) awaitQuietly(t testing.TB, id string) {
	t.Helper()
	eventually(t, 2*time.Minute, func() bool {
		a := do(t, http.MethodGet, g.url+"/orders/"+id, "", map[string]string{"Prefer": "wait=30"})
		return a.order(t).FinishedAt != nil
	}, "order %s is not final", id)
}

// all returns every order that the gateway has, by number.
func (g *gateway) all(t testing.TB) map[string]order {
	t.Helper()
	orders := map[string]order{}
	for cursor := ""; ; {
		var page struct {
			Orders []order
			Next   *string
		}
		getJSON(t, g.url+"/orders?limit=500&cursor="+url.QueryEscape(cursor), &page)
		for _, o := range page.Orders {
			_, twice := orders[*o.OrderNumber]
			require.False(t, twice, "two orders with number %s", *o.OrderNumber)
			orders[*o.OrderNumber] = o
		}
		if page.Next == nil {
			return orders
		}
		cursor = *page.Next
	}
}

// requireSaved checks that exactly the promised orders exist, and that all are
// saved. It names the first few that are not.
func requireSaved(t testing.TB, promised map[string]string, orders map[string]order) {
	t.Helper()
	var faults []string
	for number, id := range promised {
		if o := orders[number]; o.ID != id || o.Status != "saved" || o.FinishedAt == nil {
			faults = append(faults, fmt.Sprintf("order %s, promised as %s, is %q with id %q", number, id, o.Status, o.ID))
		}
	}
	n := len(faults)
	slices.Sort(faults)
	require.Zero(t, n, strings.Join(faults[:min(n, 5)], "\n"))
	require.Len(t, orders, len(promised), "orders that nobody was promised")
}
