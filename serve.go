package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/url"
	"os"
	"runtime/debug"
	"slices"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/spf13/cobra"

	"sluice/config"
	"sluice/modules/contract"
	"sluice/modules/dispatch"
	"sluice/modules/intake"
	"sluice/platform/httpserver"
	"sluice/platform/middleware"
	"sluice/platform/pubsub"
	"sluice/platform/telemetry"
)

func serveCommand() *cobra.Command {
	var file string
	modules := []string{"intake", "dispatch"}
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "Run the gateway",
		Long: "Serve runs the gateway: the clients' API, the relay to the broker, and the calls of the backend.\n" +
			"SIGTERM and SIGINT stop it gracefully: no call of the backend is cut, repeated or lost. A second signal stops it at once.",
		Args: cobra.NoArgs,
	}
	cmd.Flags().StringVar(&file, "config", "", "YAML `file` with settings; see `sluice config --keys`")
	cmd.Flags().StringSliceVar(&modules, "modules", modules, "modules to run in this process")
	config.AddFlags(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := loadConfig(cmd, file)
		if err != nil {
			return err
		}
		if err := cfg.CheckModules(modules); err != nil {
			return err
		}
		return serve(cmd.Context(), cfg, modules, telemetry.NewLogger(cfg.Log, cmd.ErrOrStderr()), telemetry.Start, nil)
	}
	return cmd
}

// topology is who gets which messages, on brokers that keep them: what one
// module publishes waits for the other, whichever starts first.
var topology = pubsub.Topology{
	contract.TopicSubmitted: {contract.GroupDispatch},
	contract.TopicOutcome:   {contract.GroupIntake},
	contract.TopicPoison:    {groupPoison},
}

// groupPoison is the queue of messages that nobody could read, for an operator.
const groupPoison = "poison"

// ordersInFlight is how many messages dispatch takes from the broker: one for
// each permit, and a margin of those whose attempt is over and whose outcome is
// being stored. No permit is then idle while an outcome is committed.
func ordersInFlight(concurrency int) int { return concurrency + max(64, concurrency/2) }

// window is how many orders the relay keeps published and unfinished where the
// broker sets a limit: no more than that, and no more than keeps dispatch busy
// until the relay comes round again. Those in Go channels are in memory, which
// the garbage collector looks through every time.
func window(limit, inFlight int) int {
	if limit == 0 {
		return 0
	}
	return min(limit, max(1024, 4*inFlight))
}

// outcomesInFlight is how many outcomes are taken over at once. They share
// transactions, so more of them make larger groups, not more work; but each one
// that a broker outside of the process hands out costs it a channel or a lease.
func outcomesInFlight(durable bool) int {
	if durable {
		return 256
	}
	return 1024
}

// silence is how long dispatch may take over an order that it has from the
// broker. With few permits many rounds of attempts come before it: those of the
// messages that are in flight, and of a quarter more that are at hand. Twenty
// seconds are for the broker, to see that a process is dead.
func silence(concurrency int, attempt time.Duration) time.Duration {
	rounds := (ordersInFlight(concurrency)*5/4+concurrency-1)/concurrency + 1
	return time.Duration(rounds)*attempt + 20*time.Second
}

// openPages are what clients read without an API key: the documentation.
var openPages = []string{"/problems/", "/openapi.yaml", "/docs", "/docs/"}

// adminStopTimeout bounds what a stopping process waits for operators, who may
// be in the middle of a long profile.
const adminStopTimeout = time.Second

// telemetryFlushTimeout bounds what a stopping process waits for a collector.
const telemetryFlushTimeout = 5 * time.Second

// startTelemetry is telemetry.Start, or what a test has in its place.
type startTelemetry func(ctx context.Context, version string, logger *slog.Logger) (*telemetry.Telemetry, error)

// serve wires the gateway's modules and runs them until ctx ends, then stops:
// not ready, no new orders, calls in flight finish, their outcomes are stored,
// all is closed. ready, if not nil, is called with both addresses once the
// gateway does its work; without intake the public one is empty.
func serve(ctx context.Context, cfg config.Config, modules []string, logger *slog.Logger, start startTelemetry, ready func(public, admin string)) (err error) {
	withIntake, withDispatch := slices.Contains(modules, config.ModuleIntake), slices.Contains(modules, config.ModuleDispatch)
	paceCollector(cfg.Store.Driver)
	// What is opened is closed in reverse order, whatever happened.
	var closers closers
	started := false
	stopping := func() (context.Context, context.CancelFunc) {
		return context.WithTimeout(context.WithoutCancel(ctx), cfg.HTTP.ShutdownTimeout)
	}
	defer func() {
		if err != nil && ctx.Err() != nil && !started {
			// Asked to stop before it was up: what broke off is no failure.
			logger.Info("stopping before the start was complete", "error", err)
			err = nil
		}
		if err = errors.Join(err, closers.close(stopping)); err == nil {
			logger.Info("stopped")
		}
	}()

	tel, err := start(ctx, buildVersion(), logger)
	if err != nil {
		return fmt.Errorf("start telemetry: %w", err)
	}
	// A collector that does not take the rest costs the rest and nothing more:
	// neither the time of those who stop us, nor the exit code.
	closers.add("telemetry", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, telemetryFlushTimeout)
		defer cancel()
		if err := tel.Shutdown(ctx); err != nil {
			logger.Warn("the last traces or metrics are lost", "error", err)
		}
		return nil
	})

	health := httpserver.NewHealth()
	mux, adminMux := http.NewServeMux(), httpserver.Admin(health, tel.Metrics, logger)
	// The types of problems are relative: they lead to where the problem came from.
	problems, err := httpserver.ProblemPages(intake.ProblemTypes())
	if err != nil {
		return err
	}
	mux.Handle("GET /problems/{name}", problems)
	adminMux.Handle("GET /problems/{name}", problems)
	// The admin address answers from here on ("starting"), and longest.
	admin, err := httpserver.Listen("admin", cfg.HTTP.AdminAddr, cfg.HTTP, httpserver.Handler(adminMux, logger), logger)
	if err != nil {
		return err
	}
	closers.add("admin server", func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, adminStopTimeout)
		defer cancel()
		if err := admin.Shutdown(ctx); err != nil {
			logger.Warn("an operator's request was cut off", "error", err)
		}
		return nil
	})
	failed := make(chan error, 4)
	background := func(run func() error) (wait func()) {
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := run(); err != nil {
				failed <- err
			}
		}()
		return func() { <-done }
	}
	background(admin.Serve)

	bus, err := pubsub.Open(ctx, cfg.PubSub, topology, logger)
	if err != nil {
		return fmt.Errorf("open broker %s: %w", cfg.PubSub.Backend, err)
	}
	closers.add("broker", func(context.Context) error { return bus.Close() })
	// Intake does its work without the broker for as long as it takes.
	health.Add("broker", !withIntake, bus.Health)
	traced := func(p message.Publisher) message.Publisher {
		return middleware.TracingPublisher(p, tel.TracerProvider, tel.Propagator, bus.System())
	}
	router, err := message.NewRouter(message.RouterConfig{CloseTimeout: routerCloseTimeout}, pubsub.Logger(logger))
	if err != nil {
		return fmt.Errorf("set up the router: %w", err)
	}

	// Both modules call the backend: dispatch for what is queued, intake for
	// POST /orders/sync.
	client, err := dispatch.NewClient(cfg.Backend, cfg.Dispatch.Config, dispatch.Deps{
		Logger: logger, TracerProvider: tel.TracerProvider, MeterProvider: tel.MeterProvider, Propagator: tel.Propagator})
	if err != nil {
		return fmt.Errorf("set up the backend client: %w", err)
	}
	closers.add("backend client", func(context.Context) error { client.Close(); return nil })

	var in *intake.Module
	outcomes := bus.Subscriber(contract.GroupIntake, outcomesInFlight(bus.Durable()))
	if withIntake {
		if in, err = intake.Open(ctx, cfg.Intake, cfg.Store, cfg.Dispatch.RetryConfig, intake.Deps{
			Logger: logger, TracerProvider: tel.TracerProvider, MeterProvider: tel.MeterProvider, Propagator: tel.Propagator,
			Direct: client, AttemptTimeout: cfg.Backend.Timeout, Silence: silence(cfg.Dispatch.Concurrency, cfg.Backend.Timeout),
			Bus: intake.Bus{Publisher: traced(bus.Publisher()), Subscriber: outcomes, Poison: traced(bus.Publisher()),
				Window: window(bus.Window(), ordersInFlight(cfg.Dispatch.Concurrency)), Carrier: bus.Place(), System: bus.System(), Redelivered: pubsub.Redelivered},
		}); err != nil {
			return err
		}
		closers.add("store", func(context.Context) error { return in.Close() })
		health.Add("storage", true, in.Check)
		in.Routes(mux)
		in.AdminRoutes(adminMux)
		if err := in.Register(router); err != nil {
			return fmt.Errorf("set up intake: %w", err)
		}
	}

	var out *dispatch.Module
	orders := bus.Subscriber(contract.GroupDispatch, ordersInFlight(cfg.Dispatch.Concurrency))
	if withDispatch {
		if out, err = dispatch.New(cfg.Dispatch.Config, cfg.Backend, client, dispatch.Bus{
			Subscriber: orders, Outcomes: traced(bus.Confirmed()), Poison: traced(bus.Publisher()), System: bus.System(), Redelivered: pubsub.Redelivered, Lost: pubsub.Lost,
		}, dispatch.Deps{Logger: logger, TracerProvider: tel.TracerProvider, MeterProvider: tel.MeterProvider, Propagator: tel.Propagator}); err != nil {
			return fmt.Errorf("set up dispatch: %w", err)
		}
		out.Register(router)
	}
	if !bus.Durable() {
		// A broker that keeps nothing would refuse poison that nobody takes.
		router.AddConsumerHandler("poison", contract.TopicPoison, bus.Subscriber(groupPoison, 1), logPoison(logger))
	}
	adminMux.HandleFunc("GET /admin/status", statusHandler(in, out, bus))

	var public *httpserver.Server
	publicAddr := ""
	if withIntake {
		admitted, err := httpserver.Admission(cfg.HTTP, tel.MeterProvider.Meter("sluice/platform/httpserver"), httpserver.Pages(openPages...), httpserver.Handler(mux, logger))
		if err != nil {
			return fmt.Errorf("set up the public server: %w", err)
		}
		if public, err = httpserver.Listen("public", cfg.HTTP.Addr, cfg.HTTP, admitted, logger); err != nil {
			return err
		}
		publicAddr = public.Addr()
		closers.add("public server", func(ctx context.Context) error {
			if err := public.Shutdown(ctx); err != nil {
				logger.Warn("clients that were too slow were cut off; what they had been promised is kept", "error", err)
			}
			return nil
		})
	}

	// From here on things run. Consumers come first, then the relay, whose
	// messages they take, then the clients.
	//
	// The router gets a context that never ends: it would cancel the messages
	// in flight and hand them out again. Drain comes before its Close.
	routerDone := background(func() error { return router.Run(context.WithoutCancel(ctx)) })
	closers.add("router", func(context.Context) error { defer routerDone(); return router.Close() })
	closers.add("outcomes in flight", outcomes.Drain)
	select {
	case <-router.Running():
	case err := <-failed:
		return fmt.Errorf("start: %w", err)
	}

	stopRelay := func(context.Context) {}
	if withIntake {
		relayCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
		relayDone := make(chan struct{})
		ended := background(func() error { defer close(relayDone); return in.Run(relayCtx) })
		closers.add("relay", func(context.Context) error { ended(); return nil })
		stopRelay = func(ctx context.Context) {
			cancel()
			// A store or a broker that hangs must not take the time in which
			// calls could end.
			patience := time.NewTimer(cfg.HTTP.ShutdownTimeout / 3)
			defer patience.Stop()
			select {
			case <-relayDone:
			case <-patience.C:
			case <-ctx.Done():
			}
		}
		background(public.Serve)
	}
	closers.add("backend calls in flight", func(ctx context.Context) error {
		// At the same time as the public server stops: a client that does not
		// send or read must not take the time in which calls could end.
		clients := make(chan struct{})
		go func() {
			defer close(clients)
			if withIntake {
				_ = public.Shutdown(ctx) // its own closer says what came of it
			}
		}()
		stopRelay(ctx)
		if withDispatch {
			out.Stop() // or the drain would wait for those as well that wait for a permit
		}
		err := orders.Drain(ctx)
		if withIntake && withDispatch {
			// Should the next start be with another broker, what is left in
			// this one would be called again.
			if err := in.AwaitOutcomes(ctx); err != nil {
				logger.Warn("outcomes may be left with the broker; they are taken over at the next start with it", "error", err)
			}
		}
		<-clients
		return err
	})

	health.SetReady()
	started = true
	logger.Info("ready", "version", buildVersion(), "modules", modules, "addr", publicAddr, "admin_addr", admin.Addr(), "broker", bus.Name(),
		"store", cfg.Store.Driver, "backend", redacted(cfg.Backend.URL), "concurrency", cfg.Dispatch.Concurrency,
		"clients", cfg.HTTP.APIKeys.Names())
	if ready != nil {
		ready(publicAddr, admin.Addr())
	}

	select {
	case <-ctx.Done():
	case err = <-failed:
	}
	health.SetDraining()
	logger.Info("stopping: no new orders, backend calls in flight finish", "in_flight", orders.InFlight(), "at_most", cfg.HTTP.ShutdownTimeout)
	return err
}

// routerCloseTimeout bounds Watermill's own close, which has nothing left to
// wait for after the drains.
const routerCloseTimeout = 5 * time.Second

// logPoison is all that can be done for a message that nobody can read where
// there is no queue to keep it in.
func logPoison(logger *slog.Logger) message.NoPublishHandlerFunc {
	return func(msg *message.Message) error {
		logger.Error("a message could not be read and is dropped", "message_id", msg.UUID, "metadata", msg.Metadata)
		return nil
	}
}

// statusHandler is GET /admin/status: what an operator asks first. What belongs
// to a module that is not in this process is null or 0.
func statusHandler(in *intake.Module, out *dispatch.Module, bus *pubsub.PubSub) http.HandlerFunc {
	type rates struct {
		Accepted float64 `json:"accepted"`
		Saved    float64 `json:"saved"`
	}
	type broker struct {
		Name  string `json:"name"`
		State string `json:"state"`
	}
	type state struct {
		State string `json:"state"`
	}
	type status struct {
		Backlog              *int64   `json:"backlog"`
		OldestWaitingSeconds *float64 `json:"oldestWaitingSeconds"`
		InFlight             int      `json:"inFlight"`
		Limit                int      `json:"limit"`
		Rates                *rates   `json:"rates"`
		Broker               broker   `json:"broker"`
		Dispatch             state    `json:"dispatch"`
	}
	return func(w http.ResponseWriter, r *http.Request) {
		s := status{Broker: broker{bus.Name(), "ok"}, Dispatch: state{"elsewhere"}}
		if in != nil {
			stats, err := in.Stats(r.Context())
			if err != nil {
				httpserver.WriteProblem(w, r, httpserver.Problem{Type: "storage-unavailable", Title: "The store cannot be read",
					Status: http.StatusServiceUnavailable, Detail: err.Error()})
				return
			}
			oldest := stats.OldestWaiting.Seconds()
			s.Backlog, s.OldestWaitingSeconds, s.Rates = &stats.Backlog, &oldest, &rates{stats.AcceptedRate, stats.SavedRate}
		}
		if err := bus.Health(r.Context()); err != nil {
			s.Broker.State = "unavailable: " + err.Error()
		}
		if out != nil {
			d := out.Stats()
			s.InFlight, s.Limit, s.Dispatch = d.InFlight, d.Limit, state{"running"}
		}
		httpserver.WriteJSON(w, r, http.StatusOK, s)
	}
}

// redacted hides the password of a URL.
func redacted(text string) string {
	u, err := url.Parse(text)
	if err != nil {
		return "<unreadable>"
	}
	return u.Redacted()
}

// paceCollector lets garbage pile up to four times what is in use, instead of
// as much as is in use: little is, and every order is much garbage, so that the
// collector would run many times a second for a few MiB. With more in use it
// becomes thriftier (collectorPace), most of all near 512 MiB. GOGC and GOMEMLIMIT, if set, count and not this.
//
// The store in memory is in use for good, however large, and gets no limit.
func paceCollector(driver string) {
	if os.Getenv("GOGC") != "" || os.Getenv("GOMEMLIMIT") != "" {
		return
	}
	collectorPace()
	if driver != intake.DriverMemory {
		debug.SetMemoryLimit(512 << 20)
	}
}

// loadConfig reads the configuration of a command that has config.AddFlags.
func loadConfig(cmd *cobra.Command, file string) (config.Config, error) {
	return config.Load(file, os.Environ(), config.FromFlags(cmd.Flags()))
}

// closers closes what was opened, last first, all of it.
type closers struct {
	names []string
	funcs []func(context.Context) error
}

func (c *closers) add(name string, f func(context.Context) error) {
	c.names, c.funcs = append(c.names, name), append(c.funcs, f)
}

// close gives all closers together the time of one context, and joins their
// errors.
func (c *closers) close(stopping func() (context.Context, context.CancelFunc)) error {
	ctx, cancel := stopping()
	defer cancel()
	var errs []error
	for i := range slices.Backward(c.funcs) {
		if err := c.funcs[i](ctx); err != nil {
			errs = append(errs, fmt.Errorf("stop %s: %w", c.names[i], err))
		}
	}
	return errors.Join(errs...)
}
