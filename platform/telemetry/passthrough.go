package telemetry

import (
	"context"
	"encoding/binary"
	"math/rand/v2"

	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/embedded"
)

// passthrough is the TracerProvider of a process whose spans nobody collects.
// It makes no spans: what comes with a trace goes on in it unchanged, so that
// the next one who records is a child of the last one who did, with no unknown
// span between them; what comes without begins a trace that is not sampled, so
// that there is an id to log and to show. Its spans record nothing and cost next to nothing.
type passthrough struct{ embedded.TracerProvider }

// Tracer implements trace.TracerProvider.
func (passthrough) Tracer(string, ...trace.TracerOption) trace.Tracer { return passthroughTracer{} }

type passthroughTracer struct{ embedded.Tracer }

// Start implements trace.Tracer. The options are about spans, and there is none.
func (passthroughTracer) Start(ctx context.Context, _ string, _ ...trace.SpanStartOption) (context.Context, trace.Span) {
	if !trace.SpanContextFromContext(ctx).IsValid() {
		ctx = trace.ContextWithSpanContext(ctx, newTrace())
	}
	return ctx, trace.SpanFromContext(ctx)
}

// newTrace returns the context of a new trace. Its ids are random and no
// secret (W3C Trace Context, section 5).
func newTrace() trace.SpanContext {
	var traceID trace.TraceID
	var spanID trace.SpanID
	for !traceID.IsValid() {
		binary.NativeEndian.PutUint64(traceID[:8], rand.Uint64())
		binary.NativeEndian.PutUint64(traceID[8:], rand.Uint64())
	}
	for !spanID.IsValid() {
		binary.NativeEndian.PutUint64(spanID[:], rand.Uint64())
	}
	return trace.NewSpanContext(trace.SpanContextConfig{TraceID: traceID, SpanID: spanID})
}
