// Package telemetry sets up traces, metrics and logs for one process:
// OpenTelemetry by the standard OTEL_* variables, Prometheus text of the
// process's own registry, and log/slog.
//
// Providers are handed out, not set: nothing here is a global that another part
// could pick up by accident, and two instances run in one test. The exception is
// where OpenTelemetry reports its own troubles, which has no other door. Tracing
// and measuring themselves happen where the work is done.
package telemetry

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"regexp"
	"strings"

	"github.com/go-logr/logr"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"go.opentelemetry.io/contrib/exporters/autoexport"
	"go.opentelemetry.io/contrib/instrumentation/runtime"
	"go.opentelemetry.io/otel"
	prometheusexporter "go.opentelemetry.io/otel/exporters/prometheus"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

var runtimeMetrics = regexp.MustCompile(`^/(cpu/classes/gc/(mark/idle|total):cpu-seconds|memory/classes/(total|heap/released):bytes)$`)

// Telemetry is what the parts of a process are given to trace and measure with.
// It is safe for concurrent use.
type Telemetry struct {
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
	Propagator     propagation.TextMapPropagator // W3C trace context and baggage
	Metrics        http.Handler                  // all metrics as Prometheus text

	shutdowns []func(context.Context) error // in the order to call them
}

// Start sets telemetry up for the given version of Sluice. It does not wait for
// a collector; what it starts ends with Shutdown.
//
// Traces are exported if OTEL_TRACES_EXPORTER, OTEL_EXPORTER_OTLP_ENDPOINT or
// OTEL_EXPORTER_OTLP_TRACES_ENDPOINT says so, metrics are pushed if
// OTEL_METRICS_EXPORTER, OTEL_EXPORTER_OTLP_ENDPOINT or
// OTEL_EXPORTER_OTLP_METRICS_ENDPOINT does, and neither with
// OTEL_SDK_DISABLED=true. Without a trace exporter no spans are made, but a
// trace that comes in is handed on to the backend, and one begins where none
// came; that costs next to nothing. A variable with a
// value that autoexport does not know is an error that names it.
//
// The troubles of OpenTelemetry itself (a collector that does not answer) are
// logged as warnings and harm nothing else. Where they go is set for the whole
// process, by the last Start.
func Start(ctx context.Context, version string, logger *slog.Logger) (_ *Telemetry, err error) {
	otel.SetErrorHandler(otel.ErrorHandlerFunc(func(err error) {
		logger.Warn("trouble with telemetry", "error", err)
	}))
	otel.SetLogger(logr.FromSlogHandler(logger.Handler()))

	t := &Telemetry{Propagator: propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, t.Shutdown(ctx))
		}
	}()

	// The environment comes last and wins. What is wrong in it is left out, as
	// the OpenTelemetry specification wants it.
	res, err := resource.New(ctx,
		resource.WithTelemetrySDK(),
		resource.WithAttributes(semconv.ServiceName("sluice"), semconv.ServiceVersion(version)),
		resource.WithFromEnv(),
	)
	if err != nil {
		logger.Warn("telemetry resource is incomplete; see OTEL_RESOURCE_ATTRIBUTES", "error", err)
	}
	if err := t.startTraces(ctx, res); err != nil {
		return nil, err
	}
	if err := t.startMetrics(ctx, res, logger); err != nil {
		return nil, err
	}
	return t, nil
}

// Shutdown sends what was recorded and not yet exported, and stops. It blocks
// until that is done or ctx ends; nothing is recorded afterwards. Further calls
// return nil. It must not be called twice at once.
func (t *Telemetry) Shutdown(ctx context.Context) error {
	var errs []error
	for _, shutdown := range t.shutdowns {
		errs = append(errs, shutdown(ctx))
	}
	t.shutdowns = nil
	return errors.Join(errs...)
}

func (t *Telemetry) startTraces(ctx context.Context, res *resource.Resource) error {
	if !exporting("TRACES") {
		t.TracerProvider = passthrough{}
		return nil
	}
	exporter, err := autoexport.NewSpanExporter(ctx)
	if err != nil {
		return fmt.Errorf("trace exporter of %s: %w", settings("TRACES"), err)
	}
	// The sampler is that of OTEL_TRACES_SAMPLER.
	provider := sdktrace.NewTracerProvider(sdktrace.WithResource(res), sdktrace.WithBatcher(exporter))
	t.TracerProvider = provider
	t.shutdowns = append(t.shutdowns, named("flush traces", provider.Shutdown))
	return nil
}

func (t *Telemetry) startMetrics(ctx context.Context, res *resource.Resource, logger *slog.Logger) error {
	registry := prometheus.NewRegistry()
	if err := registry.Register(collectors.NewProcessCollector(collectors.ProcessCollectorOpts{})); err != nil {
		return fmt.Errorf("register process metrics: %w", err)
	}
	// What the instrumentation below does not tell, or tells only every 15 s:
	// goroutines, memory as GOMEMLIMIT counts it (all but what was released), and
	// the processor time that the garbage collector takes, of which some was idle.
	collector := collectors.NewGoCollector(collectors.WithGoCollectorMemStatsMetricsDisabled(),
		collectors.WithGoCollectorRuntimeMetrics(collectors.GoRuntimeMetricsRule{Matcher: runtimeMetrics}))
	if err := registry.Register(collector); err != nil {
		return fmt.Errorf("register metrics of the runtime: %w", err)
	}
	exporter, err := prometheusexporter.New(prometheusexporter.WithRegisterer(registry), prometheusexporter.WithoutScopeInfo())
	if err != nil {
		return fmt.Errorf("set up the Prometheus exporter: %w", err)
	}
	options := []sdkmetric.Option{sdkmetric.WithResource(res), sdkmetric.WithReader(exporter)}
	if exporting("METRICS") {
		reader, err := autoexport.NewMetricReader(ctx)
		if err != nil {
			return fmt.Errorf("metric exporter of %s: %w", settings("METRICS"), err)
		}
		options = append(options, sdkmetric.WithReader(reader))
	}
	provider := sdkmetric.NewMeterProvider(options...)
	t.MeterProvider = provider
	t.shutdowns = append(t.shutdowns, named("flush metrics", provider.Shutdown))

	if err := runtime.Start(runtime.WithMeterProvider(provider)); err != nil {
		return fmt.Errorf("set up runtime metrics: %w", err)
	}
	t.Metrics = promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog:          slog.NewLogLogger(logger.Handler(), slog.LevelWarn),
		ErrorHandling:     promhttp.ContinueOnError, // one bad metric does not hide the others
		EnableOpenMetrics: true,                     // for exemplars: from a slow bucket to its trace
	})
	return nil
}

// exporting tells whether the environment asks for a signal to be sent. By the
// specification it always does, to localhost; a process that nobody configured
// should stay silent instead.
func exporting(signal string) bool {
	if strings.EqualFold(os.Getenv("OTEL_SDK_DISABLED"), "true") {
		return false
	}
	switch os.Getenv("OTEL_" + signal + "_EXPORTER") {
	case "none":
		return false
	case "":
		return os.Getenv("OTEL_EXPORTER_OTLP_ENDPOINT") != "" || os.Getenv("OTEL_EXPORTER_OTLP_"+signal+"_ENDPOINT") != ""
	default:
		return true
	}
}

// settings quotes the variables that choose a signal's exporter, for an error:
// autoexport's own texts do not say where the wrong value stands.
func settings(signal string) string {
	var set []string
	for _, name := range []string{
		"OTEL_" + signal + "_EXPORTER", "OTEL_EXPORTER_OTLP_" + signal + "_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL",
	} {
		if value := os.Getenv(name); value != "" {
			set = append(set, fmt.Sprintf("%s=%q", name, value))
		}
	}
	return strings.Join(set, ", ")
}

func named(what string, shutdown func(context.Context) error) func(context.Context) error {
	return func(ctx context.Context) error {
		if err := shutdown(ctx); err != nil {
			return fmt.Errorf("%s: %w", what, err)
		}
		return nil
	}
}
