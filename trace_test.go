package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/codes"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"

	"sluice/config"
	"sluice/e2e/backend"
	"sluice/modules/intake"
	"sluice/platform/httpserver"
	"sluice/platform/telemetry"
)

// traced is the gateway as serve wires it, in this process, before a stand-in
// backend. Its spans are recorded where others export them.
type traced struct {
	url, admin string
	backend    *backend.Backend
	backendURL string
	client     *http.Client
	recorder   *tracetest.SpanRecorder
	logs       logbook
	stop       func() // stops the gateway, gracefully
}

// logbook is a log that can be read while it is written: goroutines of
// Watermill's router say goodbye after it is closed.
type logbook struct {
	mu   sync.Mutex
	text bytes.Buffer
}

func (l *logbook) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *logbook) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

// serveTraced runs a gateway that keeps nothing and tries again at once.
func serveTraced(t *testing.T, change func(*config.Config, *telemetry.Telemetry)) *traced {
	t.Helper()
	g := &traced{recorder: tracetest.NewSpanRecorder(), client: &http.Client{Timeout: time.Minute, Transport: &http.Transport{}}}
	t.Cleanup(g.client.CloseIdleConnections)
	var err error
	standIn := backend.DefaultConfig()
	standIn.Latency = time.Millisecond
	g.backend, err = backend.New(standIn)
	require.NoError(t, err)
	server := httptest.NewServer(g.backend)
	t.Cleanup(func() { g.backend.Close(); server.Close() })
	g.backendURL = server.URL

	cfg := config.Default()
	cfg.HTTP.Addr, cfg.HTTP.AdminAddr = "127.0.0.1:0", "127.0.0.1:0"
	cfg.Store.Driver = intake.DriverMemory
	cfg.Backend.URL = server.URL + "/orders"
	cfg.Dispatch.RetryInitial, cfg.Dispatch.RetryMax = time.Millisecond, time.Millisecond
	cfg.Log = telemetry.LogConfig{Level: "debug", Format: "json"}
	tel := &telemetry.Telemetry{
		TracerProvider: sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(g.recorder)),
		MeterProvider:  metricnoop.NewMeterProvider(),
		Propagator:     propagation.TraceContext{},
		Metrics:        http.NotFoundHandler(),
	}
	if change != nil {
		change(&cfg, tel)
	}

	ctx, cancel := context.WithCancel(t.Context())
	ready, stopped := make(chan struct{}), make(chan error, 1)
	go func() {
		stopped <- serve(ctx, cfg, config.Modules(), telemetry.NewLogger(cfg.Log, &g.logs),
			func(context.Context, string, *slog.Logger) (*telemetry.Telemetry, error) { return tel, nil },
			func(public, admin string) {
				g.url, g.admin = "http://"+public, "http://"+admin
				close(ready)
			})
	}()
	g.stop = sync.OnceFunc(func() {
		cancel()
		require.NoError(t, <-stopped)
	})
	t.Cleanup(g.stop)
	receive(t, ready)
	return g
}

// orderView is what the client and the backend see of an order's trace.
type orderView struct {
	ID      string `json:"id"`
	Status  string `json:"status"`
	TraceID string `json:"traceId"`
}

// send sends a request and returns the answer. header are name, value pairs.
func (g *traced) send(ctx context.Context, method, url, body string, header ...string) (status int, answer []byte, err error) {
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return 0, nil, err
	}
	req.Header.Set("Content-Type", "application/json")
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	res, err := g.client.Do(req)
	if err != nil {
		return 0, nil, err
	}
	defer res.Body.Close()
	answer, err = io.ReadAll(res.Body)
	return res.StatusCode, answer, err
}

// do is send with an answer that must have the status, read into out.
func (g *traced) do(t *testing.T, want int, method, url, body string, out any, header ...string) {
	t.Helper()
	status, answer, err := g.send(t.Context(), method, url, body, header...)
	require.NoError(t, err)
	require.Equal(t, want, status, string(answer))
	require.NoError(t, json.Unmarshal(answer, out), string(answer))
}

func orderBody(number string) string {
	return fmt.Sprintf(`{"orderNumber":%q,"customerId":"c","currency":"EUR","items":[{"sku":"tea","quantity":1,"unitPrice":2}]}`, number)
}

func (g *traced) post(t *testing.T, number string, header ...string) orderView {
	t.Helper()
	var o orderView
	g.do(t, http.StatusAccepted, http.MethodPost, g.url+"/orders", orderBody(number), &o, header...)
	return o
}

// await waits until the order is final.
func (g *traced) await(t *testing.T, o orderView, status string) {
	t.Helper()
	var final orderView
	g.do(t, http.StatusOK, http.MethodGet, g.url+"/orders/"+o.ID, "", &final, "Prefer", "wait=30")
	require.Equal(t, status, final.Status)
	require.Equal(t, o.TraceID, final.TraceID)
}

// backendCall is the last call that the backend saw for a saved order.
func (g *traced) backendCall(t *testing.T, number string) (traceparent, tracestate string) {
	t.Helper()
	var call struct {
		Traceparent string
		Headers     map[string]string
	}
	g.do(t, http.StatusOK, http.MethodGet, g.backendURL+"/orders/"+number, "", &call)
	return call.Traceparent, call.Headers["Tracestate"]
}

// spans returns the finished spans of a trace in the order in which they began.
func (g *traced) spans(traceID string) []sdktrace.ReadOnlySpan {
	spans := slices.DeleteFunc(g.recorder.Ended(), func(s sdktrace.ReadOnlySpan) bool { return s.SpanContext().TraceID().String() != traceID })
	slices.SortStableFunc(spans, func(a, b sdktrace.ReadOnlySpan) int { return a.StartTime().Compare(b.StartTime()) })
	return spans
}

// span returns the nth span of that name in a trace.
func (g *traced) span(t *testing.T, traceID, name string, n int) sdktrace.ReadOnlySpan {
	t.Helper()
	for _, s := range g.spans(traceID) {
		if s.Name() != name {
			continue
		}
		if n--; n == 0 {
			return s
		}
	}
	require.FailNow(t, "no such span", "%s in\n%s", name, g.tree(traceID, ""))
	return nil
}

// tree draws the spans of a trace that come after parent (a span id, "" for
// none), one a line, each below and to the right of its parent. What does not
// hang together comes last.
func (g *traced) tree(traceID, parent string) string {
	spans, names, drawn := g.spans(traceID), map[trace.SpanID]string{}, 0
	for _, s := range spans {
		names[s.SpanContext().SpanID()] = s.Name()
	}
	var b strings.Builder
	var draw func(parent, indent string)
	draw = func(parent, indent string) {
		for _, s := range spans {
			if s.Parent().SpanID().String() != parent {
				continue
			}
			drawn++
			fmt.Fprintf(&b, "%s%s %s", indent, s.SpanKind(), s.Name())
			for _, link := range s.Links() {
				fmt.Fprintf(&b, ", linked to %s", cmp.Or(names[link.SpanContext.SpanID()], "another trace"))
			}
			b.WriteByte('\n')
			draw(s.SpanContext().SpanID().String(), indent+"  ")
		}
	}
	draw(cmp.Or(parent, trace.SpanID{}.String()), "")
	if lost := len(spans) - drawn; lost > 0 {
		fmt.Fprintf(&b, "and %d spans elsewhere\n", lost)
	}
	return b.String()
}

// requireLines checks that there are at least so many log lines about an order,
// and that all of them name its trace.
func (g *traced) requireLines(t *testing.T, o orderView, atLeast int) {
	t.Helper()
	lines := 0
	for line := range strings.Lines(g.logs.String()) {
		var entry struct {
			OrderID string `json:"order_id"`
			TraceID string `json:"trace_id"`
		}
		require.NoError(t, json.Unmarshal([]byte(line), &entry), line)
		if entry.OrderID == o.ID {
			require.Equal(t, o.TraceID, entry.TraceID, line)
			lines++
		}
	}
	require.GreaterOrEqual(t, lines, atLeast, "log lines about the order")
}

func attributesOf(s sdktrace.ReadOnlySpan) map[string]string {
	values := map[string]string{}
	for _, kv := range s.Attributes() {
		values[string(kv.Key)] = kv.Value.String()
	}
	return values
}

// traceparent is the W3C header that names a span as the caller's.
func traceparent(traceID, spanID, flags string) string {
	return "00-" + traceID + "-" + spanID + "-" + flags
}

// The trace and span of a client that has its own.
const (
	clientTrace = "4bf92f3577b34da6a3ce929d0e0e4736"
	clientSpan  = "00f067aa0ba902b7"
)

// What a trace looks like: the request, and each attempt below it.
const (
	requestTree = "server POST /orders\n"
	attemptTree = `  producer publish orders.submitted
    consumer process orders.submitted
      client POST
      producer publish orders.outcome
        consumer process orders.outcome
`
	savedTree = requestTree + attemptTree
)

func TestOneTraceLeadsFromTheClientThroughTheBrokerToTheBackend(t *testing.T) {
	g := serveTraced(t, nil)
	o := g.post(t, "A-1", "Traceparent", traceparent(clientTrace, clientSpan, "01"), "Tracestate", "vendor=x,other=y")
	g.await(t, o, "saved")
	g.stop()

	require.Equal(t, clientTrace, o.TraceID)
	require.Equal(t, savedTree, g.tree(clientTrace, clientSpan))
	call := g.span(t, clientTrace, "POST", 1)
	sent, state := g.backendCall(t, "A-1")
	require.Equal(t, traceparent(clientTrace, call.SpanContext().SpanID().String(), "01"), sent, "the backend's own span is a child of the call's")
	require.Equal(t, "vendor=x,other=y", state)
	for _, s := range g.spans(clientTrace) {
		require.Equal(t, "vendor=x,other=y", s.SpanContext().TraceState().String(), s.Name())
		require.Equal(t, codes.Unset, s.Status().Code, s.Name())
	}
	require.Len(t, g.recorder.Ended(), len(g.recorder.Started()), "spans that never end are never exported")
	g.requireLines(t, o, 3) // accepted, called, stored

	messaging := func(operation, operationType, topic, group, id string) map[string]string {
		attributes := map[string]string{
			"messaging.system":           "gochannel",
			"messaging.destination.name": topic,
			"messaging.operation.name":   operation,
			"messaging.operation.type":   operationType,
			"messaging.message.id":       id,
		}
		if group != "" {
			attributes["messaging.consumer.group.name"] = group
		}
		return attributes
	}
	for name, want := range map[string]map[string]string{
		"publish orders.submitted": messaging("publish", "send", "orders.submitted", "", o.ID+".1"),
		"process orders.submitted": messaging("process", "process", "orders.submitted", "dispatch", o.ID+".1"),
		"publish orders.outcome":   messaging("publish", "send", "orders.outcome", "", o.ID+".1.order.saved.v1"),
		"process orders.outcome":   messaging("process", "process", "orders.outcome", "intake", o.ID+".1.order.saved.v1"),
	} {
		require.Equal(t, want, attributesOf(g.span(t, clientTrace, name, 1)), name)
	}
	for name, status := range map[string]string{"POST /orders": "202", "POST": "200"} {
		attributes := attributesOf(g.span(t, clientTrace, name, 1))
		require.Equal(t, "POST", attributes["http.request.method"], name)
		require.Equal(t, status, attributes["http.response.status_code"], name)
	}
	require.Equal(t, g.backendURL+"/orders", attributesOf(call)["url.full"])
}

func TestEachAttemptHasItsOwnSpansInTheOrdersTrace(t *testing.T) {
	g := serveTraced(t, nil)
	require.NoError(t, g.backend.Configure(func(c *backend.Config) { c.FailNext = 2 }))
	o := g.post(t, "A-1", "Traceparent", traceparent(clientTrace, clientSpan, "01"), "Tracestate", "vendor=x")
	g.await(t, o, "saved")
	g.stop()

	require.Equal(t, requestTree+strings.Repeat(attemptTree, 3), g.tree(clientTrace, clientSpan))
	for i, status := range []string{"503", "503", "200"} {
		for _, name := range []string{"publish orders.submitted", "process orders.submitted"} {
			require.Equal(t, fmt.Sprintf("%s.%d", o.ID, i+1), attributesOf(g.span(t, clientTrace, name, i+1))["messaging.message.id"])
		}
		call := g.span(t, clientTrace, "POST", i+1)
		require.Equal(t, g.span(t, clientTrace, "process orders.submitted", i+1).SpanContext().SpanID(), call.Parent().SpanID())
		require.Equal(t, status, attributesOf(call)["http.response.status_code"])
		require.Equal(t, status == "503", call.Status().Code == codes.Error)
	}
	sent, state := g.backendCall(t, "A-1")
	require.Equal(t, traceparent(clientTrace, g.span(t, clientTrace, "POST", 3).SpanContext().SpanID().String(), "01"), sent)
	require.Equal(t, "vendor=x", state)
	g.requireLines(t, o, 1+3*2)
}

func TestADeadOrderStaysInItsTraceAlsoWhenItIsReplayed(t *testing.T) {
	g := serveTraced(t, func(cfg *config.Config, _ *telemetry.Telemetry) { cfg.Dispatch.MaxAttempts = 1 })
	require.NoError(t, g.backend.Configure(func(c *backend.Config) { c.FailNext = 1 }))
	o := g.post(t, "A-1", "Traceparent", traceparent(clientTrace, clientSpan, "01"))
	g.await(t, o, "dead")
	// A replay that comes before the news is out makes them no news.
	const newsTree = "  producer publish orders.outcome\n    consumer process orders.outcome\n"
	require.Eventually(t, func() bool { return g.tree(clientTrace, clientSpan) == savedTree+newsTree }, 10*time.Second, 5*time.Millisecond)
	// The operator's request is a trace of its own; the order goes on in its.
	g.do(t, http.StatusAccepted, http.MethodPost, g.admin+"/admin/orders/"+o.ID+"/replay", "", &orderView{})
	g.await(t, o, "saved")
	g.stop()

	require.Equal(t, savedTree+newsTree+attemptTree, g.tree(clientTrace, clientSpan))
	require.Equal(t, o.ID+".1.order.dead.v1", attributesOf(g.span(t, clientTrace, "publish orders.outcome", 2))["messaging.message.id"])
	g.requireLines(t, o, 1+2+1+2) // with the replay
}

// stumbling is a propagator that panics the first time it is to put a trace on
// such a carrier: the one fault that can be let into a handler from outside.
type stumbling struct {
	propagation.TextMapPropagator
	over     func(propagation.TextMapCarrier) bool
	stumbled atomic.Bool
}

func (p *stumbling) Inject(ctx context.Context, carrier propagation.TextMapCarrier) {
	if p.over(carrier) && p.stumbled.CompareAndSwap(false, true) {
		panic("stumbled")
	}
	p.TextMapPropagator.Inject(ctx, carrier)
}

func TestARedeliveryIsLinkedAndNoChildOfTheProducer(t *testing.T) {
	g := serveTraced(t, func(_ *config.Config, tel *telemetry.Telemetry) {
		tel.Propagator = &stumbling{TextMapPropagator: tel.Propagator, over: func(carrier propagation.TextMapCarrier) bool {
			_, request := carrier.(propagation.HeaderCarrier) // to the backend
			return request
		}}
	})
	o := g.post(t, "A-1", "Traceparent", traceparent(clientTrace, clientSpan, "01"))
	g.await(t, o, "saved")
	g.stop()

	require.Equal(t, `server POST /orders
  producer publish orders.submitted
    consumer process orders.submitted
      client POST
  consumer process orders.submitted, linked to publish orders.submitted
    client POST
    producer publish orders.outcome
      consumer process orders.outcome
`, g.tree(clientTrace, clientSpan))
	failed, again := g.span(t, clientTrace, "process orders.submitted", 1), g.span(t, clientTrace, "process orders.submitted", 2)
	require.Equal(t, "panic", attributesOf(failed)["error.type"])
	require.Equal(t, codes.Unset, again.Status().Code)
	require.Equal(t, attributesOf(failed)["messaging.message.id"], attributesOf(again)["messaging.message.id"])
	sent, _ := g.backendCall(t, "A-1")
	require.Equal(t, traceparent(clientTrace, g.span(t, clientTrace, "POST", 2).SpanContext().SpanID().String(), "01"), sent)
}

func TestAPanicOfARequestIsLoggedWithItsTrace(t *testing.T) {
	g := serveTraced(t, func(_ *config.Config, tel *telemetry.Telemetry) {
		tel.Propagator = &stumbling{TextMapPropagator: tel.Propagator, over: func(propagation.TextMapCarrier) bool { return true }}
	})
	var problem struct{ Type, Detail string }
	g.do(t, http.StatusInternalServerError, http.MethodPost, g.url+"/orders", orderBody("A-1"), &problem,
		"Traceparent", traceparent(clientTrace, clientSpan, "01"))
	require.Equal(t, "/problems/internal-error", problem.Type)
	g.stop()
	server := g.span(t, clientTrace, "POST /orders", 1)
	require.Equal(t, codes.Error, server.Status().Code)
	require.Equal(t, "500", attributesOf(server)["http.response.status_code"])
	require.Regexp(t, `"msg":"handler panicked",.*"trace_id":"`+clientTrace+`"`, g.logs.String())
}

func TestWithoutAUsableTraceparentATraceBegins(t *testing.T) {
	g := serveTraced(t, nil)
	orders := map[string]orderView{}
	for number, header := range map[string]string{
		"absent":    "",
		"malformed": "00-xyz-00f067aa0ba902b7-01",
		"zero":      traceparent(strings.Repeat("0", 32), clientSpan, "01"),
	} {
		orders[number] = g.post(t, number, "Traceparent", header)
		g.await(t, orders[number], "saved")
	}
	g.stop()

	seen := map[string]bool{}
	for number, o := range orders {
		require.Len(t, o.TraceID, 32, number)
		require.False(t, seen[o.TraceID], "each begins its own")
		seen[o.TraceID] = true
		require.Equal(t, savedTree, g.tree(o.TraceID, ""), number)
		sent, _ := g.backendCall(t, number)
		require.Equal(t, traceparent(o.TraceID, g.span(t, o.TraceID, "POST", 1).SpanContext().SpanID().String(), "01"), sent)
		g.requireLines(t, o, 3)
	}
}

func TestATraceThatIsNotSampledIsHandedOnAndNotRecorded(t *testing.T) {
	g := serveTraced(t, nil)
	o := g.post(t, "A-1", "Traceparent", traceparent(clientTrace, clientSpan, "00"), "Tracestate", "vendor=x")
	g.await(t, o, "saved")
	g.stop()

	require.Equal(t, clientTrace, o.TraceID)
	require.Empty(t, g.spans(clientTrace))
	sent, state := g.backendCall(t, "A-1")
	require.Regexp(t, "^00-"+clientTrace+"-[0-9a-f]{16}-00$", sent)
	require.NotContains(t, sent, clientSpan)
	require.Equal(t, "vendor=x", state)
	g.requireLines(t, o, 3)
}

func TestARepeatedRequestHasATraceOfItsOwnAndTheOrderKeepsIts(t *testing.T) {
	const otherTrace = "0af7651916cd43dd8448eb211c80319c"
	g := serveTraced(t, nil)
	o := g.post(t, "A-1", "Traceparent", traceparent(clientTrace, clientSpan, "01"))
	g.await(t, o, "saved")
	require.Equal(t, o.TraceID, g.post(t, "A-1", "Traceparent", traceparent(otherTrace, clientSpan, "01")).TraceID)
	g.stop()
	require.Equal(t, savedTree, g.tree(clientTrace, clientSpan))
	require.Equal(t, requestTree, g.tree(otherTrace, clientSpan))
}

func TestADirectOrderIsOneTraceToo(t *testing.T) {
	g := serveTraced(t, nil)
	var o orderView
	g.do(t, http.StatusOK, http.MethodPost, g.url+"/orders/sync", orderBody("A-1"), &o,
		"Traceparent", traceparent(clientTrace, clientSpan, "01"), "Tracestate", "vendor=x")
	g.stop()
	require.Equal(t, clientTrace, o.TraceID)
	require.Equal(t, "server POST /orders/sync\n  client POST\n", g.tree(clientTrace, clientSpan))
	sent, state := g.backendCall(t, "A-1")
	require.Equal(t, traceparent(clientTrace, g.span(t, clientTrace, "POST", 1).SpanContext().SpanID().String(), "01"), sent)
	require.Equal(t, "vendor=x", state)
}

func TestASpanSaysWhichClientAskedAndNothingSaysItsKey(t *testing.T) {
	key, entry, err := httpserver.NewAPIKey("shop")
	require.NoError(t, err)
	g := serveTraced(t, func(cfg *config.Config, _ *telemetry.Telemetry) { cfg.HTTP.APIKeys = httpserver.APIKeys{entry} })
	g.post(t, "A-1", "Traceparent", traceparent(clientTrace, clientSpan, "01"), "Authorization", "Bearer "+key)
	g.stop()
	require.Equal(t, "shop", attributesOf(g.span(t, clientTrace, "POST /orders", 1))["sluice.client"])
	require.Contains(t, g.logs.String(), `"client":"shop"`)
	for _, span := range g.recorder.Ended() {
		require.NotContains(t, fmt.Sprint(attributesOf(span)), key)
	}
	require.NotContains(t, g.logs.String(), key)
	require.NotContains(t, g.logs.String(), entry[len("shop:"):])
}

// Orders share the relay's turns, the transactions and the connections, but
// never a trace.
func TestManyOrdersAtOnceKeepTheirTracesApart(t *testing.T) {
	g := serveTraced(t, func(cfg *config.Config, _ *telemetry.Telemetry) { cfg.Dispatch.Concurrency = 8 })
	const n = 64
	answers, errs := make([][]byte, n), make([]error, n)
	traceID := func(i int) string { return fmt.Sprintf("%032x", i+1) }
	var wg sync.WaitGroup
	for worker := range 8 {
		wg.Go(func() {
			for i := worker; i < n; i += 8 {
				_, answers[i], errs[i] = g.send(t.Context(), http.MethodPost, g.url+"/orders", orderBody(fmt.Sprintf("A-%d", i)),
					"Traceparent", traceparent(traceID(i), clientSpan, "01"))
			}
		})
	}
	wg.Wait()
	orders := make([]orderView, n)
	for i := range orders {
		require.NoError(t, errs[i])
		require.NoError(t, json.Unmarshal(answers[i], &orders[i]), string(answers[i]))
		g.await(t, orders[i], "saved")
	}
	g.stop()
	for i, o := range orders {
		require.Equal(t, traceID(i), o.TraceID)
		require.Equal(t, savedTree, g.tree(o.TraceID, clientSpan))
		for _, s := range g.spans(o.TraceID) {
			if id := attributesOf(s)["messaging.message.id"]; id != "" {
				require.True(t, strings.HasPrefix(id, o.ID), s.Name())
			}
		}
		sent, _ := g.backendCall(t, fmt.Sprintf("A-%d", i))
		require.Equal(t, traceparent(o.TraceID, g.span(t, o.TraceID, "POST", 1).SpanContext().SpanID().String(), "01"), sent)
		g.requireLines(t, o, 3)
	}
}
