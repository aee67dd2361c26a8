package rivals

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"golang.org/x/sync/errgroup"
)

const (
	// publishers is how many goroutines hand over orders at once, as many as
	// Sluice's own benchmarks have clients.
	publishers = 64
	// acceptFor bounds the time of one measurement of accepting.
	acceptFor = 5 * time.Second
	// fillFor bounds the time to write a backlog.
	fillFor = 30 * time.Second
	// warmUp passes before the saves are counted, unless a tenth of the backlog
	// is saved earlier; drainFor is how long they are counted, unless nine
	// tenths are saved earlier. The default configurations that call the
	// backend once at a time come to 100 orders in it, at 50 ms each.
	warmUp   = time.Second
	drainFor = 5 * time.Second
	// stuckFor bounds the wait for something that should happen any moment.
	stuckFor = 30 * time.Second
)

// order is what the client wants saved.
type order struct {
	id   string
	body []byte
}

// newOrders makes orders of the size that modules/intake measures with. They
// are made ahead, so that making them costs no rival anything.
func newOrders(n int) []order {
	orders := make([]order, n)
	for i := range orders {
		orders[i] = order{uuid.NewString(), fmt.Appendf(nil, `{"orderNumber":"R-%d","customerId":"c-1001","currency":"EUR","items":[{"sku":"tea-green-100","quantity":2,"unitPrice":4.5},{"sku":"cup","quantity":1,"unitPrice":12.25}],"note":"ring twice"}`, i)}
	}
	return orders
}

// save tells the backend of an order. A rival calls it once for each order that
// it works off, and hands the order out again if it returns an error.
type save func(ctx context.Context, o order) error

// rival is a queue with names or a database of its own.
type rival interface {
	// put returns when the rival has taken the orders, in one call of its
	// library. It is safe for concurrent use.
	put(ctx context.Context, orders []order) error
	// work starts saving in the background, until close.
	work(tb testing.TB, s save)
	// close stops working and lets go of connections and goroutines. What is in
	// flight may be cut off.
	close(tb testing.TB)
}

// settler is a rival that profits from a word between the writing of a backlog
// and the working off.
type settler interface {
	settle(tb testing.TB)
}

// BenchmarkAccept measures how many orders per second the library takes from 64
// goroutines, one order in each call, and 100 orders in each call where a gateway
// could collect them from concurrent requests.
//
//	go test -run '^$' -bench Accept -benchtime 1x
func BenchmarkAccept(b *testing.B) {
	for _, c := range []struct {
		name   string
		open   func(testing.TB) rival
		orders int
		batch  int
	}{
		{"gochannel", openGoChannel, 20_000, 1},
		{"amqp", openAMQP, 10_000, 1},
		{"amqp", openAMQP, 40_000, 100},
		{"amqp-confirms", openAMQPWithConfirms, 20_000, 1},
		{"sql", openSQL, 20_000, 1},
		{"sql", openSQL, 100_000, 100},
		{"river", openRiver(publishers, river100ms), 20_000, 1},
		{"river", openRiver(publishers, river100ms), 50_000, 100},
	} {
		b.Run(fmt.Sprintf("%s/batch=%d", c.name, c.batch), func(b *testing.B) {
			for b.Loop() {
				b.ReportMetric(acceptRate(b, c.open, c.orders, c.batch), "accepted/s")
				b.ReportMetric(0, "ns/op") // includes the set-up
			}
		})
	}
}

func acceptRate(b *testing.B, open func(testing.TB) rival, orders, batch int) float64 {
	b.Helper()
	r := open(b)
	defer r.close(b)
	if r, ok := r.(*goChannel); ok {
		// Without a consumer it would drop the orders. With one that is stuck, as
		// with a backend that is, it keeps them in goroutines.
		r.work(b, func(ctx context.Context, _ order) error {
			<-ctx.Done()
			return ctx.Err()
		})
	}
	all := newOrders(orders)
	started := time.Now()
	accepted, err := put(b.Context(), r, all, batch, acceptFor)
	require.NoError(b, err)
	return float64(accepted) / time.Since(started).Seconds()
}

// put hands over the orders from concurrent goroutines, and returns how many the
// rival took until the time was up.
func put(ctx context.Context, r rival, orders []order, batch int, within time.Duration) (int, error) {
	// Between the calls, not in them: an order is either taken or not.
	deadline := time.Now().Add(within)
	var next, taken atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	for range publishers {
		group.Go(func() error {
			for time.Now().Before(deadline) && ctx.Err() == nil {
				from := int(next.Add(int64(batch))) - batch
				if from >= len(orders) {
					return nil
				}
				some := orders[from:min(from+batch, len(orders))]
				if err := r.put(ctx, some); err != nil {
					return err
				}
				taken.Add(int64(len(some)))
			}
			return nil
		})
	}
	err := group.Wait()
	return int(taken.Load()), err
}

// BenchmarkDrain measures how many orders per second of a backlog are saved at
// the backend. The ideal is what the configuration allows: as many orders per
// second as calls at once divided by the backend's time for one; of-ideal is how
// much of it is reached. Go channels have none, since nothing bounds their
// handlers, and without latency there is none either. most-in-flight is what the
// stand-in saw, all in all.
//
//	go test -run '^$' -bench Drain -benchtime 1x
func BenchmarkDrain(b *testing.B) {
	for _, c := range []struct {
		name string
		open func(testing.TB) rival
		// concurrency is how many calls at once the configuration allows, 0 for
		// any number.
		concurrency int
		// backlog at no latency; with latency, slow is enough.
		backlog, slow int
	}{
		{"gochannel", openGoChannel, 0, 4_000, 4_000},
		{"amqp", openAMQP, 1, 10_000, 200},
		{"sql", openSQL, 1, 10_000, 200},
		{"river/workers=64", openRiver(64, river100ms), 64, 5_000, 5_000},
		{"river/workers=256", openRiver(256, river100ms), 256, 18_000, 18_000},
		{"river-2ms-fetch/workers=64", openRiver(64, river2ms), 64, 30_000, 10_000},
		{"river-2ms-fetch/workers=256", openRiver(256, river2ms), 256, 30_000, 30_000},
	} {
		for _, latency := range []time.Duration{0, 50 * time.Millisecond} {
			b.Run(fmt.Sprintf("%s/latency=%v", c.name, latency), func(b *testing.B) {
				backlog := c.backlog
				if latency > 0 {
					backlog = c.slow
				}
				for b.Loop() {
					reportDrain(b, c.open, backlog, c.concurrency, latency)
				}
			})
		}
	}
}

func reportDrain(b *testing.B, open func(testing.TB) rival, backlog, concurrency int, latency time.Duration) {
	b.Helper()
	stand := startStandIn(b, latency)
	defer stand.stop()
	got := drainRate(b, stand, open, backlog)
	b.ReportMetric(got, "saved/s")
	b.ReportMetric(float64(stand.stats(b).MaxInFlight), "most-in-flight")
	if concurrency > 0 && latency > 0 {
		ideal := float64(concurrency) / latency.Seconds()
		b.ReportMetric(ideal, "ideal/s")
		b.ReportMetric(got/ideal, "of-ideal")
	}
	b.ReportMetric(0, "ns/op") // includes the set-up
}

// drainRate returns the orders saved per second of a backlog of n orders.
func drainRate(b *testing.B, stand *standIn, open func(testing.TB) rival, n int) float64 {
	b.Helper()
	r := open(b)
	defer r.close(b)
	orders := newOrders(n)
	if _, ok := r.(*goChannel); ok {
		return burstRate(b, stand, r, orders)
	}
	fill(b, r, orders, 100)
	r.work(b, stand.save)
	stand.reach(b, 1, stuckFor)
	first, started := stand.reach(b, n/10, warmUp)
	last, ended := stand.reach(b, n*9/10, drainFor)
	require.Positive(b, first, "nothing is saved")
	requireClean(b, stand)
	return float64(last-first) / ended.Sub(started).Seconds()
}

// burstRate is drainRate of a rival that cannot keep a backlog: it begins on every
// order at once, so that there is no steady middle to measure. It is the rate from
// the first order handed over to the last one saved.
func burstRate(b *testing.B, stand *standIn, r rival, orders []order) float64 {
	b.Helper()
	r.work(b, stand.save)
	started := time.Now()
	fill(b, r, orders, 1)
	last, ended := stand.reach(b, len(orders), stuckFor)
	require.Equal(b, len(orders), last, "not all is saved")
	requireClean(b, stand)
	return float64(last) / ended.Sub(started).Seconds()
}

func fill(b *testing.B, r rival, orders []order, batch int) {
	b.Helper()
	taken, err := put(b.Context(), r, orders, batch, fillFor)
	require.NoError(b, err)
	require.Equal(b, len(orders), taken, "the backlog is not complete within %v", fillFor)
	if r, ok := r.(settler); ok {
		r.settle(b)
	}
}

// requireClean rules out that a rate is one of failing or repeated calls.
func requireClean(b *testing.B, stand *standIn) {
	b.Helper()
	s := stand.stats(b)
	require.Zero(b, s.Failed+s.Rejected+s.Repeats, "%+v", s)
}
