package telemetry_test

import (
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"

	"sluice/platform/telemetry"
)

func TestWithoutVariables(t *testing.T) {
	before := goleak.IgnoreCurrent()
	environ(t, nil)
	provider := otel.GetTracerProvider()
	tel := start(t, io.Discard)

	require.NoError(t, goleak.Find(before), "nothing runs, so nothing can connect")

	t.Run("a span has valid ids, is handed on and is not recorded", func(t *testing.T) {
		ctx, span := tel.TracerProvider.Tracer("test").Start(t.Context(), "POST /orders")
		defer span.End()
		require.True(t, span.SpanContext().IsValid())
		require.False(t, span.IsRecording())

		carrier := propagation.MapCarrier{}
		tel.Propagator.Inject(ctx, carrier)
		require.Equal(t, "00-"+span.SpanContext().TraceID().String()+"-"+span.SpanContext().SpanID().String()+"-00", carrier["traceparent"])

		_, child := tel.TracerProvider.Tracer("test").Start(ctx, "publish")
		defer child.End()
		require.Equal(t, span.SpanContext().TraceID(), child.SpanContext().TraceID())
	})

	t.Run("a caller who samples is obeyed, with state and baggage", func(t *testing.T) {
		in := propagation.MapCarrier{
			"traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
			"tracestate":  "vendor=1",
			"baggage":     "tenant=7",
		}
		ctx, span := tel.TracerProvider.Tracer("test").Start(tel.Propagator.Extract(t.Context(), in), "POST /orders")
		defer span.End()
		out := propagation.MapCarrier{}
		tel.Propagator.Inject(ctx, out)
		require.Equal(t, in["traceparent"], out["traceparent"], "with no span of ours between, which nobody would find")
		require.Equal(t, "vendor=1", out["tracestate"])
		require.Equal(t, "tenant=7", out["baggage"])
	})

	t.Run("the providers are not global", func(t *testing.T) {
		require.Same(t, provider, otel.GetTracerProvider())
		require.NotEqual(t, tel.TracerProvider, otel.GetTracerProvider())
	})
}

func TestExport(t *testing.T) {
	for name, variables := range map[string]func(url string) map[string]string{
		"by the common endpoint": func(url string) map[string]string {
			return map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": url, "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf"}
		},
		"by one endpoint for each signal": func(url string) map[string]string {
			return map[string]string{
				"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT":  url + "/v1/traces",
				"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": url + "/v1/metrics",
			}
		},
	} {
		t.Run(name+", flushed by Shutdown", func(t *testing.T) {
			collector := newReceiver(t)
			environ(t, variables(collector.URL))
			tel := start(t, io.Discard)
			_, span := tel.TracerProvider.Tracer("test").Start(t.Context(), "POST /orders")
			require.True(t, span.SpanContext().IsSampled())
			span.End()
			shutdown(t, tel)

			names, resource := collector.spans(t)
			require.Equal(t, []string{"POST /orders"}, names)
			require.Equal(t, "sluice", resource["service.name"])
			require.Equal(t, "1.2.3", resource["service.version"])
			require.Contains(t, collector.metricNames(t), "go.goroutine.count")
			shutdown(t, tel) // idempotent
		})
	}

	t.Run("with a name, attributes and a sampler of the environment", func(t *testing.T) {
		collector := newReceiver(t)
		environ(t, map[string]string{
			"OTEL_EXPORTER_OTLP_ENDPOINT": collector.URL,
			"OTEL_SERVICE_NAME":           "sluice-eu",
			"OTEL_RESOURCE_ATTRIBUTES":    "deployment.environment.name=test",
			"OTEL_TRACES_SAMPLER":         "parentbased_always_off",
		})
		tel := start(t, io.Discard)
		tracer := tel.TracerProvider.Tracer("test")
		_, span := tracer.Start(t.Context(), "not sampled")
		span.End()
		sampled := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{1}, TraceFlags: trace.FlagsSampled})
		_, span = tracer.Start(trace.ContextWithRemoteSpanContext(t.Context(), sampled), "sampled")
		span.End()
		shutdown(t, tel)

		names, resource := collector.spans(t)
		require.Equal(t, []string{"sampled"}, names)
		require.Equal(t, "sluice-eu", resource["service.name"])
		require.Equal(t, "test", resource["deployment.environment.name"])
	})

	for name, variables := range map[string]map[string]string{
		"by none":              {"OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"},
		"by a disabled SDK":    {"OTEL_SDK_DISABLED": "true"},
		"by another's console": {"OTEL_LOGS_EXPORTER": "console", "OTEL_TRACES_EXPORTER": "none", "OTEL_METRICS_EXPORTER": "none"},
	} {
		t.Run("is switched off "+name, func(t *testing.T) {
			collector := newReceiver(t)
			environ(t, variables)
			t.Setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.URL)
			tel := start(t, io.Discard)
			_, span := tel.TracerProvider.Tracer("test").Start(t.Context(), "POST /orders")
			require.False(t, span.IsRecording())
			span.End()
			shutdown(t, tel)
			names, _ := collector.spans(t)
			require.Empty(t, names)
			require.Empty(t, collector.metricNames(t))
		})
	}
}

func TestBadVariables(t *testing.T) {
	for name, test := range map[string]struct {
		variables map[string]string
		fault     string
	}{
		"an exporter that does not exist": {
			map[string]string{"OTEL_TRACES_EXPORTER": "carrier-pigeon"},
			`trace exporter of OTEL_TRACES_EXPORTER="carrier-pigeon": `,
		},
		"a protocol that does not exist": {
			map[string]string{"OTEL_EXPORTER_OTLP_ENDPOINT": "http://localhost:4318", "OTEL_EXPORTER_OTLP_PROTOCOL": "http/yaml"},
			`trace exporter of OTEL_EXPORTER_OTLP_PROTOCOL="http/yaml": invalid OTLP protocol`,
		},
		"a metrics exporter that does not exist, after traces were set up": {
			map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://localhost:4318/v1/traces", "OTEL_METRICS_EXPORTER": "abacus"},
			`metric exporter of OTEL_METRICS_EXPORTER="abacus": `,
		},
	} {
		t.Run(name+" is an error that names it and leaves nothing behind", func(t *testing.T) {
			before := goleak.IgnoreCurrent()
			environ(t, test.variables)
			_, err := telemetry.Start(t.Context(), "1.2.3", telemetry.NewLogger(telemetry.DefaultLogConfig(), io.Discard))
			require.ErrorContains(t, err, test.fault)
			goleak.VerifyNone(t, before)
		})
	}

	t.Run("resource attributes that cannot be read are a warning", func(t *testing.T) {
		var logs logbook
		environ(t, map[string]string{"OTEL_RESOURCE_ATTRIBUTES": "no-equals-sign"})
		start(t, &logs)
		require.Contains(t, logs.String(), "level=WARN")
		require.Contains(t, logs.String(), "OTEL_RESOURCE_ATTRIBUTES")
	})
}

func TestCollectorInTrouble(t *testing.T) {
	t.Run("is a warning in our log", func(t *testing.T) {
		collector := httptest.NewServer(http.NotFoundHandler())
		defer collector.Close()
		environ(t, map[string]string{
			"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.URL + "/v1/traces",
			"OTEL_BSP_SCHEDULE_DELAY":            "1", // ms
		})
		var logs logbook
		tel := start(t, &logs)
		_, span := tel.TracerProvider.Tracer("test").Start(t.Context(), "POST /orders")
		span.End()
		require.Eventually(t, func() bool {
			return logs.String() != ""
		}, patience, time.Millisecond)
		require.Contains(t, logs.String(), `level=WARN msg="trouble with telemetry"`)
		require.Contains(t, logs.String(), "404")
	})

	t.Run("does not hold a shutdown longer than its context", func(t *testing.T) {
		release := make(chan struct{})
		collector := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			select {
			case <-release:
			case <-r.Context().Done():
			}
		}))
		defer collector.Close()
		defer close(release)
		environ(t, map[string]string{"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": collector.URL + "/v1/traces"})
		tel := start(t, io.Discard)
		_, span := tel.TracerProvider.Tracer("test").Start(t.Context(), "POST /orders")
		span.End()

		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		err := tel.Shutdown(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "flush traces: ")
	})
}

func TestTroubleOfTheLibraryIsLogged(t *testing.T) {
	environ(t, nil)
	var logs logbook
	start(t, &logs)
	otel.Handle(errors.New("no more room in the queue"))
	require.Contains(t, logs.String(), `level=WARN msg="trouble with telemetry" error="no more room in the queue"`)
}

func scrape(t *testing.T, tel *telemetry.Telemetry) string {
	t.Helper()
	recorder := httptest.NewRecorder()
	tel.Metrics.ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	require.Equal(t, http.StatusOK, recorder.Code)
	require.Contains(t, recorder.Header().Get("Content-Type"), "text/plain; version=0.0.4")
	return recorder.Body.String()
}

func TestMetrics(t *testing.T) {
	environ(t, nil)
	one, other := start(t, io.Discard), start(t, io.Discard)
	counter, err := one.MeterProvider.Meter("test").Int64Counter("sluice.orders")
	require.NoError(t, err)
	counter.Add(t.Context(), 3)

	text := scrape(t, one)
	require.Regexp(t, `(?m)^sluice_orders_total 3$`, text)
	require.Regexp(t, `(?m)^go_goroutine_count \d+$`, text)
	require.Regexp(t, `(?m)^go_goroutines \d+$`, text)
	require.Regexp(t, `(?m)^go_memory_classes_total_bytes `, text)
	require.Regexp(t, `(?m)^go_memory_classes_heap_released_bytes `, text)
	require.Regexp(t, `(?m)^go_cpu_classes_gc_total_cpu_seconds_total `, text)
	require.Regexp(t, `(?m)^go_cpu_classes_gc_mark_idle_cpu_seconds_total `, text)
	require.Regexp(t, `(?m)^go_memory_used_bytes\{`, text)
	require.Regexp(t, `(?m)^process_start_time_seconds `, text)
	require.Regexp(t, `(?m)^target_info\{.*service_name="sluice",service_version="1\.2\.3".*\} 1$`, text)

	require.NotContains(t, scrape(t, other), "sluice_orders", "each has a registry of its own")
}
