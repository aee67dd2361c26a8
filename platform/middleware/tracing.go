package middleware

import (
	"context"
	"slices"
	"sync"

	"github.com/ThreeDotsLabs/watermill/message"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

// tracerName is the instrumentation scope of the spans.
const tracerName = "sluice/platform/middleware"

// TracingPublisher wraps pub so that each message is published within a
// producer span "publish <topic>", a child of the span in the message's
// context. The message's metadata carries the span to the consumer, in the form
// of prop, and beside it the parent, as origin_traceparent and
// origin_tracestate, from which a redelivery starts (see Tracing). What the
// metadata carried of another trace is overwritten. system names the broker in
// the attributes. The messages of one call that fails all count as failed.
//
// Trace context is carried whether or not the spans are sampled.
func TracingPublisher(pub message.Publisher, tp trace.TracerProvider, prop propagation.TextMapPropagator, system string) message.Publisher {
	return &tracingPublisher{
		Publisher: pub,
		tracer:    tp.Tracer(tracerName),
		prop:      prop,
		fields:    append(slices.Clone(prop.Fields()), originFields...),
		spans: spanTemplates{
			operation: "publish",
			options:   []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindProducer)},
			attributes: []attribute.KeyValue{
				semconv.MessagingSystemKey.String(system),
				semconv.MessagingOperationName("publish"),
				semconv.MessagingOperationTypeSend,
			},
		},
	}
}

// Tracing runs the handler within a consumer span "process <topic>", which is
// in the context of the message from then on, also for what is further out.
//
// On the first delivery the span is a child of the producer span that the
// metadata carries. When redelivered says that the delivery follows another,
// that place is taken: the span then starts from what the producer span started
// from, in the same trace, and is linked to the producer span. If the metadata
// does not say what that was, it starts a trace of its own with the link. system
// and group name the broker and the consumer group in the attributes.
func Tracing(
	tp trace.TracerProvider, prop propagation.TextMapPropagator, system, group string, redelivered func(*message.Message) bool,
) message.HandlerMiddleware {
	tracer := tp.Tracer(tracerName)
	spans := &spanTemplates{
		operation: "process",
		options:   []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindConsumer)},
		attributes: []attribute.KeyValue{
			semconv.MessagingSystemKey.String(system),
			semconv.MessagingConsumerGroupName(group),
			semconv.MessagingOperationName("process"),
			semconv.MessagingOperationTypeProcess,
		},
	}
	return func(h message.HandlerFunc) message.HandlerFunc {
		return func(msg *message.Message) (produced []*message.Message, err error) {
			template := spans.of(message.SubscribeTopicFromCtx(msg.Context()))
			ctx := prop.Extract(msg.Context(), propagation.MapCarrier(msg.Metadata))
			options := template.options
			if redelivered(msg) {
				var again []trace.SpanStartOption
				ctx, again = restart(ctx, msg)
				options = slices.Concat(options, again)
			}
			ctx, span := tracer.Start(ctx, template.name, options...)
			if span.IsRecording() {
				span.SetAttributes(semconv.MessagingMessageID(msg.UUID))
			}
			msg.SetContext(ctx)

			panicked := true
			defer func() {
				switch {
				case panicked:
					fail(span, "handler panicked", errorTypePanic)
				case err != nil:
					fail(span, err.Error(), errorType(err))
				}
				span.End()
			}()
			produced, err = h(msg)
			panicked = false
			return produced, err
		}
	}
}

// restart returns where the span of a redelivered message starts from, given
// the context with the producer span in it.
func restart(ctx context.Context, msg *message.Message) (context.Context, []trace.SpanStartOption) {
	producer := trace.SpanContextFromContext(ctx)
	var options []trace.SpanStartOption
	if producer.IsValid() {
		options = append(options, trace.WithLinks(trace.Link{SpanContext: producer}))
	}
	origin := propagation.TraceContext{}.Extract(
		trace.ContextWithSpanContext(ctx, trace.SpanContext{}), originCarrier(msg.Metadata))
	if !trace.SpanContextFromContext(origin).IsValid() {
		return ctx, append(options, trace.WithNewRoot())
	}
	return origin, options
}

type tracingPublisher struct {
	message.Publisher
	tracer trace.Tracer
	prop   propagation.TextMapPropagator
	fields []string // what a message may carry of a trace
	spans  spanTemplates
}

// Publish implements message.Publisher.
func (p *tracingPublisher) Publish(topic string, msgs ...*message.Message) error {
	template := p.spans.of(topic)
	spans := make([]trace.Span, len(msgs))
	for i, msg := range msgs {
		spans[i] = p.start(template, msg)
	}
	err := p.Publisher.Publish(topic, msgs...)
	for _, span := range spans {
		if err != nil {
			fail(span, err.Error(), errorType(err))
		}
		span.End()
	}
	return err
}

// start begins the span of a message and writes it into the metadata.
func (p *tracingPublisher) start(template *spanTemplate, msg *message.Message) trace.Span {
	parent := msg.Context()
	ctx, span := p.tracer.Start(parent, template.name, template.options...)
	if span.IsRecording() {
		span.SetAttributes(semconv.MessagingMessageID(msg.UUID))
	}
	if msg.Metadata == nil {
		msg.Metadata = make(message.Metadata)
	}
	for _, field := range p.fields {
		delete(msg.Metadata, field)
	}
	p.prop.Inject(ctx, propagation.MapCarrier(msg.Metadata))
	propagation.TraceContext{}.Inject(parent, originCarrier(msg.Metadata))
	return span
}

// originCarrier keeps the trace context of a producer span's parent apart from
// that of the span itself.
type originCarrier message.Metadata

const originPrefix = "origin_"

var originFields = []string{originPrefix + "traceparent", originPrefix + "tracestate"}

func (c originCarrier) Get(key string) string { return c[originPrefix+key] }

func (c originCarrier) Set(key, value string) { c[originPrefix+key] = value }

// Keys is asked for by no propagator that reads fixed fields.
func (c originCarrier) Keys() []string { return originFields }

// spanTemplates keeps what the spans of a topic have in common, so that a span
// that nobody records costs little. There are few topics.
type spanTemplates struct {
	operation  string
	options    []trace.SpanStartOption
	attributes []attribute.KeyValue
	topics     sync.Map // topic to *spanTemplate
}

type spanTemplate struct {
	name    string
	options []trace.SpanStartOption
}

func (s *spanTemplates) of(topic string) *spanTemplate {
	if template, ok := s.topics.Load(topic); ok {
		return template.(*spanTemplate)
	}
	attributes := append(slices.Clone(s.attributes), semconv.MessagingDestinationName(topic))
	template, _ := s.topics.LoadOrStore(topic, &spanTemplate{
		name:    s.operation + " " + topic,
		options: append(slices.Clone(s.options), trace.WithAttributes(attributes...)),
	})
	return template.(*spanTemplate)
}

func fail(span trace.Span, description, errorType string) {
	if !span.IsRecording() {
		return
	}
	span.SetStatus(codes.Error, description)
	span.SetAttributes(semconv.ErrorTypeKey.String(errorType))
}
