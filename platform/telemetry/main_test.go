package telemetry_test

import (
	"bytes"
	"compress/gzip"
	"context"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	metricspb "go.opentelemetry.io/proto/otlp/collector/metrics/v1"
	tracespb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"

	"sluice/platform/telemetry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience is how long a test waits for what should happen at once.
const patience = 10 * time.Second

// environ sets the OTEL_* variables to these and no others for one test.
func environ(t *testing.T, set map[string]string) {
	t.Helper()
	for _, entry := range os.Environ() {
		if name, _, _ := strings.Cut(entry, "="); strings.HasPrefix(name, "OTEL_") {
			t.Setenv(name, "") // the specification has empty mean unset
		}
	}
	for name, value := range set {
		t.Setenv(name, value)
	}
}

// start starts telemetry and stops it after the test.
func start(t *testing.T, logs io.Writer) *telemetry.Telemetry {
	t.Helper()
	tel, err := telemetry.Start(t.Context(), "1.2.3", telemetry.NewLogger(telemetry.DefaultLogConfig(), logs))
	require.NoError(t, err)
	t.Cleanup(func() { shutdown(t, tel) })
	return tel
}

func shutdown(t *testing.T, tel *telemetry.Telemetry) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), patience)
	defer cancel()
	require.NoError(t, tel.Shutdown(ctx))
}

// logbook is a log that can be read while it is written.
type logbook struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// receiver is an OpenTelemetry collector as seen from outside: OTLP over HTTP.
type receiver struct {
	*httptest.Server

	mu      sync.Mutex
	traces  []*tracespb.ExportTraceServiceRequest
	metrics []*metricspb.ExportMetricsServiceRequest
	faults  []error
}

func newReceiver(t *testing.T) *receiver {
	t.Helper()
	r := &receiver{}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/traces", func(w http.ResponseWriter, request *http.Request) {
		message := new(tracespb.ExportTraceServiceRequest)
		r.take(w, request, message, func() { r.traces = append(r.traces, message) })
	})
	mux.HandleFunc("POST /v1/metrics", func(w http.ResponseWriter, request *http.Request) {
		message := new(metricspb.ExportMetricsServiceRequest)
		r.take(w, request, message, func() { r.metrics = append(r.metrics, message) })
	})
	r.Server = httptest.NewServer(mux)
	t.Cleanup(r.Close)
	return r
}

// take answers an export; an empty message is the protocol's "all accepted".
func (r *receiver) take(w http.ResponseWriter, request *http.Request, message proto.Message, keep func()) {
	err := decode(request, message)
	r.mu.Lock()
	defer r.mu.Unlock()
	if err != nil {
		r.faults = append(r.faults, err)
		w.WriteHeader(http.StatusBadRequest)
		return
	}
	keep()
	w.Header().Set("Content-Type", "application/x-protobuf")
}

func decode(request *http.Request, message proto.Message) error {
	body := io.Reader(request.Body)
	if request.Header.Get("Content-Encoding") == "gzip" {
		var err error
		if body, err = gzip.NewReader(body); err != nil {
			return err
		}
	}
	data, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	return proto.Unmarshal(data, message)
}

// spans returns the names of the spans that came, and the resource of the last.
func (r *receiver) spans(t *testing.T) (names []string, resource map[string]string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	require.Empty(t, r.faults)
	for _, request := range r.traces {
		for _, rs := range request.GetResourceSpans() {
			resource = map[string]string{}
			for _, attribute := range rs.GetResource().GetAttributes() {
				resource[attribute.GetKey()] = attribute.GetValue().GetStringValue()
			}
			for _, ss := range rs.GetScopeSpans() {
				for _, span := range ss.GetSpans() {
					names = append(names, span.GetName())
				}
			}
		}
	}
	return names, resource
}

func (r *receiver) metricNames(t *testing.T) (names []string) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	require.Empty(t, r.faults)
	for _, request := range r.metrics {
		for _, rm := range request.GetResourceMetrics() {
			for _, sm := range rm.GetScopeMetrics() {
				for _, m := range sm.GetMetrics() {
					names = append(names, m.GetName())
				}
			}
		}
	}
	return names
}
