package middleware_test

import (
	"context"
	"testing"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/baggage"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"

	"sluice/platform/middleware"
)

var propagator = propagation.NewCompositeTextMapPropagator(propagation.TraceContext{}, propagation.Baggage{})

const keyAgain = "again"

func again(msg *message.Message) bool { return msg.Metadata.Get(keyAgain) != "" }

// tracing is a publisher and a consumer with the spans that they made.
type tracing struct {
	t        *testing.T
	spans    *tracetest.InMemoryExporter
	provider *sdktrace.TracerProvider
	sent     recorder
	pub      message.Publisher
	mw       message.HandlerMiddleware
}

func newTracing(t *testing.T, options ...sdktrace.TracerProviderOption) *tracing {
	tr := &tracing{t: t, spans: tracetest.NewInMemoryExporter()}
	tr.provider = sdktrace.NewTracerProvider(append(options, sdktrace.WithSyncer(tr.spans))...)
	t.Cleanup(func() { require.NoError(t, tr.provider.Shutdown(context.Background())) })
	tr.pub = middleware.TracingPublisher(&tr.sent, tr.provider, propagator, "gochannel")
	tr.mw = middleware.Tracing(tr.provider, propagator, "gochannel", "dispatch", again)
	return tr
}

// publish publishes a message within a server span and returns its copy, as a
// broker would.
func (tr *tracing) publish(ctx context.Context) *message.Message {
	ctx, server := tr.provider.Tracer("test").Start(ctx, "POST /orders")
	msg := newMessage("1")
	msg.SetContext(ctx)
	require.NoError(tr.t, tr.pub.Publish("orders.submitted", msg))
	server.End()
	return tr.sent.published[len(tr.sent.published)-1].Copy()
}

// consume has the router deliver msg to h.
func (tr *tracing) consume(msg *message.Message, h message.HandlerFunc) error {
	router, err := message.NewRouter(message.RouterConfig{}, nil)
	require.NoError(tr.t, err)
	source := make(subscriberChannel, 1)
	result := make(chan error, 1)
	router.AddConsumerHandler("dispatch", "orders.submitted", source, func(msg *message.Message) error {
		_, err := middleware.Chain(h, middleware.Recover(discard()), tr.mw)(msg)
		result <- err
		return nil
	})
	source <- msg
	close(source)
	require.NoError(tr.t, router.Run(context.Background()))
	return <-result
}

type subscriberChannel chan *message.Message

func (s subscriberChannel) Subscribe(context.Context, string) (<-chan *message.Message, error) {
	return s, nil
}

func (s subscriberChannel) Close() error { return nil }

func (tr *tracing) span(name string) tracetest.SpanStub {
	tr.t.Helper()
	var found []tracetest.SpanStub
	for _, span := range tr.spans.GetSpans() {
		if span.Name == name {
			found = append(found, span)
		}
	}
	require.Len(tr.t, found, 1, "spans named %q", name)
	return found[0]
}

func attributes(span tracetest.SpanStub) map[attribute.Key]string {
	result := make(map[attribute.Key]string)
	for _, kv := range span.Attributes {
		result[kv.Key] = kv.Value.AsString()
	}
	return result
}

func TestTracingFirstDelivery(t *testing.T) {
	tr := newTracing(t)
	member, err := baggage.NewMember("tenant", "a")
	require.NoError(t, err)
	bag, err := baggage.New(member)
	require.NoError(t, err)
	msg := tr.publish(baggage.ContextWithBaggage(t.Context(), bag))
	var inHandler trace.SpanContext
	require.NoError(t, tr.consume(msg, func(msg *message.Message) ([]*message.Message, error) {
		inHandler = trace.SpanContextFromContext(msg.Context())
		require.Equal(t, "a", baggage.FromContext(msg.Context()).Member("tenant").Value())
		return nil, nil
	}))

	server, producer, consumer := tr.span("POST /orders"), tr.span("publish orders.submitted"), tr.span("process orders.submitted")
	require.Equal(t, trace.SpanKindProducer, producer.SpanKind)
	require.Equal(t, server.SpanContext.SpanID(), producer.Parent.SpanID())
	require.Equal(t, map[attribute.Key]string{
		"messaging.system":           "gochannel",
		"messaging.destination.name": "orders.submitted",
		"messaging.operation.name":   "publish",
		"messaging.operation.type":   "send",
		"messaging.message.id":       "1",
	}, attributes(producer))

	require.Equal(t, trace.SpanKindConsumer, consumer.SpanKind)
	require.Equal(t, producer.SpanContext.SpanID(), consumer.Parent.SpanID())
	require.True(t, consumer.Parent.IsRemote())
	require.Equal(t, server.SpanContext.TraceID(), consumer.SpanContext.TraceID())
	require.Empty(t, consumer.Links)
	require.Equal(t, consumer.SpanContext.SpanID(), inHandler.SpanID())
	require.Equal(t, codes.Unset, consumer.Status.Code)
	require.Equal(t, map[attribute.Key]string{
		"messaging.system":              "gochannel",
		"messaging.destination.name":    "orders.submitted",
		"messaging.consumer.group.name": "dispatch",
		"messaging.operation.name":      "process",
		"messaging.operation.type":      "process",
		"messaging.message.id":          "1",
	}, attributes(consumer))
}

func TestTracingRedelivery(t *testing.T) {
	t.Run("is linked to the producer span, in the same trace", func(t *testing.T) {
		tr := newTracing(t)
		msg := tr.publish(t.Context())
		msg.Metadata.Set(keyAgain, "true")
		require.NoError(t, tr.consume(msg, producing()))
		server, producer, consumer := tr.span("POST /orders"), tr.span("publish orders.submitted"), tr.span("process orders.submitted")
		require.Equal(t, server.SpanContext.TraceID(), consumer.SpanContext.TraceID())
		require.Equal(t, server.SpanContext.SpanID(), consumer.Parent.SpanID())
		require.Len(t, consumer.Links, 1)
		require.Equal(t, producer.SpanContext.SpanID(), consumer.Links[0].SpanContext.SpanID())
		require.Equal(t, "orders.submitted", attributes(consumer)["messaging.destination.name"])
	})

	t.Run("has only the link when nothing was there before the producer span", func(t *testing.T) {
		tr := newTracing(t)
		msg := newMessage("1")
		require.NoError(t, tr.pub.Publish("orders.submitted", msg))
		msg = msg.Copy()
		msg.Metadata.Set(keyAgain, "true")
		require.NoError(t, tr.consume(msg, producing()))
		producer, consumer := tr.span("publish orders.submitted"), tr.span("process orders.submitted")
		require.False(t, consumer.Parent.IsValid())
		require.NotEqual(t, producer.SpanContext.TraceID(), consumer.SpanContext.TraceID())
		require.Len(t, consumer.Links, 1)
		require.Equal(t, producer.SpanContext.SpanID(), consumer.Links[0].SpanContext.SpanID())
	})

	t.Run("works without any trace", func(t *testing.T) {
		tr := newTracing(t)
		msg := newMessage("1")
		msg.Metadata.Set(keyAgain, "true")
		require.NoError(t, tr.consume(msg, producing()))
		consumer := tr.span("process orders.submitted")
		require.True(t, consumer.SpanContext.IsValid())
		require.Empty(t, consumer.Links)
	})
}

func TestTracingFailures(t *testing.T) {
	for name, test := range map[string]struct {
		handler     message.HandlerFunc
		errorType   string
		description string
	}{
		"an error": {failing, "_OTHER", "handler failed"},
		"a time limit": {func(*message.Message) ([]*message.Message, error) {
			return nil, context.DeadlineExceeded
		}, "timeout", "context deadline exceeded"},
		"a panic": {panicking, "panic", "handler panicked"},
	} {
		t.Run(name+" marks the consumer span", func(t *testing.T) {
			tr := newTracing(t)
			require.Error(t, tr.consume(tr.publish(t.Context()), test.handler))
			consumer := tr.span("process orders.submitted")
			require.Equal(t, codes.Error, consumer.Status.Code)
			require.Equal(t, test.description, consumer.Status.Description)
			require.Equal(t, test.errorType, attributes(consumer)["error.type"])
		})
	}

	t.Run("a refused publish marks every producer span of the call", func(t *testing.T) {
		tr := newTracing(t)
		tr.sent.fail = func(int) error { return errBroker }
		require.Equal(t, errBroker, tr.pub.Publish("topic", newMessage("1"), newMessage("2")))
		spans := tr.spans.GetSpans()
		require.Len(t, spans, 2)
		for _, span := range spans {
			require.Equal(t, codes.Error, span.Status.Code)
			require.Equal(t, errBroker.Error(), span.Status.Description)
		}
		require.NotEqual(t, spans[0].SpanContext.SpanID(), spans[1].SpanContext.SpanID())
	})
}

func TestTracingPublisherMetadata(t *testing.T) {
	t.Run("carries the trace though nobody records it", func(t *testing.T) {
		tr := newTracing(t, sdktrace.WithSampler(sdktrace.NeverSample()))
		msg := tr.publish(t.Context())
		var inHandler trace.SpanContext
		require.NoError(t, tr.consume(msg, func(msg *message.Message) ([]*message.Message, error) {
			inHandler = trace.SpanContextFromContext(msg.Context())
			return nil, nil
		}))
		require.Empty(t, tr.spans.GetSpans())
		sent := trace.SpanContextFromContext(propagator.Extract(t.Context(), propagation.MapCarrier(msg.Metadata)))
		require.True(t, sent.IsValid())
		require.Equal(t, sent.TraceID(), inHandler.TraceID())
		require.NotEmpty(t, msg.Metadata.Get("origin_traceparent"))
	})

	t.Run("replaces what a message carries of another trace", func(t *testing.T) {
		tr := newTracing(t)
		msg := newMessage("1")
		msg.Metadata = message.Metadata{
			"traceparent":        "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
			"tracestate":         "other=1",
			"baggage":            "other=1",
			"origin_traceparent": "00-0af7651916cd43dd8448eb211c80319c-00f067aa0ba902b7-01",
			"origin_tracestate":  "other=1",
			"key":                "value",
		}
		require.NoError(t, tr.pub.Publish("topic", msg))
		require.Equal(t, "value", msg.Metadata.Get("key"))
		require.Contains(t, msg.Metadata.Get("traceparent"), tr.span("publish topic").SpanContext.TraceID().String())
		require.Len(t, msg.Metadata, 2)
	})

	t.Run("needs neither metadata nor a tracer", func(t *testing.T) {
		var sent recorder
		pub := middleware.TracingPublisher(&sent, noop.NewTracerProvider(), propagator, "gochannel")
		require.NoError(t, pub.Publish("topic", &message.Message{UUID: "1"}))
		require.Empty(t, sent.published[0].Metadata)
		require.NoError(t, pub.Close())
	})

	t.Run("keeps the tracestate for both", func(t *testing.T) {
		tr := newTracing(t)
		state, err := trace.ParseTraceState("vendor=x")
		require.NoError(t, err)
		client := trace.NewSpanContext(trace.SpanContextConfig{
			TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, TraceFlags: trace.FlagsSampled, TraceState: state, Remote: true,
		})
		msg := newMessage("1")
		msg.SetContext(trace.ContextWithRemoteSpanContext(t.Context(), client))
		require.NoError(t, tr.pub.Publish("orders.submitted", msg))
		require.Equal(t, "vendor=x", msg.Metadata.Get("tracestate"))
		require.Equal(t, "vendor=x", msg.Metadata.Get("origin_tracestate"))
		msg = msg.Copy()
		msg.Metadata.Set(keyAgain, "true")
		require.NoError(t, tr.consume(msg, producing()))
		require.Equal(t, client.SpanID(), tr.span("process orders.submitted").Parent.SpanID())
	})
}

// The way of a message through publisher and consumer when nobody records.
func BenchmarkTracingUnsampled(b *testing.B) {
	provider := sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.NeverSample()))
	pub := middleware.TracingPublisher(publisherFunc(func(string, ...*message.Message) error { return nil }), provider, propagator, "gochannel")
	h := middleware.Chain(producing(), middleware.Tracing(provider, propagator, "gochannel", "dispatch", again))
	parent := trace.ContextWithRemoteSpanContext(b.Context(), trace.NewSpanContext(trace.SpanContextConfig{
		TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, Remote: true,
	}))
	msg := newMessage("1")
	b.ReportAllocs()
	for b.Loop() {
		msg.SetContext(parent)
		if err := pub.Publish("topic", msg); err != nil {
			b.Fatal(err)
		}
		msg.SetContext(b.Context())
		if _, err := h(msg); err != nil {
			b.Fatal(err)
		}
	}
}
