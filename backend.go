package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sluice/e2e/backend"
	"sluice/modules/intake"
)

// backendStopTimeout is how long a stopping stand-in works off what it has begun; the rest is cut.
const backendStopTimeout = 10 * time.Second

// backendCommand is `sluice backend`, the Backend API stand-in.
func backendCommand() *cobra.Command {
	addr, cfg := ":9090", backend.DefaultConfig()
	var faults []error
	cmd := &cobra.Command{
		Use:   "backend",
		Short: "Run the Backend API stand-in: slow, crowded or failing, as told",
		Long: "Backend accepts orders at POST /orders and counts them at GET /stats. GET /orders/{orderNumber} shows an order,\n" +
			"GET /control the knobs below, and PUT /control changes any of them while it runs:\n\n" +
			"  curl -X PUT -d '{\"latency\": \"200ms\", \"failNext\": 2}' localhost:9090/control\n\n" +
			"SIGTERM and SIGINT stop it gracefully; it prints its final counts on standard output.",
		// Wrong values are found here and not in RunE, so that they are told as faults of the command line.
		Args: func(cmd *cobra.Command, args []string) error {
			return errors.Join(append(faults, cobra.NoArgs(cmd, args), cfg.Validate())...)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			logger := slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil))
			return runBackend(cmd.Context(), addr, cfg, logger, cmd.OutOrStdout())
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&addr, "addr", addr, "listen on this `address`; port 0 picks a free one")
	backendFlags(flags, &cfg)
	flags.VisitAll(func(f *pflag.Flag) { f.Value = lenientValue{f.Value, f.Name, &faults} })
	return cmd
}

func backendFlags(flags *pflag.FlagSet, cfg *backend.Config) {
	flags.DurationVar(&cfg.Latency, "latency", cfg.Latency, "`time` that an order takes")
	flags.DurationVar(&cfg.Jitter, "jitter", cfg.Jitter, "spread latency evenly by ± this `time`")
	flags.StringVar(&cfg.Service, "service", cfg.Service, "service times are `constant` or exponential (with latency as their mean)")
	flags.StringVar(&cfg.Cancellation, "cancellation", cfg.Cancellation, "work whose client has left goes on (`ignored`) or is given up (honoured)")
	flags.IntVar(&cfg.Capacity, "capacity", cfg.Capacity, "number of workers, 0 = no limit")
	flags.IntVar(&cfg.Queue, "queue", cfg.Queue, "most requests that wait for a worker, beyond it 503; 0 = no limit")
	flags.Float64Var(&cfg.Contention, "contention", cfg.Contention, "with n requests in service each takes 1 + contention·n·max(0, n-16) times as long")
	flags.Float64Var(&cfg.FailRate, "fail-rate", cfg.FailRate, "share of requests that fail, 0 to 1")
	flags.IntVar(&cfg.FailStatus, "fail-status", cfg.FailStatus, "`status` of a failure")
	flags.Var((*pauseValue)(&cfg.RetryAfter), "retry-after", "send this Retry-After with failures, a duration or seconds; 0 = none")
	flags.StringVar(&cfg.RejectNumberSuffix, "reject-number-suffix", cfg.RejectNumberSuffix, "reject orders whose number ends so")
	flags.DurationVar(&cfg.StallFrom, "stall-from", cfg.StallFrom, "finish nothing from this `time` after the start")
	flags.DurationVar(&cfg.StallFor, "stall-for", cfg.StallFor, "finish nothing for this `time`")
	flags.DurationVar(&cfg.DownFrom, "down-from", cfg.DownFrom, "cut connections from this `time` after the start")
	flags.DurationVar(&cfg.DownFor, "down-for", cfg.DownFor, "cut connections for this `time`")
}

// runBackend serves until ctx ends, and then writes the final counts to stdout as one line of JSON.
func runBackend(ctx context.Context, addr string, cfg backend.Config, logger *slog.Logger, stdout io.Writer) error {
	paceCollector(intake.DriverMemory) // it keeps what it was sent, too
	b, err := backend.New(cfg)
	if err != nil {
		return err
	}
	defer b.Close()
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return fmt.Errorf("listen on %s: %w", addr, err)
	}
	server := &http.Server{
		Handler:           b,
		ReadHeaderTimeout: 10 * time.Second,
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	logger.Info("backend is listening", "addr", listener.Addr().String())

	select {
	case err := <-served:
		return fmt.Errorf("serve on %s: %w", addr, err)
	case <-ctx.Done():
	}
	stopBackend(context.WithoutCancel(ctx), server, b, logger)
	if err := <-served; !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve on %s: %w", addr, err)
	}
	if err := json.NewEncoder(stdout).Encode(b.Stats()); err != nil {
		return fmt.Errorf("print the counts: %w", err)
	}
	return nil
}

func stopBackend(ctx context.Context, server *http.Server, b *backend.Backend, logger *slog.Logger) {
	ctx, cancel := context.WithTimeout(ctx, backendStopTimeout)
	defer cancel()
	if err := server.Shutdown(ctx); err != nil {
		logger.Warn("cutting requests that are not done", "in_flight", b.Stats().InFlight, "error", err)
		b.Close()
		_ = server.Close() // whatever it says, the process ends now
	}
}

// lenientValue notes a value that cannot be read instead of ending the parsing, so that all faults are told at once.
type lenientValue struct {
	pflag.Value
	flag   string
	faults *[]error
}

// Set never fails; see lenientValue.
func (v lenientValue) Set(text string) error {
	if err := v.Value.Set(text); err != nil {
		*v.faults = append(*v.faults, fmt.Errorf("%s: %w", v.flag, err))
	}
	return nil
}

// pauseValue is a flag that takes a duration or a number of seconds.
type pauseValue time.Duration

// String returns the pause as a duration.
func (v *pauseValue) String() string { return time.Duration(*v).String() }

// Type names the kind of value in the help.
func (v *pauseValue) Type() string { return "duration" }

// Set reads the pause.
func (v *pauseValue) Set(text string) error {
	pause, err := backend.ParsePause(text)
	if err != nil {
		return err
	}
	*v = pauseValue(pause)
	return nil
}
