package middleware

import (
	"fmt"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	semconv "go.opentelemetry.io/otel/semconv/v1.43.0"
)

// Metrics measures how long the handler takes, everything inside the middleware
// included, as the histogram messaging.process.duration in seconds. Its
// attributes are the handler's name and, if it failed, error.type: "canceled",
// "timeout", "panic" or "_OTHER". The error is the meter's.
func Metrics(meter metric.Meter, handler string) (message.HandlerMiddleware, error) {
	duration, err := meter.Float64Histogram("messaging.process.duration",
		metric.WithUnit("s"),
		metric.WithDescription("Duration of processing a message."),
		metric.WithExplicitBucketBoundaries(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10),
	)
	if err != nil {
		return nil, fmt.Errorf("create histogram of handler %s: %w", handler, err)
	}
	common := []attribute.KeyValue{
		attribute.String("sluice.handler", handler),
		semconv.MessagingOperationName("process"),
	}
	succeeded := metric.WithAttributeSet(attribute.NewSet(common...))
	failed := func(errorType string) metric.RecordOption {
		return metric.WithAttributes(append(common[:len(common):len(common)], semconv.ErrorTypeKey.String(errorType))...)
	}

	return func(h message.HandlerFunc) message.HandlerFunc {
		return func(msg *message.Message) (produced []*message.Message, err error) {
			start := time.Now()
			panicked := true
			defer func() {
				attributes := metric.RecordOption(succeeded)
				switch {
				case panicked:
					attributes = failed(errorTypePanic)
				case err != nil:
					attributes = failed(errorType(err))
				}
				duration.Record(msg.Context(), time.Since(start).Seconds(), attributes)
			}()
			produced, err = h(msg)
			panicked = false
			return produced, err
		}
	}, nil
}
