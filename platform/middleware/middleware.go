// Package middleware holds the middlewares that message handlers are chained
// from: bounded concurrency, a time limit, panics as errors, traces, metrics, a
// poison queue, and publishing that does not give up.
//
// They are for Watermill's router, and are there because Watermill's own do not
// fit: its Throttle is a rate, its Timeout leaves a dead context behind, its
// PoisonQueue publishes with a context that may be cancelled, it has no traces,
// and nothing in it pauses before it tries again. The package knows no topics,
// no broker and no orders.
package middleware

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"slices"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"go.opentelemetry.io/otel/trace"
)

// Chain wraps h in middlewares, of which the first is the outermost.
func Chain(h message.HandlerFunc, mws ...message.HandlerMiddleware) message.HandlerFunc {
	for _, mw := range slices.Backward(mws) {
		h = mw(h)
	}
	return h
}

// Recover turns a panic of the handler into an error, and logs it with its
// stack, since the error does not carry it.
func Recover(logger *slog.Logger) message.HandlerMiddleware {
	return func(h message.HandlerFunc) message.HandlerFunc {
		return func(msg *message.Message) (produced []*message.Message, err error) {
			defer func() {
				recovered := recover()
				if recovered == nil {
					return
				}
				logger.LogAttrs(msg.Context(), slog.LevelError, "handler panicked", append(attrs(msg),
					slog.Any("panic", recovered), slog.String("stack", string(debug.Stack())))...)
				produced, err = nil, fmt.Errorf("handler panicked: %v", recovered)
			}()
			return h(msg)
		}
	}
}

// Timeout gives the handler d to finish: the context of the message ends after
// that, or with the message's own. Afterwards the message has its own context
// back, so that what is outside can still publish and wait with it. The handler
// is not stopped, it has to heed its context. With d of 0 or less there is no
// limit.
func Timeout(d time.Duration) message.HandlerMiddleware {
	return func(h message.HandlerFunc) message.HandlerFunc {
		if d <= 0 {
			return h
		}
		return func(msg *message.Message) ([]*message.Message, error) {
			own := msg.Context()
			ctx, cancel := context.WithTimeout(own, d)
			defer cancel()
			defer msg.SetContext(own)
			msg.SetContext(ctx)
			return h(msg)
		}
	}
}

// attrs are the attributes by which a log line names a message.
func attrs(msg *message.Message) []slog.Attr {
	result := []slog.Attr{
		slog.String("message_id", msg.UUID),
		slog.String("topic", message.SubscribeTopicFromCtx(msg.Context())),
	}
	if sc := trace.SpanContextFromContext(msg.Context()); sc.HasTraceID() {
		result = append(result, slog.String("trace_id", sc.TraceID().String()))
	}
	return result
}

// errorType is a word of few for the attribute error.type.
func errorType(err error) string {
	switch {
	case errors.Is(err, context.Canceled):
		return "canceled"
	case errors.Is(err, context.DeadlineExceeded):
		return "timeout"
	default:
		return "_OTHER"
	}
}

const errorTypePanic = "panic"
