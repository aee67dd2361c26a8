package dispatch_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"sluice/modules/contract"
	"sluice/modules/dispatch"
	"sluice/platform/middleware"
	"sluice/platform/pubsub"
)

// soon is a deadline for what takes milliseconds on an idle machine.
const soon = time.Minute

// gateway is the module on a router and a broker, with nothing around it.
type gateway struct {
	broker   *pubsub.PubSub
	module   *dispatch.Module
	outcomes <-chan *message.Message
	poison   <-chan *message.Message
}

// startGateway runs the module against a backend until the end of the test.
func startGateway(t *testing.T, backendURL string, concurrency int, deps dispatch.Deps) *gateway {
	t.Helper()
	broker, err := pubsub.Open(t.Context(), pubsub.DefaultConfig(), nil, deps.Logger)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, broker.Close()) })

	// More messages are handed out than may be in flight: the limit must be
	// the module's own.
	subscriber := broker.Subscriber(contract.GroupDispatch, 4*concurrency)
	g := &gateway{broker: broker}
	g.module = newModule(t, backendURL, concurrency, deps, dispatch.Bus{
		Subscriber:  subscriber,
		Outcomes:    broker.Publisher(),
		Poison:      broker.Publisher(),
		System:      broker.Name(),
		Redelivered: pubsub.Redelivered,
	})
	g.outcomes, err = broker.Subscriber(contract.GroupIntake, 1).Subscribe(t.Context(), contract.TopicOutcome)
	require.NoError(t, err)
	g.poison, err = broker.Subscriber("test", 1).Subscribe(t.Context(), contract.TopicPoison)
	require.NoError(t, err)
	run(t, g.module)
	return g
}

func newModule(t *testing.T, backendURL string, concurrency int, deps dispatch.Deps, bus dispatch.Bus) *dispatch.Module {
	t.Helper()
	cfg, backend := dispatch.DefaultConfig(), dispatch.BackendConfig{URL: backendURL, Timeout: patience}
	cfg.Concurrency = concurrency
	client, err := dispatch.NewClient(backend, cfg, deps)
	require.NoError(t, err)
	t.Cleanup(client.Close)
	module, err := dispatch.New(cfg, backend, client, bus, deps)
	require.NoError(t, err)
	return module
}

// run registers the module on a router of its own and returns what closes that;
// the end of the test closes it too.
func run(t *testing.T, module *dispatch.Module) (stop func()) {
	t.Helper()
	router, err := message.NewRouter(message.RouterConfig{CloseTimeout: soon}, watermill.NopLogger{})
	require.NoError(t, err)
	module.Register(router)
	ended := make(chan error, 1)
	go func() { ended <- router.Run(context.WithoutCancel(t.Context())) }()
	<-router.Running()
	stop = sync.OnceFunc(func() {
		require.NoError(t, router.Close())
		require.NoError(t, <-ended)
	})
	t.Cleanup(stop)
	return stop
}

func (g *gateway) submit(t *testing.T, msgs ...*message.Message) {
	t.Helper()
	require.NoError(t, g.broker.Publisher().Publish(contract.TopicSubmitted, msgs...))
}

func (g *gateway) nextOutcome(t *testing.T) contract.Outcome {
	t.Helper()
	msg := next(t, g.outcomes)
	outcome, err := contract.DecodeOutcome(msg)
	require.NoError(t, err)
	return outcome
}

func next(t *testing.T, messages <-chan *message.Message) *message.Message {
	t.Helper()
	select {
	case msg := <-messages:
		msg.Ack()
		return msg
	case <-time.After(soon):
		require.FailNow(t, "no message came")
		return nil
	}
}

func orderNumbered(n int) contract.Submitted {
	order := newOrder()
	order.OrderID = fmt.Sprintf("019ab9f0-7c1e-7d3a-8b44-%012d", n)
	order.OrderNumber = fmt.Sprintf("A-%d", n)
	return order
}

func TestModulePassesMarkersOnBehindTheOrders(t *testing.T) {
	release := make(chan struct{})
	var calls atomic.Int64
	backend := newBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		<-release
		w.WriteHeader(http.StatusOK)
	})
	g := startGateway(t, backend.URL, 1, quietDeps())
	sent := contract.Marker{SentAt: time.Now().UTC(), LostBefore: time.Now().UTC().Add(-time.Hour)}
	marker, err := sent.Message()
	require.NoError(t, err)
	g.submit(t, orderNumbered(1).Message())
	require.Eventually(t, func() bool { return g.module.Stats().InFlight == 1 }, soon, time.Millisecond)
	g.submit(t, marker)
	select {
	case <-g.outcomes:
		require.FailNow(t, "the marker did not wait for a permit")
	case <-time.After(20 * time.Millisecond):
	}
	close(release)
	for range 2 { // in either order: the outcome is published when its permit is free
		if msg := next(t, g.outcomes); contract.IsMarker(msg) {
			got, err := contract.DecodeMarker(msg)
			require.NoError(t, err)
			require.Equal(t, sent, got)
		}
	}
	require.EqualValues(t, 1, calls.Load())
}

func TestModulePublishesTheOutcomeOfEachOrder(t *testing.T) {
	answers := []struct {
		status int
		want   string
	}{
		{http.StatusCreated, contract.TypeSaved},
		{http.StatusUnprocessableEntity, contract.TypeRejected},
		{http.StatusServiceUnavailable, contract.TypeAttemptFailed},
	}
	var n atomic.Int64
	backend := newBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(answers[n.Add(1)-1].status)
		_, _ = io.WriteString(w, `{"answer":true}`)
	})
	g := startGateway(t, backend.URL, 2, quietDeps())

	for i, answer := range answers {
		order := orderNumbered(i)
		g.submit(t, order.Message())

		outcome := g.nextOutcome(t)

		require.Equal(t, answer.want, outcome.Type)
		require.Equal(t, order.OrderID, outcome.OrderID)
		require.Equal(t, order.OrderNumber, outcome.OrderNumber)
		require.Equal(t, order.Attempt, outcome.Attempt)
		require.Equal(t, answer.status, outcome.StatusCode)
		require.Equal(t, "application/json", outcome.ContentType)
		require.JSONEq(t, `{"answer":true}`, string(outcome.Body))
	}
	require.EqualValues(t, len(answers), n.Load(), "a failed attempt is not repeated here")
}

func TestModuleBoundsAttempts(t *testing.T) {
	const limit, rounds = 16, 12
	var (
		mu        sync.Mutex
		inFlight  int
		most      int
		stats     []dispatch.Stats
		release   = make(chan struct{})
		module    *dispatch.Module
		published = make(chan struct{})
	)
	// Requests are answered in full rounds only: the limit must be reached for
	// the test to go on, and a request beyond it would be seen, since one is
	// taken out of the count before its answer is sent.
	backend := newBackend(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		<-published
		mu.Lock()
		inFlight++
		most = max(most, inFlight)
		round := release
		if inFlight == limit {
			stats = append(stats, module.Stats())
			inFlight = 0
			close(release)
			release = make(chan struct{})
		}
		mu.Unlock()
		select {
		case <-round:
		case <-r.Context().Done():
		}
	})
	g := startGateway(t, backend.URL, limit, quietDeps())
	module = g.module
	require.Equal(t, dispatch.Stats{InFlight: 0, Limit: limit}, module.Stats())

	msgs := make([]*message.Message, 0, limit*rounds)
	for i := range limit * rounds {
		msgs = append(msgs, orderNumbered(i).Message())
	}
	g.submit(t, msgs...)
	close(published)

	seen := map[string]bool{}
	for range limit * rounds {
		outcome := g.nextOutcome(t)
		require.Equal(t, contract.TypeSaved, outcome.Type)
		seen[outcome.OrderID] = true
	}
	require.Len(t, seen, limit*rounds)
	require.Equal(t, limit, most)
	require.Equal(t, slices.Repeat([]dispatch.Stats{{InFlight: limit, Limit: limit}}, rounds), stats)
	require.Eventually(t, func() bool { return module.Stats().InFlight == 0 }, soon, time.Millisecond)
}

func TestModulePoisonsWhatItCannotRead(t *testing.T) {
	var requests atomic.Int64
	backend := newBackend(t, func(http.ResponseWriter, *http.Request) { requests.Add(1) })
	g := startGateway(t, backend.URL, 1, quietDeps())

	foreign := message.NewMessage("foreign", []byte("not an order"))
	g.submit(t, foreign, newOrder().Message())

	poisoned := next(t, g.poison)
	require.Equal(t, "foreign", poisoned.UUID)
	require.Equal(t, "not an order", string(poisoned.Payload))
	require.Equal(t, contract.TypeSaved, g.nextOutcome(t).Type, "the one behind it is not held up")
	require.EqualValues(t, 1, requests.Load())
}

func TestModuleKeepsTheTrace(t *testing.T) {
	deps := quietDeps()
	provider := sdktrace.NewTracerProvider()
	deps.TracerProvider = provider
	var traceparent string
	backend := newBackend(t, func(_ http.ResponseWriter, r *http.Request) { traceparent = r.Header.Get("Traceparent") })
	g := startGateway(t, backend.URL, 1, deps)
	ctx, span := provider.Tracer("test").Start(t.Context(), "POST /orders")
	defer span.End()
	msg := newOrder().Message()
	msg.SetContext(ctx)

	publisher := middleware.TracingPublisher(g.broker.Publisher(), provider, deps.Propagator, g.broker.Name())
	require.NoError(t, publisher.Publish(contract.TopicSubmitted, msg))

	require.Equal(t, contract.TypeSaved, g.nextOutcome(t).Type)
	require.Contains(t, traceparent, span.SpanContext().TraceID().String())
}

func TestModulePublishesOutsideOfThePermit(t *testing.T) {
	arrived := make(chan struct{}, 2)
	backend := newBackend(t, func(http.ResponseWriter, *http.Request) { arrived <- struct{}{} })
	source := newSource(orderNumbered(1).Message(), orderNumbered(2).Message())
	outcomes := &blockingPublisher{release: make(chan struct{}), published: make(chan *message.Message, 2)}
	run(t, newModule(t, backend.URL, 1, quietDeps(), dispatch.Bus{
		Subscriber:  source,
		Outcomes:    outcomes,
		Poison:      outcomes,
		Redelivered: func(*message.Message) bool { return false },
	}))

	// The only permit: the second attempt needs it while the outcome of the
	// first is not published.
	for range 2 {
		receive(t, arrived)
	}
	close(outcomes.release)

	for range 2 {
		receive(t, outcomes.published)
	}
	for _, msg := range source.msgs {
		receive(t, msg.Acked())
	}
}

func TestModuleStopFinishesAttemptsAndBeginsNone(t *testing.T) {
	arrived, answer := make(chan struct{}, 2), make(chan struct{})
	backend := newBackend(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		arrived <- struct{}{}
		<-answer
	})
	source := newSource(orderNumbered(1).Message(), orderNumbered(2).Message())
	outcomes := &blockingPublisher{release: make(chan struct{}), published: make(chan *message.Message, 2)}
	close(outcomes.release)
	module := newModule(t, backend.URL, 1, quietDeps(), dispatch.Bus{
		Subscriber:  source,
		Outcomes:    outcomes,
		Poison:      outcomes,
		Redelivered: func(*message.Message) bool { return false },
	})
	run(t, module)
	receive(t, arrived)

	module.Stop()

	// Either of the two may have come first.
	other := source.msgs[0]
	select {
	case <-source.msgs[0].Nacked():
		other = source.msgs[1]
	case <-source.msgs[1].Nacked():
	case <-time.After(soon):
		require.FailNow(t, "the order that waits for a permit is not given back")
	}
	close(answer)
	receive(t, other.Acked())
	require.Empty(t, arrived)
	require.Len(t, outcomes.published, 1)
}

func TestModuleNacksWhatTheStopInterrupts(t *testing.T) {
	arrived := make(chan struct{})
	backend := newBackend(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		close(arrived)
		<-r.Context().Done()
	})
	source := newSource(newOrder().Message())
	outcomes := &blockingPublisher{release: make(chan struct{}), published: make(chan *message.Message, 1)}
	close(outcomes.release)
	stop := run(t, newModule(t, backend.URL, 1, quietDeps(), dispatch.Bus{
		Subscriber:  source,
		Outcomes:    outcomes,
		Poison:      outcomes,
		Redelivered: func(*message.Message) bool { return false },
	}))
	receive(t, arrived)

	stop()

	receive(t, source.msgs[0].Nacked())
	require.Empty(t, outcomes.published, "an attempt without an outcome is neither an outcome nor poison")
}

func TestModuleLogsOutcomes(t *testing.T) {
	statuses := []int{http.StatusOK, http.StatusConflict, http.StatusBadGateway}
	var n atomic.Int64
	backend := newBackend(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(statuses[n.Add(1)-1]) })
	var log lockedBuffer
	deps := quietDeps()
	deps.TracerProvider = sdktrace.NewTracerProvider()
	deps.Logger = slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	g := startGateway(t, backend.URL, 1, deps)
	for i := range statuses {
		g.submit(t, orderNumbered(i).Message())
		g.nextOutcome(t)
	}

	var got []string
	for _, line := range log.lines(t) {
		if _, ours := line["status"]; !ours {
			continue // the broker logs as well
		}
		require.Equal(t, orderNumbered(len(got)).OrderID, line["order_id"])
		require.Len(t, line["trace_id"], 32)
		got = append(got, fmt.Sprint(line["level"], " ", line["msg"], " ", line["status"], " ", line["error"]))
	}
	require.Equal(t, []string{
		"DEBUG order saved 200 <nil>",
		"INFO order rejected 409 backend answered 409 Conflict",
		"DEBUG attempt failed 502 backend answered 502 Bad Gateway",
	}, got)
}

func TestModuleDoesNotCallForWhatTheBrokerHasTakenBack(t *testing.T) {
	var calls, asked atomic.Int64
	backend := newBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		calls.Add(1)
		w.WriteHeader(http.StatusOK)
	})
	broker, err := pubsub.Open(t.Context(), pubsub.DefaultConfig(), nil, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, broker.Close()) })
	outcomes, err := broker.Subscriber(contract.GroupIntake, 1).Subscribe(t.Context(), contract.TopicOutcome)
	require.NoError(t, err)
	run(t, newModule(t, backend.URL, 1, quietDeps(), dispatch.Bus{
		Subscriber: broker.Subscriber(contract.GroupDispatch, 2), Outcomes: broker.Publisher(), Poison: broker.Publisher(), System: broker.Name(),
		Redelivered: pubsub.Redelivered,
		Lost:        func(*message.Message) bool { return asked.Add(1) == 1 },
	}))
	require.NoError(t, broker.Publisher().Publish(contract.TopicSubmitted, orderNumbered(1).Message()))
	outcome, err := contract.DecodeOutcome(next(t, outcomes))
	require.NoError(t, err)
	require.Equal(t, contract.TypeSaved, outcome.Type)
	require.EqualValues(t, 1, calls.Load())
	require.EqualValues(t, 2, asked.Load(), "it came back, and was called for then")
}

func TestModuleShowsItsLimit(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	deps := quietDeps()
	deps.MeterProvider = sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	var got metricdata.ResourceMetrics
	var collected error
	backend := newBackend(t, func(_ http.ResponseWriter, r *http.Request) { collected = reader.Collect(r.Context(), &got) })
	g := startGateway(t, backend.URL, 7, deps)

	g.submit(t, newOrder().Message())
	g.nextOutcome(t)

	require.NoError(t, collected)
	gauges := map[string]int64{}
	for _, scope := range got.ScopeMetrics {
		for _, m := range scope.Metrics {
			if gauge, ok := m.Data.(metricdata.Gauge[int64]); ok {
				gauges[m.Name] = gauge.DataPoints[0].Value
			}
		}
	}
	require.Equal(t, map[string]int64{"sluice.dispatch.in_flight": 1, "sluice.dispatch.concurrency_limit": 7}, gauges)
}

func TestNewRefusesAFaultyConfiguration(t *testing.T) {
	_, err := dispatch.New(dispatch.Config{}, dispatch.BackendConfig{}, nil, dispatch.Bus{}, quietDeps())

	require.ErrorContains(t, err, "dispatch.concurrency: ")
	require.ErrorContains(t, err, "backend.timeout: ")
}

func receive[T any](t *testing.T, from <-chan T) {
	t.Helper()
	select {
	case <-from:
	case <-time.After(soon):
		require.FailNow(t, "waited in vain")
	}
}

// source is a subscriber that hands out its messages at once, and lets the test
// see what became of them.
type source struct {
	msgs []*message.Message
	stop chan struct{}
	once sync.Once
	done sync.WaitGroup
}

func newSource(msgs ...*message.Message) *source {
	return &source{msgs: msgs, stop: make(chan struct{})}
}

func (s *source) Subscribe(ctx context.Context, _ string) (<-chan *message.Message, error) {
	out := make(chan *message.Message, len(s.msgs))
	for _, msg := range s.msgs {
		msg.SetContext(ctx)
		out <- msg
	}
	s.done.Go(func() {
		select {
		case <-s.stop:
		case <-ctx.Done():
		}
		close(out)
	})
	return out, nil
}

func (s *source) Close() error {
	s.once.Do(func() { close(s.stop) })
	s.done.Wait()
	return nil
}

// blockingPublisher holds every message until it is released.
type blockingPublisher struct {
	release   chan struct{}
	published chan *message.Message
}

func (p *blockingPublisher) Publish(_ string, msgs ...*message.Message) error {
	select {
	case <-p.release:
	case <-time.After(soon):
		return errors.New("was not released")
	}
	for _, msg := range msgs {
		p.published <- msg
	}
	return nil
}

func (p *blockingPublisher) Close() error { return nil }

type lockedBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(p)
}

func (b *lockedBuffer) lines(t *testing.T) []map[string]any {
	t.Helper()
	b.mu.Lock()
	defer b.mu.Unlock()
	var lines []map[string]any
	for decoder := json.NewDecoder(bytes.NewReader(b.buffer.Bytes())); decoder.More(); {
		var line map[string]any
		require.NoError(t, decoder.Decode(&line))
		lines = append(lines, line)
	}
	return lines
}
