// Package dispatch is the backend's door: it takes the orders that want saving
// from the broker, makes one attempt at each against the Backend API, never
// more than a set number at once, and publishes what became of it. It keeps no
// state, decides no retries and needs no storage: a failed attempt is an
// outcome like any other, and intake schedules the next one. Its Client also
// serves whoever calls the backend directly.
package dispatch

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/trace"

	"sluice/modules/contract"
	"sluice/platform/middleware"
)

// handlerName names our handler in the router, its logs and metrics.
const handlerName = "dispatch"

// overrun is how far the handler's time limit lies beyond backend.timeout. The
// client keeps to backend.timeout by itself and turns it into an outcome; the
// handler's limit is the net under it, and must not pass first, because what it
// interrupts has no outcome.
const overrun = 5 * time.Second

// Bus is the broker as the module sees it. All are required.
type Bus struct {
	// Subscriber is of contract.GroupDispatch. The module bounds its attempts
	// by itself; messages handed out beyond that wait for a permit in memory.
	Subscriber message.Subscriber
	Outcomes   message.Publisher // for contract.TopicOutcome; returns when the broker has the message
	Poison     message.Publisher // for contract.TopicPoison
	System     string            // the broker's name in traces
	// Redelivered reports whether this delivery follows an earlier one.
	Redelivered func(*message.Message) bool
	// Lost reports whether the broker has given the message to somebody else
	// meanwhile, so that the order is not to be called for here. Nil where
	// that cannot be.
	Lost func(*message.Message) bool
}

// Module handles contract.TopicSubmitted.
type Module struct {
	client  *Client
	bus     Bus
	limiter *middleware.Limiter
	handler message.HandlerFunc
	logger  *slog.Logger
}

// Stats are the present numbers of the module.
type Stats struct {
	InFlight int // attempts that run now
	Limit    int // most attempts that may run at once
}

// New makes the module. It starts nothing: Register does, through the router.
// Its errors are faults of the configuration and of the meter.
func New(cfg Config, backend BackendConfig, client *Client, bus Bus, deps Deps) (*Module, error) {
	if err := errors.Join(cfg.Validate(), backend.Validate()); err != nil {
		return nil, err
	}
	m := &Module{
		client:  client,
		bus:     bus,
		limiter: middleware.NewLimiter(cfg.Concurrency),
		logger:  deps.Logger,
	}
	meter := deps.MeterProvider.Meter(scope)
	if err := m.observe(meter); err != nil {
		return nil, fmt.Errorf("create gauges: %w", err)
	}
	metrics, err := middleware.Metrics(meter, handlerName)
	if err != nil {
		return nil, fmt.Errorf("create metrics of handler %s: %w", handlerName, err)
	}
	// The permit is held for the attempt only: waiting for one is before the
	// time limit begins, publishing the outcome comes after it is given back.
	m.handler = middleware.Chain(m.handle,
		middleware.Roomy,
		middleware.Recover(deps.Logger),
		middleware.Tracing(deps.TracerProvider, deps.Propagator, bus.System, contract.GroupDispatch, bus.Redelivered),
		metrics,
		middleware.Poison(bus.Poison, contract.TopicPoison, undecodable),
		middleware.Publish(bus.Outcomes, contract.TopicOutcome, deps.Logger),
		middleware.Throttle(m.limiter),
		middleware.Timeout(backend.Timeout+overrun),
	)
	return m, nil
}

func undecodable(err error) bool { return errors.Is(err, contract.ErrUndecodable) }

func (m *Module) observe(meter metric.Meter) error {
	inFlight, err := meter.Int64ObservableGauge("sluice.dispatch.in_flight",
		metric.WithUnit("{attempt}"), metric.WithDescription("Attempts that run now."))
	if err != nil {
		return err
	}
	limit, err := meter.Int64ObservableGauge("sluice.dispatch.concurrency_limit",
		metric.WithUnit("{attempt}"), metric.WithDescription("Most attempts that may run at once."))
	if err != nil {
		return err
	}
	_, err = meter.RegisterCallback(func(_ context.Context, o metric.Observer) error {
		stats := m.Stats()
		o.ObserveInt64(inFlight, int64(stats.InFlight))
		o.ObserveInt64(limit, int64(stats.Limit))
		return nil
	}, inFlight, limit)
	return err
}

// Register adds the module's handler to a router. The handler acks a message
// when its outcome is published or it is in the poison topic, and nacks it when
// neither could be done or the router is closing. It uses its own middleware
// and publishers, none of the router's.
func (m *Module) Register(router *message.Router) {
	router.AddConsumerHandler(handlerName, contract.TopicSubmitted, m.bus.Subscriber, func(msg *message.Message) error {
		_, err := m.handler(msg) // what it produced is published by then
		if errors.Is(err, middleware.ErrClosed) || errors.Is(err, errLost) {
			msg.Nack() // no failure, which the router would log: it goes back untouched
			return nil
		}
		return err
	})
}

// Stop begins no further attempt: orders that wait for a permit go back to the
// broker. It does not wait for the attempts that run; a drain of the subscriber
// does. There is no way back.
func (m *Module) Stop() { m.limiter.Close() }

// Stats may be called at any time, concurrently.
func (m *Module) Stats() Stats {
	return Stats{InFlight: m.limiter.InFlight(), Limit: m.limiter.Limit()}
}

// errLost ends the handling of a message that the broker gives to somebody else,
// while this one waited for a permit.
var errLost = errors.New("the broker has taken the message back")

// handle makes the attempt that a message asks for and returns its outcome. A
// marker has come here like an order, waited for its permit and goes on.
func (m *Module) handle(msg *message.Message) ([]*message.Message, error) {
	if contract.IsMarker(msg) {
		return []*message.Message{msg.Copy()}, nil
	}
	order, err := contract.DecodeSubmitted(msg)
	if err != nil {
		return nil, err
	}
	if m.bus.Lost != nil && m.bus.Lost(msg) {
		return nil, errLost
	}
	ctx := msg.Context()
	outcome, err := m.client.Attempt(ctx, order)
	if err != nil {
		return nil, err
	}
	m.log(ctx, outcome)
	produced, err := outcome.Message()
	if err != nil {
		return nil, err
	}
	return []*message.Message{produced}, nil
}

func (m *Module) log(ctx context.Context, o contract.Outcome) {
	level := slog.LevelDebug
	if o.Type == contract.TypeRejected {
		level = slog.LevelInfo
	}
	if !m.logger.Enabled(ctx, level) {
		return // or the attributes are made for nothing
	}
	switch o.Type {
	case contract.TypeRejected:
		m.logger.LogAttrs(ctx, level, "order rejected", attrs(ctx, o)...)
	case contract.TypeAttemptFailed:
		m.logger.LogAttrs(ctx, level, "attempt failed", attrs(ctx, o)...)
	default:
		m.logger.LogAttrs(ctx, level, "order saved", attrs(ctx, o)...)
	}
}

func attrs(ctx context.Context, o contract.Outcome) []slog.Attr {
	attrs := []slog.Attr{
		slog.String("order_id", o.OrderID),
		slog.Int("attempt", o.Attempt),
		slog.Int("status", o.StatusCode),
		slog.Duration("duration", o.Duration),
	}
	if span := trace.SpanContextFromContext(ctx); span.HasTraceID() {
		attrs = append(attrs, slog.String("trace_id", span.TraceID().String()))
	}
	if o.Error != "" {
		attrs = append(attrs, slog.String("error", o.Error))
	}
	return attrs
}
