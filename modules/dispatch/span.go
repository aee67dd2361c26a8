package dispatch

import (
	"net/http"
	"net/url"
	"strconv"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/codes"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
	"go.opentelemetry.io/otel/trace"
)

// The client span of a call, after OpenTelemetry's semantic conventions for
// HTTP client spans. It lasts until the answer is read. otelhttp's transport
// would do, but puts the URL's query, where tokens travel, into the span, and
// works for every call even when nobody records.

// spanOptions are those of every call to u. The user, password and query of
// the URL are left out.
func spanOptions(u *url.URL) []trace.SpanStartOption {
	public := url.URL{Scheme: u.Scheme, Host: u.Host, Path: u.Path, RawPath: u.RawPath}
	if u.RawQuery != "" {
		public.RawQuery = "REDACTED"
	}
	attributes := []attribute.KeyValue{
		semconv.HTTPRequestMethodPost,
		semconv.URLFull(public.String()),
		semconv.ServerAddress(u.Hostname()),
	}
	if port, err := strconv.Atoi(u.Port()); err == nil {
		attributes = append(attributes, semconv.ServerPort(port))
	}
	return []trace.SpanStartOption{trace.WithSpanKind(trace.SpanKindClient), trace.WithAttributes(attributes...)}
}

// describeSpan says what came of a call. err is that of the caller's context.
func describeSpan(span trace.Span, a answer, err error) {
	if !span.IsRecording() {
		return
	}
	if a.status != 0 {
		span.SetAttributes(semconv.HTTPResponseStatusCode(a.status))
	}
	switch {
	case err != nil:
		span.SetAttributes(semconv.ErrorTypeKey.String("canceled"))
		span.SetStatus(codes.Error, err.Error())
	case a.timedOut:
		span.SetAttributes(semconv.ErrorTypeKey.String("timeout"))
		span.SetStatus(codes.Error, errTimeout.Error())
	case a.err != nil:
		span.SetAttributes(semconv.ErrorType(a.err))
		span.SetStatus(codes.Error, a.err.Error())
	case a.status >= http.StatusBadRequest:
		span.SetAttributes(semconv.ErrorTypeKey.String(strconv.Itoa(a.status)))
		span.SetStatus(codes.Error, "")
	}
}
