package e2e

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// BenchmarkDrain measures how fast a backlog is saved, against the ideal of as
// many orders per second as there are permits divided by the backend's time
// for one, and against what a bare HTTP client with as many workers gets out of
// the same stand-in in the same run: no machine keeps to 50 ms exactly, and
// gateway, broker, database and stand-in share this one. A backend that takes no
// time has no ideal.
//
//	go test -run '^$' -bench Drain -benchtime 1x ./e2e
func BenchmarkDrain(b *testing.B) {
	for _, c := range []struct {
		concurrency int
		latency     time.Duration
	}{
		{64, 50 * time.Millisecond}, {256, 200 * time.Millisecond}, {500, 400 * time.Millisecond}, // about as many orders a second
		{256, 50 * time.Millisecond}, {64, 0}, // as many as the machine can do
	} {
		b.Run(fmt.Sprintf("concurrency=%d/latency=%v", c.concurrency, c.latency), func(b *testing.B) {
			ideal, orders := 0.0, 30_000
			if c.latency > 0 {
				ideal = float64(c.concurrency) / c.latency.Seconds()
				orders = int(8 * ideal)
			}
			bare := bareRate(b, c.concurrency, c.latency, orders/2)
			for _, kind := range homes() {
				b.Run(kind.name, func(b *testing.B) {
					for b.Loop() {
						got := drainRate(b, kind.open(b), c.concurrency, c.latency, orders)
						b.ReportMetric(got, "saved/s")
						b.ReportMetric(bare, "bare-client/s")
						b.ReportMetric(got/bare, "of-bare")
						if ideal > 0 {
							b.ReportMetric(ideal, "ideal/s")
							b.ReportMetric(got/ideal, "of-ideal")
						}
						b.ReportMetric(0, "ns/op") // includes the set-up
					}
				})
			}
		})
	}
}

// BenchmarkIdle measures the time from a client's 202 to the backend call, with
// nothing else going on.
//
//	go test -run '^$' -bench Idle -benchtime 1x ./e2e
func BenchmarkIdle(b *testing.B) {
	for _, kind := range homes() {
		b.Run(kind.name, func(b *testing.B) {
			for b.Loop() {
				took := idleLatencies(b, kind.open(b), 200)
				b.ReportMetric(float64(percentile(took, 0.5).Microseconds())/1000, "median-ms")
				b.ReportMetric(float64(percentile(took, 0.99).Microseconds())/1000, "p99-ms")
				b.ReportMetric(0, "ns/op")
			}
		})
	}
}

func idleLatencies(b *testing.B, h home, n int) []time.Duration {
	b.Helper()
	stand := backend(b, "--latency", "1ms")
	g := serve(b, false, h, settings{"backend.url": stand.ordersURL()})
	took := make([]time.Duration, 0, n)
	for i := range n {
		o := g.accept(b, fmt.Sprintf("I-%d", i))
		answered := time.Now()
		g.awaitQuietly(b, o.ID)
		var history struct {
			Attempts []struct{ StartedAt time.Time }
		}
		getJSON(b, g.url+"/orders/"+o.ID+"/attempts", &history)
		took = append(took, history.Attempts[0].StartedAt.Sub(answered))
	}
	return took
}

// bareRate is drainRate of workers that do nothing but call the backend.
func bareRate(b *testing.B, workers int, latency time.Duration, n int) float64 {
	b.Helper()
	stand := backend(b, "--latency", latency.String())
	bare := &http.Client{Transport: &http.Transport{MaxIdleConns: workers, MaxIdleConnsPerHost: workers}}
	defer bare.CloseIdleConnections()
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make(chan error, workers)
	for range workers {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				if err := callBackend(bare, stand, int(i)); err != nil {
					errs <- err
					return
				}
			}
		})
	}
	first, started := reach(b, stand, n/10)
	last, ended := reach(b, stand, n*9/10)
	wg.Wait()
	close(errs)
	for err := range errs {
		require.NoError(b, err)
	}
	return float64(last-first) / ended.Sub(started).Seconds()
}

func callBackend(bare *http.Client, stand *standIn, i int) error {
	req, err := http.NewRequestWithContext(context.Background(), http.MethodPost, stand.ordersURL(), strings.NewReader(body(fmt.Sprintf("A-%d", i))))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", fmt.Sprintf(`"%08d-0000-7000-8000-000000000000"`, i))
	res, err := bare.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if _, err = io.Copy(io.Discard, res.Body); err == nil && res.StatusCode != http.StatusOK {
		err = fmt.Errorf("backend answered %d", res.StatusCode)
	}
	return err
}

// drainRate lets a backlog of n orders build up while the backend is stuck, and
// returns the rate of the saves between a tenth and nine tenths of it.
func drainRate(b *testing.B, h home, concurrency int, latency time.Duration, n int) float64 {
	b.Helper()
	stand := backend(b, "--latency", "1m")
	g := serve(b, false, h, settings{
		"backend.url": stand.ordersURL(), "backend.timeout": "2m", "dispatch.concurrency": fmt.Sprint(concurrency), "dispatch.retry_initial": "1ms",
	})
	_, err := g.flood(context.Background(), 64, n, func(i int) string { return fmt.Sprintf("A-%d", i) })
	require.NoError(b, err)
	stand.control(b, fmt.Sprintf(`{"latency": %q}`, latency))
	// The stuck calls end when the stand-in is told to cut them; they are
	// tried again.
	stand.control(b, `{"down": true}`)
	stand.control(b, `{"down": false}`)
	first, started := reach(b, stand, n/10)
	last, ended := reach(b, stand, n*9/10)
	require.Zero(b, stand.stats(b).Repeats)
	return float64(last-first) / ended.Sub(started).Seconds()
}

// reach waits until the stand-in has saved that many orders. It looks seldom: all that it takes of the processors is missing
// from what it measures.
func reach(b *testing.B, stand *standIn, orders int) (int, time.Time) {
	b.Helper()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for patience := time.Now().Add(5 * time.Minute); ; <-tick.C {
		if got := stand.stats(b).Orders; got >= orders {
			return got, time.Now()
		}
		require.True(b, time.Now().Before(patience), "the backlog does not drain")
	}
}
