// Package intake is the client's door: it takes orders in, keeps them, and
// tells what became of them.
//
// It owns the orders table, which is inbox, outbox, status, retry schedule and
// list of the dead in one. An order is committed before its client is answered
// 202. From there on the relay publishes whatever is due, dispatch (another
// module, maybe another process) tries to save it, and the projection takes
// the outcome over into the order.
//
// Intake does not call the backend, except through Deps.Direct for
// POST /orders/sync, and it knows no other module: only package contract.
package intake

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sync/semaphore"

	"sluice/modules/contract"
	"sluice/platform/httpserver"
	"sluice/platform/middleware"
)

// scope names the module's tracer and meter.
const scope = "sluice/modules/intake"

// Bus is the message broker as intake uses it.
type Bus struct {
	Publisher   message.Publisher  // of orders, and of news of dead ones
	Subscriber  message.Subscriber // of outcomes, with intake's consumer group
	Poison      message.Publisher  // of outcomes that cannot be read
	Window      int                // most orders published and unfinished, 0 = no limit
	Carrier     string             // names the broker and the place in it that has the messages
	System      string             // the broker's name in traces
	Redelivered func(*message.Message) bool
}

// Caller makes one attempt at saving an order. It returns an error only when
// ctx ended, and then nothing is known of the order.
type Caller interface {
	Attempt(ctx context.Context, order contract.Submitted) (contract.Outcome, error)
}

// Deps is what intake needs from outside.
type Deps struct {
	Logger         *slog.Logger
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
	Propagator     propagation.TextMapPropagator
	Bus            Bus
	// Direct calls the backend for POST /orders/sync.
	Direct Caller
	// AttemptTimeout is the longest that a call of the backend takes, in this
	// process or another.
	AttemptTimeout time.Duration
	// Silence is how long dispatch may take over an order that it has from the
	// broker: for the attempts that wait for their permits before it, for its
	// own, and for the broker to see that a process is dead.
	Silence time.Duration
}

// Module is intake, open and ready to be wired. Its methods are safe for
// concurrent use.
type Module struct {
	cfg       Config
	retry     RetryConfig
	retention time.Duration
	deps      Deps
	logger    *slog.Logger

	schema  *schema
	number  pointer
	openAPI *httpserver.Static // GET /openapi.yaml
	docs    *httpserver.Static // GET /docs
	store   store
	writer  *writer
	relay   *relay
	sweeper *sweeper
	waiters waiters
	backlog backlogLimit
	stats   *stats
	outlook *forecast
	bodies  *semaphore.Weighted // bytes of large bodies in memory
	checks  *semaphore.Weighted // large bodies that are being checked
	direct  *semaphore.Weighted // POST /orders/sync under way, nil without a limit
	batches *semaphore.Weighted // POST /orders/batch under way
	lists   *semaphore.Weighted // GET /orders that are being read
}

// Open opens the store, brings it up to date, and makes every order due that
// an earlier process left unfinished, where no other process can be busy with
// it. A database server that is not up yet is waited for until ctx ends. It
// publishes nothing: see Run.
func Open(ctx context.Context, cfg Config, storeCfg StoreConfig, retry RetryConfig, deps Deps) (*Module, error) {
	s, err := openStore(ctx, storeCfg, deps.Logger)
	if err != nil {
		return nil, err
	}
	m, err := newModule(ctx, cfg, storeCfg, retry, deps, s)
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	return m, nil
}

func newModule(ctx context.Context, cfg Config, storeCfg StoreConfig, retry RetryConfig, deps Deps, s store) (*Module, error) {
	m := &Module{
		cfg: cfg, retry: retry, retention: storeCfg.Retention, deps: deps, logger: deps.Logger, store: s,
		bodies: semaphore.NewWeighted(max(maxBodies, int64(cfg.MaxBody))),
		checks: semaphore.NewWeighted(maxChecks), batches: semaphore.NewWeighted(maxBatches),
		lists: semaphore.NewWeighted(maxLists),
	}
	m.backlog.limit, m.backlog.backlog = int64(cfg.MaxBacklog), func() int64 { return backlogOf(s.counts()) }
	if cfg.SyncLimit > 0 {
		m.direct = semaphore.NewWeighted(int64(cfg.SyncLimit))
	}
	var err error
	if m.schema, err = compileSchema(cfg.Schema); err != nil {
		return nil, fmt.Errorf("intake.schema: %w", err)
	}
	if m.number, err = parsePointer(cfg.OrderNumberPointer); err != nil {
		return nil, fmt.Errorf("intake.order_number_pointer: %w", err)
	}
	if m.openAPI, m.docs, err = openAPI(m.schema, cfg.OrderNumberPointer); err != nil {
		return nil, fmt.Errorf("describe the API: %w", err)
	}
	if m.stats, err = newStats(deps.MeterProvider.Meter(scope), s); err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	m.outlook = newForecast(s.counts)
	m.writer = newWriter(s, m.committed)
	m.relay = newRelay(s, m.writer, m.stats, deps)
	m.sweeper = newSweeper(s, m.relay, m.stats, deps)
	n, err := s.recover(ctx, now())
	if err != nil {
		return nil, errors.Join(err, m.stats.close())
	}
	if n > 0 {
		m.logger.Info("took over orders of clients that were waiting for the backend when the last process ended", "orders", n)
	}
	return m, nil
}

// Register adds the handler of outcomes to the router. Register everything
// that consumes before Run, which publishes.
func (m *Module) Register(router *message.Router) error {
	metrics, err := middleware.Metrics(m.deps.MeterProvider.Meter(scope), "intake")
	if err != nil {
		return err
	}
	bus := m.deps.Bus
	handler := middleware.Chain(
		func(msg *message.Message) ([]*message.Message, error) { return nil, m.project(msg) },
		middleware.Roomy,
		middleware.Recover(m.logger),
		middleware.Tracing(m.deps.TracerProvider, m.deps.Propagator, bus.System, contract.GroupIntake, bus.Redelivered),
		metrics,
		middleware.Poison(bus.Poison, contract.TopicPoison, func(err error) bool { return errors.Is(err, contract.ErrUndecodable) }),
	)
	router.AddConsumerHandler("intake", contract.TopicOutcome, bus.Subscriber, func(msg *message.Message) error {
		_, err := handler(msg)
		return err
	})
	return nil
}

// Run publishes what is due and removes what has been finished for long. It
// blocks until ctx ends; what was published by then is marked as published.
func (m *Module) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	wg.Go(func() { m.relay.run(ctx) })
	m.relay.holding.Go(m.relay.hold)
	wg.Go(func() { m.sweeper.run(ctx) })
	wg.Go(func() { m.retain(ctx) })
	wg.Go(func() { m.observe(ctx) })
	wg.Go(func() { m.follow(ctx) })
	<-ctx.Done()
	return nil
}

const (
	purgeEvery = time.Minute
	purgeBatch = 500
)

// retain removes finished orders whose time is up, in small batches, so that
// no new order has to wait long behind one.
func (m *Module) retain(ctx context.Context) {
	every := min(purgeEvery, m.retention)
	for ctx.Err() == nil {
		n, err := m.store.purge(ctx, now().Add(-m.retention), purgeBatch)
		switch {
		case ctx.Err() != nil:
		case err != nil:
			m.logger.Error("cannot remove old orders; tried again later", "error", err)
			wait(ctx, every, nil)
		case n < purgeBatch:
			wait(ctx, every, nil)
		}
	}
}

// observe keeps what clients are told of waiting times up to date.
func (m *Module) observe(ctx context.Context) {
	var seeding sync.WaitGroup
	defer seeding.Wait()
	seeding.Go(func() { m.seed(ctx) })
	for ctx.Err() == nil {
		m.outlook.look(time.Now())
		wait(ctx, tallyIdle, nil)
	}
}

// seed lets clients know the places of orders that waited at the start already.
func (m *Module) seed(ctx context.Context) {
	for pause := time.Second; ctx.Err() == nil; pause = min(2*pause, seedPauseMax) {
		err := m.outlook.seed(ctx, m.store)
		if err == nil {
			return
		}
		if ctx.Err() == nil {
			m.logger.Warn("cannot find out where the waiting orders stand; tried again later", "error", err)
		}
		wait(ctx, pause, nil)
	}
}

// seedPauseMax is for a backlog that takes too long to look through.
const seedPauseMax = 10 * time.Minute

// Check reports whether orders can be stored.
func (m *Module) Check(ctx context.Context) error { return m.store.ping(ctx) }

// Stats returns the state of the backlog.
func (m *Module) Stats(ctx context.Context) (Stats, error) {
	oldest, err := oldestAge(ctx, m.store)
	if err != nil {
		return Stats{}, err
	}
	t := time.Now()
	return Stats{
		Backlog:       backlogOf(m.store.counts()),
		OldestWaiting: oldest,
		AcceptedRate:  m.stats.acceptedRate.perSecond(t),
		SavedRate:     m.stats.savedRate.perSecond(t),
	}, nil
}

// AwaitOutcomes returns when the outcomes that this process has published have
// been handed out to intake, which may be in another process; then it gives up
// after a while, and they are taken over there, or here after the next start.
// Call it when no backend call is in flight any more, and before the
// subscription of outcomes is drained.
func (m *Module) AwaitOutcomes(ctx context.Context) error { return m.sweeper.await(ctx) }

// Close waits for the last writes and closes the store. Call it when Run has
// returned, the router is closed and no request is under way.
func (m *Module) Close() error {
	m.writer.close()
	return errors.Join(m.relay.close(), m.stats.close(), m.store.close())
}

// Routes adds the client's endpoints. Behind httpserver.Admission, orders belong
// to the client that sent them, and others do not find them.
func (m *Module) Routes(mux *http.ServeMux) {
	m.handle(mux, "POST /orders", httpserver.RateLimited(m.postOrder))
	m.handle(mux, "POST /orders/sync", httpserver.RateLimited(m.postOrderSync))
	m.handle(mux, "POST /orders/batch", m.postBatch)
	m.handle(mux, "GET /orders", m.listOrders)
	m.handle(mux, "GET /orders/{id}", m.getOrder)
	m.handle(mux, "GET /orders/{id}/attempts", m.getAttempts)
	m.handle(mux, "GET /openapi.yaml", m.openAPI.ServeHTTP)
	m.handle(mux, "GET /docs", m.docs.ServeHTTP)
	mux.Handle("GET /orders/{id}/events", m.events("GET /orders/{id}/events"))
}

// AdminRoutes adds the operator's endpoints.
func (m *Module) AdminRoutes(mux *http.ServeMux) {
	m.handle(mux, "POST /admin/orders/{id}/replay", m.replayOrder)
}
