package intake

import (
	"context"
	"sync"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"

	"sluice/modules/contract"
)

// Stats is what an operator wants to know of intake at a glance.
type Stats struct {
	Backlog       int64         // orders that are not final
	OldestWaiting time.Duration // age of the oldest of them, 0 when there is none
	AcceptedRate  float64       // per second, over the last rateSeconds
	SavedRate     float64
}

// rateSeconds is the span over which rates are averaged.
const rateSeconds = 10

// stats counts what the module does. It is safe for concurrent use.
type stats struct {
	acceptedRate rate
	savedRate    rate

	acceptedTotal  metric.Int64Counter
	publishedTotal metric.Int64Counter
	lostTotal      metric.Int64Counter
	finishedTotal  metric.Int64Counter
	gauges         metric.Registration
}

// newStats registers the module's instruments; the store is asked for the
// gauges whenever somebody reads them, until close.
func newStats(meter metric.Meter, s store) (*stats, error) {
	st := &stats{}
	var err error
	if st.acceptedTotal, err = meter.Int64Counter("sluice.orders.accepted", metric.WithDescription("Orders committed to storage, those of POST /orders/sync included."), metric.WithUnit("{order}")); err != nil {
		return nil, err
	}
	if st.publishedTotal, err = meter.Int64Counter("sluice.orders.published", metric.WithDescription("Messages that ask for an attempt at an order, taken by the broker."), metric.WithUnit("{message}")); err != nil {
		return nil, err
	}
	if st.lostTotal, err = meter.Int64Counter("sluice.orders.lost", metric.WithDescription("Orders whose messages the broker lost, found and made due again."), metric.WithUnit("{order}")); err != nil {
		return nil, err
	}
	if st.finishedTotal, err = meter.Int64Counter("sluice.orders.finished", metric.WithDescription("Orders that became final, by status."), metric.WithUnit("{order}")); err != nil {
		return nil, err
	}
	byStatus, err := meter.Int64ObservableGauge("sluice.orders", metric.WithDescription("Orders in the store, by status."), metric.WithUnit("{order}"))
	if err != nil {
		return nil, err
	}
	backlog, err := meter.Int64ObservableGauge("sluice.backlog", metric.WithDescription("Orders accepted and not final."), metric.WithUnit("{order}"))
	if err != nil {
		return nil, err
	}
	oldest, err := meter.Float64ObservableGauge("sluice.backlog.oldest.age", metric.WithDescription("Age of the oldest order that is not final."), metric.WithUnit("s"))
	if err != nil {
		return nil, err
	}
	st.gauges, err = meter.RegisterCallback(func(ctx context.Context, o metric.Observer) error {
		counts := s.counts()
		for _, status := range contract.Statuses() {
			o.ObserveInt64(byStatus, counts[status], metric.WithAttributes(attribute.String("status", string(status))))
		}
		o.ObserveInt64(backlog, backlogOf(counts))
		age, err := oldestAge(ctx, s)
		if err != nil {
			return err
		}
		o.ObserveFloat64(oldest, age.Seconds())
		return nil
	}, byStatus, backlog, oldest)
	return st, err
}

// close ends the gauges, before the store that they ask: telemetry outlives
// it, and collects once more at its own end. It waits for a reading under way.
func (st *stats) close() error { return st.gauges.Unregister() }

func (st *stats) accepted(n int64) {
	st.acceptedRate.add(time.Now(), n)
	st.acceptedTotal.Add(context.Background(), n) // a counter has no use for a request's context
}

func (st *stats) published(n int) {
	st.publishedTotal.Add(context.Background(), int64(n)) // as above
}

func (st *stats) lost(n int) {
	st.lostTotal.Add(context.Background(), int64(n)) // as above
}

func (st *stats) finished(status contract.Status) {
	if status == contract.StatusSaved {
		st.savedRate.add(time.Now(), 1)
	}
	st.finishedTotal.Add(context.Background(), 1, metric.WithAttributes(attribute.String("status", string(status)))) // as above
}

func backlogOf(counts map[contract.Status]int64) int64 {
	return counts[contract.StatusAccepted] + counts[contract.StatusRetrying]
}

func oldestAge(ctx context.Context, s store) (time.Duration, error) {
	at, err := s.oldestWaiting(ctx)
	if err != nil || at.IsZero() {
		return 0, err
	}
	return max(0, time.Since(at)), nil
}

// rate counts events per second over the last rateSeconds whole seconds.
type rate struct {
	mu      sync.Mutex
	seconds [rateSeconds + 1]struct {
		at int64
		n  int64
	}
}

func (r *rate) add(now time.Time, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	at := now.Unix()
	s := &r.seconds[at%int64(len(r.seconds))]
	if s.at != at {
		s.at, s.n = at, 0
	}
	s.n += n
}

func (r *rate) perSecond(now time.Time) float64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	var n int64
	for _, s := range r.seconds {
		if age := now.Unix() - s.at; age >= 1 && age <= rateSeconds {
			n += s.n
		}
	}
	return float64(n) / rateSeconds
}
