package e2e

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// BenchmarkDrain measures how fast a backlog is saved, against the ideal of as
// many orders per second as there are permits divided by the backend's time
// for one.
//
//	go test -run '^$' -bench Drain -benchtime 1x ./e2e
func BenchmarkDrain(b *testing.B) {
	for _, c := range []struct {
		concurrency int
		latency     time.Duration
	}{{64, 50 * time.Millisecond}, {256, 50 * time.Millisecond}, {500, 400 * time.Millisecond}} {
		b.Run(fmt.Sprintf("concurrency=%d/latency=%v", c.concurrency, c.latency), func(b *testing.B) {
			for b.Loop() {
				ideal := float64(c.concurrency) / c.latency.Seconds()
				got := drainRate(b, c.concurrency, c.latency, int(8*ideal))
				b.ReportMetric(got, "saved/s")
				b.ReportMetric(ideal, "ideal/s")
				b.ReportMetric(got/ideal, "ratio")
				b.ReportMetric(0, "ns/op") // includes the set-up
			}
		})
	}
}

// drainRate lets a backlog of n orders build up while the backend is stuck, and
// returns the rate of the saves between a tenth and nine tenths of it.
func drainRate(b *testing.B, concurrency int, latency time.Duration, n int) float64 {
	b.Helper()
	stand := backend(b, "--latency", "1m")
	g := serve(b, false, b.TempDir(), settings{
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

// reach waits until the stand-in has saved that many orders.
func reach(b *testing.B, stand *standIn, orders int) (int, time.Time) {
	b.Helper()
	var got backendStats
	eventually(b, 5*time.Minute, func() bool {
		got = stand.stats(b)
		return got.Orders >= orders
	}, "the backlog does not drain")
	return got.Orders, time.Now()
}
