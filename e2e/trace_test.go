package e2e

import (
	"cmp"
	"compress/gzip"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	collectorpb "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	tracepb "go.opentelemetry.io/proto/otlp/trace/v1"
	"google.golang.org/protobuf/proto"
)

// collector is an OpenTelemetry collector as a process sees it: OTLP over HTTP.
// It keeps the spans and accepts everything else.
type collector struct {
	*httptest.Server

	mu     sync.Mutex
	spans  []span
	faults []error
}

// span is an exported span, and who exported it.
type span struct {
	*tracepb.Span
	resource map[string]string
}

func newCollector(t *testing.T) *collector {
	t.Helper()
	c := &collector{}
	mux := http.NewServeMux()
	mux.HandleFunc("POST /v1/traces", func(w http.ResponseWriter, r *http.Request) {
		var export collectorpb.ExportTraceServiceRequest
		err := decodeExport(r, &export)
		c.mu.Lock()
		defer c.mu.Unlock()
		if err != nil {
			c.faults = append(c.faults, err)
			w.WriteHeader(http.StatusBadRequest)
			return
		}
		for _, rs := range export.GetResourceSpans() {
			resource := map[string]string{}
			for _, a := range rs.GetResource().GetAttributes() {
				resource[a.GetKey()] = a.GetValue().GetStringValue()
			}
			for _, ss := range rs.GetScopeSpans() {
				for _, s := range ss.GetSpans() {
					c.spans = append(c.spans, span{s, resource})
				}
			}
		}
		w.Header().Set("Content-Type", "application/x-protobuf") // of no bytes: all accepted
	})
	mux.HandleFunc("POST /v1/metrics", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/x-protobuf")
	})
	c.Server = httptest.NewServer(mux)
	t.Cleanup(c.Close)
	return c
}

func decodeExport(r *http.Request, into proto.Message) error {
	body := io.Reader(r.Body)
	if r.Header.Get("Content-Encoding") == "gzip" {
		unpacked, err := gzip.NewReader(body)
		if err != nil {
			return err
		}
		body = unpacked
	}
	data, err := io.ReadAll(body)
	if err != nil {
		return err
	}
	return proto.Unmarshal(data, into)
}

// trace returns the spans of a trace in the order in which they began.
func (c *collector) trace(t testing.TB, traceID string) []span {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	require.Empty(t, c.faults)
	var found []span
	for _, s := range c.spans {
		if hex.EncodeToString(s.GetTraceId()) == traceID {
			found = append(found, s)
		}
	}
	slices.SortStableFunc(found, func(a, b span) int { return cmp.Compare(a.GetStartTimeUnixNano(), b.GetStartTimeUnixNano()) })
	return found
}

// tree draws the spans of a trace that come after parent (a span id, "" for
// none), one a line, each below and to the right of its parent. What does not
// hang together comes last.
func (c *collector) tree(t testing.TB, traceID, parent string) string {
	t.Helper()
	spans, drawn := c.trace(t, traceID), 0
	var b strings.Builder
	var draw func(parent, indent string)
	draw = func(parent, indent string) {
		for _, s := range spans {
			if hex.EncodeToString(s.GetParentSpanId()) != parent {
				continue
			}
			drawn++
			kind := strings.ToLower(strings.TrimPrefix(s.GetKind().String(), "SPAN_KIND_"))
			fmt.Fprintf(&b, "%s%s: %s %s\n", indent, s.resource["service.instance.id"], kind, s.GetName())
			draw(hex.EncodeToString(s.GetSpanId()), indent+"  ")
		}
	}
	draw(parent, "")
	if lost := len(spans) - drawn; lost > 0 {
		fmt.Fprintf(&b, "and %d spans elsewhere\n", lost)
	}
	return b.String()
}

// awaitTree waits until the trace looks like that.
func (c *collector) awaitTree(t testing.TB, traceID, parent, want string) {
	t.Helper()
	eventually(t, 30*time.Second, func() bool { return len(c.trace(t, traceID)) >= strings.Count(want, "\n") },
		"spans are missing from trace %s; wanted:\n%s", traceID, want)
	require.Equal(t, want, c.tree(t, traceID, parent))
}

// last returns the last span of that name in the trace.
func (c *collector) last(t testing.TB, traceID, name string) span {
	t.Helper()
	for _, s := range slices.Backward(c.trace(t, traceID)) {
		if s.GetName() == name {
			return s
		}
	}
	require.FailNow(t, "no such span", "%s in trace %s", name, traceID)
	return span{}
}

// attributes returns the attributes that are text.
func (s span) attributes() map[string]string {
	values := map[string]string{}
	for _, a := range s.GetAttributes() {
		if text := a.GetValue().GetStringValue(); text != "" {
			values[a.GetKey()] = text
		}
	}
	return values
}

// exporting makes a gateway send its spans soon, under the given name.
func (c *collector) exporting(b *standIn, name string, more ...string) settings {
	return fast(b, append([]string{
		"log.level", "debug",
		"OTEL_EXPORTER_OTLP_ENDPOINT", c.URL,
		"OTEL_EXPORTER_OTLP_PROTOCOL", "http/protobuf",
		"OTEL_TRACES_EXPORTER", "otlp",
		"OTEL_TRACES_SAMPLER", "parentbased_always_on",
		"OTEL_SERVICE_NAME", "",
		"OTEL_RESOURCE_ATTRIBUTES", "service.instance.id=" + name,
		"OTEL_BSP_SCHEDULE_DELAY", "10", // milliseconds
	}, more...)...)
}

// tracedCall is what the backend saw with the last call of a saved order.
func (b *standIn) tracedCall(t testing.TB, number string) (traceparent, tracestate string) {
	t.Helper()
	var kept struct {
		Traceparent string
		Headers     map[string]string
	}
	getJSON(t, b.url+"/orders/"+number, &kept)
	return kept.Traceparent, kept.Headers["Tracestate"]
}

// requireLines checks that there are at least so many log lines about an order,
// and that all of them name its trace. Call it when the process has ended.
func (p *process) requireLines(t testing.TB, o order, atLeast int) {
	t.Helper()
	lines := 0
	for line := range strings.Lines(p.log()) {
		var entry struct {
			OrderID string `json:"order_id"`
			TraceID string `json:"trace_id"`
		}
		if json.Unmarshal([]byte(line), &entry) != nil || entry.OrderID != o.ID {
			continue // the Go runtime and the race detector write plain text
		}
		require.Equal(t, o.TraceID, entry.TraceID, line)
		lines++
	}
	require.GreaterOrEqual(t, lines, atLeast, "log lines about the order")
}

// A client's own trace, and the headers by which it hands it on.
const (
	clientTrace = "4bf92f3577b34da6a3ce929d0e0e4736"
	clientSpan  = "00f067aa0ba902b7"
	clientState = "vendor=x,other=y"
)

func clientHeader() []string {
	return []string{"Traceparent", "00-" + clientTrace + "-" + clientSpan + "-01", "Tracestate", clientState}
}

// handedOn checks that the backend was called by the last client span of the
// trace.
func (c *collector) handedOn(t testing.TB, b *standIn, number, traceID, tracestate string) {
	t.Helper()
	sent, state := b.tracedCall(t, number)
	require.Equal(t, fmt.Sprintf("00-%s-%x-01", traceID, c.last(t, traceID, "POST").GetSpanId()), sent)
	require.Equal(t, tracestate, state)
}

func TestOneTraceFromTheClientToTheBackend(t *testing.T) {
	eachHome(t, testOneTraceFromTheClientToTheBackend)
}

func testOneTraceFromTheClientToTheBackend(t *testing.T, h home) {
	c, b := newCollector(t), backend(t, "--latency", "1ms")
	// Nothing is sent before the end: what a graceful stop flushes is complete.
	g := serve(t, true, h, c.exporting(b, "one", "OTEL_BSP_SCHEDULE_DELAY", "3600000"))
	saved := g.accept(t, "saved", clientHeader()...)
	require.Equal(t, clientTrace, saved.TraceID)
	require.Equal(t, clientTrace, g.await(t, saved.ID, "saved").TraceID)
	b.control(t, `{"failNext": 1}`)
	retried := g.accept(t, "retried")
	require.Len(t, retried.TraceID, 32)
	require.NotEqual(t, clientTrace, retried.TraceID)
	require.Equal(t, retried.TraceID, g.await(t, retried.ID, "saved").TraceID)
	require.Zero(t, g.terminate(t))
	require.NotContains(t, g.log(), "the last traces or metrics are lost")

	const attempt = `  one: producer publish orders.submitted
    one: consumer process orders.submitted
      one: client POST
      one: producer publish orders.outcome
        one: consumer process orders.outcome
`
	require.Equal(t, "one: server POST /orders\n"+attempt, c.tree(t, clientTrace, clientSpan))
	require.Equal(t, "one: server POST /orders\n"+attempt+attempt, c.tree(t, retried.TraceID, ""))
	c.handedOn(t, b, "saved", clientTrace, clientState)
	c.handedOn(t, b, "retried", retried.TraceID, "")
	g.requireLines(t, saved, 3)       // accepted, called, stored
	g.requireLines(t, retried, 1+2*2) // the same with two calls

	for name, want := range map[string]map[string]string{
		"publish orders.submitted": {"messaging.operation.name": "publish", "messaging.operation.type": "send",
			"messaging.destination.name": "orders.submitted", "messaging.message.id": saved.ID + ".1"},
		"process orders.submitted": {"messaging.operation.name": "process", "messaging.operation.type": "process",
			"messaging.destination.name": "orders.submitted", "messaging.message.id": saved.ID + ".1",
			"messaging.consumer.group.name": "dispatch"},
		"publish orders.outcome": {"messaging.operation.name": "publish", "messaging.operation.type": "send",
			"messaging.destination.name": "orders.outcome", "messaging.message.id": saved.ID + ".1.order.saved.v1"},
		"process orders.outcome": {"messaging.operation.name": "process", "messaging.operation.type": "process",
			"messaging.destination.name": "orders.outcome", "messaging.message.id": saved.ID + ".1.order.saved.v1",
			"messaging.consumer.group.name": "intake"},
	} {
		want["messaging.system"] = h.system()
		require.Equal(t, want, c.last(t, clientTrace, name).attributes(), name)
	}
	for _, s := range c.trace(t, clientTrace) {
		require.Equal(t, "sluice", s.resource["service.name"])
		require.NotEmpty(t, s.resource["service.version"])
		require.Equal(t, clientState, s.GetTraceState(), s.GetName())
	}
}

// The trace is stored with the order: what a killed process had promised, the
// next one does in the same trace, below the request of long ago.
func TestATraceSurvivesAKill(t *testing.T) {
	const (
		accepted = `first: server POST /orders
  first: producer publish orders.submitted
`
		attempt = `  %[1]s: producer publish orders.submitted
    %[1]s: consumer process orders.submitted
      %[1]s: client POST
      %[1]s: producer publish orders.outcome
        %[1]s: consumer process orders.outcome
`
	)
	for name, test := range map[string]struct {
		prepare func(t *testing.T, g *gateway, b *standIn) // before the order comes
		before  string                                     // the trace when the process is killed; spans under way die with it
		calls   int                                        // of the order that the backend has seen by then
	}{
		"while the order waits behind a slow one": {
			prepare: func(t *testing.T, g *gateway, b *standIn) {
				b.control(t, `{"latency": "10m"}`)
				g.accept(t, "slow")
				eventually(t, 10*time.Second, func() bool { return b.stats(t).InFlight == 1 }, "the slow order is not at the backend")
			},
			before: accepted,
		},
		"while the backend hangs with the order": {
			prepare: func(t *testing.T, _ *gateway, b *standIn) { b.control(t, `{"latency": "10m"}`) },
			before:  accepted,
			calls:   1,
		},
		"between two attempts": {
			// Long enough to kill the process in between.
			prepare: func(t *testing.T, _ *gateway, b *standIn) { b.control(t, `{"failNext": 1, "retryAfter": "3s"}`) },
			before:  "first: server POST /orders\n" + fmt.Sprintf(attempt, "first"),
			calls:   1,
		},
	} {
		t.Run(name, func(t *testing.T) {
			eachHome(t, func(t *testing.T, h home) {
				c, b := newCollector(t), backend(t, "--latency", "1ms")
				g := serve(t, true, h, c.exporting(b, "first", "dispatch.concurrency", "1"))
				test.prepare(t, g, b)
				others := b.stats(t).Requests
				o := g.accept(t, "A-1", clientHeader()...)
				require.Equal(t, clientTrace, o.TraceID)
				c.awaitTree(t, clientTrace, clientSpan, test.before)
				eventually(t, 10*time.Second, func() bool { return b.stats(t).Requests == others+test.calls }, "the backend has not seen the order")
				g.kill()
				g.requireLines(t, o, 1)

				b.control(t, `{"latency": "1ms"}`)
				g = serve(t, true, h, c.exporting(b, "second"))
				require.Equal(t, clientTrace, g.await(t, o.ID, "saved").TraceID)
				require.Zero(t, g.terminate(t))
				if !h.durable { // a broker that keeps the message may hand out that one, or be handed a second one
					require.Equal(t, test.before+fmt.Sprintf(attempt, "second"), c.tree(t, clientTrace, clientSpan))
				}
				c.handedOn(t, b, "A-1", clientTrace, clientState)
				g.requireLines(t, o, 2)
			})
		})
	}
}

// Without a collector no span is made, but trace ids are, and they go the same
// way: the logs of all that took part can still be joined.
func TestTracesAreHandedOnWithoutACollector(t *testing.T) {
	b, dir := backend(t, "--latency", "1ms"), t.TempDir()
	silent := fast(b, "log.level", "debug", "OTEL_EXPORTER_OTLP_ENDPOINT", "", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "", "OTEL_TRACES_EXPORTER", "")
	g := serve(t, true, embedded(dir), silent)
	theirs, ours := g.accept(t, "theirs", clientHeader()...), g.accept(t, "ours")
	require.Equal(t, clientTrace, theirs.TraceID)
	require.Regexp(t, "^[0-9a-f]{32}$", ours.TraceID)
	g.await(t, theirs.ID, "saved")
	g.await(t, ours.ID, "saved")
	require.Zero(t, g.terminate(t))

	sent, state := b.tracedCall(t, "theirs")
	require.Equal(t, "00-"+clientTrace+"-"+clientSpan+"-01", sent, "the backend's span is a child of the client's, with no lost one between")
	require.Equal(t, clientState, state)
	sent, state = b.tracedCall(t, "ours")
	require.Regexp(t, "^00-"+ours.TraceID+"-[0-9a-f]{16}-00$", sent)
	require.Empty(t, state)
	g.requireLines(t, theirs, 3)
	g.requireLines(t, ours, 3)
}

func TestACollectorThatFailsHarmsNothingElse(t *testing.T) {
	gone := httptest.NewServer(nil)
	gone.Close()
	stuck := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // until then the server does not see that its client has left
		<-r.Context().Done()
	}))
	defer stuck.Close()
	for name, url := range map[string]string{"is not there": gone.URL, "does not answer": stuck.URL} {
		t.Run(name, func(t *testing.T) {
			b := backend(t, "--latency", "1ms")
			g := serve(t, true, embedded(t.TempDir()), fast(b, "OTEL_EXPORTER_OTLP_ENDPOINT", url))
			g.await(t, g.accept(t, "A-1", clientHeader()...).ID, "saved")
			started := time.Now()
			require.Zero(t, g.terminate(t))
			require.Less(t, time.Since(started), 20*time.Second, "http.shutdown_timeout is 30 s, for orders")
			require.Contains(t, g.log(), "the last traces or metrics are lost")
		})
	}
}
