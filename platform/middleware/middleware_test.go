package middleware_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"
	"go.uber.org/goleak"

	"sluice/platform/middleware"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

var errHandler = errors.New("handler failed")

func failing(*message.Message) ([]*message.Message, error) { return nil, errHandler }

func panicking(*message.Message) ([]*message.Message, error) { panic("handler panics") }

func producing(msgs ...*message.Message) message.HandlerFunc {
	return func(*message.Message) ([]*message.Message, error) { return msgs, nil }
}

func newMessage(id string) *message.Message {
	return message.NewMessage(id, []byte("payload of "+id))
}

// recorder is a publisher that keeps what it is given.
type recorder struct {
	mu        sync.Mutex
	published []*message.Message
	topics    []string
	fail      func(try int) error // by the number of the call from 1, nil for never
	tries     int
}

func (r *recorder) Publish(topic string, msgs ...*message.Message) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.tries++
	if r.fail != nil {
		if err := r.fail(r.tries); err != nil {
			return err
		}
	}
	for _, msg := range msgs {
		r.topics = append(r.topics, topic)
		r.published = append(r.published, msg)
	}
	return nil
}

func (r *recorder) Close() error { return nil }

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

func TestChainCallsTheFirstMiddlewareFirst(t *testing.T) {
	var calls []string
	named := func(name string) message.HandlerMiddleware {
		return func(h message.HandlerFunc) message.HandlerFunc {
			return func(msg *message.Message) ([]*message.Message, error) {
				calls = append(calls, name)
				return h(msg)
			}
		}
	}
	_, err := middleware.Chain(failing, named("outer"), named("inner"))(newMessage("1"))
	require.ErrorIs(t, err, errHandler)
	require.Equal(t, []string{"outer", "inner"}, calls)
	_, err = middleware.Chain(failing)(newMessage("1"))
	require.ErrorIs(t, err, errHandler)
}

func TestRecover(t *testing.T) {
	t.Run("turns a panic into an error and logs where it came from", func(t *testing.T) {
		var log bytes.Buffer
		h := middleware.Chain(panicking, middleware.Recover(slog.New(slog.NewJSONHandler(&log, nil))))
		sc := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}})
		msg := newMessage("1")
		msg.SetContext(trace.ContextWithSpanContext(t.Context(), sc))
		produced, err := h(msg)
		require.EqualError(t, err, "handler panicked: handler panics")
		require.Empty(t, produced)

		var line struct {
			Level, Msg, Panic, Stack string
			MessageID                string `json:"message_id"`
			TraceID                  string `json:"trace_id"`
		}
		require.NoError(t, json.Unmarshal(log.Bytes(), &line))
		require.Equal(t, "ERROR", line.Level)
		require.Equal(t, "handler panicked", line.Msg)
		require.Equal(t, "handler panics", line.Panic)
		require.Equal(t, "1", line.MessageID)
		require.Equal(t, sc.TraceID().String(), line.TraceID)
		require.Contains(t, line.Stack, "middleware_test.panicking")
	})

	t.Run("lets results and errors pass", func(t *testing.T) {
		want := newMessage("2")
		produced, err := middleware.Chain(producing(want), middleware.Recover(discard()))(newMessage("1"))
		require.NoError(t, err)
		require.Equal(t, []*message.Message{want}, produced)
		_, err = middleware.Chain(failing, middleware.Recover(discard()))(newMessage("1"))
		require.Equal(t, errHandler, err)
	})
}

// Trap: Watermill's Timeout leaves a context behind that is over.
func TestTimeout(t *testing.T) {
	waiting := func(msg *message.Message) ([]*message.Message, error) {
		<-msg.Context().Done()
		return nil, msg.Context().Err()
	}

	t.Run("ends the handler's context and gives the message its own back", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			msg := newMessage("1")
			own, cancel := context.WithCancel(t.Context())
			defer cancel()
			msg.SetContext(own)
			start := time.Now()
			_, err := middleware.Chain(waiting, middleware.Timeout(time.Second))(msg)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.Equal(t, time.Second, time.Since(start))
			require.Equal(t, own, msg.Context())
			require.NoError(t, msg.Context().Err())
		})
	})

	t.Run("gives it back after a success and after a panic", func(t *testing.T) {
		msg := newMessage("1")
		_, err := middleware.Chain(producing(), middleware.Timeout(time.Hour))(msg)
		require.NoError(t, err)
		require.NoError(t, msg.Context().Err())
		require.Panics(t, func() { _, _ = middleware.Chain(panicking, middleware.Timeout(time.Hour))(msg) })
		require.NoError(t, msg.Context().Err())
		_, limited := msg.Context().Deadline()
		require.False(t, limited)
	})

	t.Run("ends with the message's own context", func(t *testing.T) {
		msg := newMessage("1")
		own, cancel := context.WithCancel(t.Context())
		msg.SetContext(own)
		cancel()
		_, err := middleware.Chain(waiting, middleware.Timeout(time.Hour))(msg)
		require.ErrorIs(t, err, context.Canceled)
	})

	t.Run("of nothing is no limit", func(t *testing.T) {
		msg := newMessage("1")
		_, err := middleware.Chain(func(msg *message.Message) ([]*message.Message, error) {
			_, limited := msg.Context().Deadline()
			require.False(t, limited)
			return nil, nil
		}, middleware.Timeout(0))(msg)
		require.NoError(t, err)
	})
}
