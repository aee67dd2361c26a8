package middleware_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"sluice/platform/middleware"
)

var errBroker = errors.New("broker is gone")

func TestPublish(t *testing.T) {
	t.Run("publishes what the handler produced and leaves nothing to the router", func(t *testing.T) {
		type key struct{}
		var pub recorder
		withContext := newMessage("3")
		withContext.SetContext(context.WithValue(t.Context(), key{}, "own"))
		h := middleware.Chain(producing(newMessage("2"), withContext), middleware.Publish(&pub, "topic", discard()))
		msg := newMessage("1")
		msg.SetContext(context.WithValue(t.Context(), key{}, "consumed"))
		produced, err := h(msg)
		require.NoError(t, err)
		require.Empty(t, produced)
		require.Equal(t, []string{"topic", "topic"}, pub.topics)
		require.Equal(t, 1, pub.tries)
		require.Equal(t, "2", pub.published[0].UUID)
		require.Equal(t, "consumed", pub.published[0].Context().Value(key{}))
		require.Equal(t, "own", pub.published[1].Context().Value(key{}))
	})

	t.Run("publishes nothing when there is nothing or the handler failed", func(t *testing.T) {
		var pub recorder
		_, err := middleware.Chain(producing(), middleware.Publish(&pub, "topic", discard()))(newMessage("1"))
		require.NoError(t, err)
		_, err = middleware.Chain(func(*message.Message) ([]*message.Message, error) {
			return []*message.Message{newMessage("2")}, errHandler
		}, middleware.Publish(&pub, "topic", discard()))(newMessage("1"))
		require.Equal(t, errHandler, err)
		require.Zero(t, pub.tries)
	})

	// Trap: an error of the handler chain means a nack, and nothing in
	// Watermill pauses before the next delivery.
	t.Run("tries until it works, with a growing pause", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var at []time.Duration
			start := time.Now()
			pub := recorder{fail: func(try int) error {
				at = append(at, time.Since(start))
				if try < 9 {
					return errBroker
				}
				return nil
			}}
			var calls int
			var log bytes.Buffer
			h := middleware.Chain(func(*message.Message) ([]*message.Message, error) {
				calls++
				return []*message.Message{newMessage("2")}, nil
			}, middleware.Publish(&pub, "topic", slog.New(slog.NewTextHandler(&log, nil))))
			_, err := h(newMessage("1"))
			require.NoError(t, err)
			require.Equal(t, 1, calls, "the work itself is not repeated")
			require.Len(t, pub.published, 1)
			var pauses []time.Duration
			for i := 1; i < len(at); i++ {
				pauses = append(pauses, at[i]-at[i-1])
			}
			require.Equal(t, []time.Duration{
				100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond,
				1600 * time.Millisecond, 3200 * time.Millisecond, 5 * time.Second, 5 * time.Second,
			}, pauses)
			require.Equal(t, 1, strings.Count(log.String(), "\n"), "one line for each message, not for each try")
			require.Contains(t, log.String(), errBroker.Error())
		})
	})

	t.Run("gives up when the context of the consumed message ends", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			pub := recorder{fail: func(int) error { return errBroker }}
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			msg := newMessage("1")
			msg.SetContext(ctx)
			start := time.Now()
			produced, err := middleware.Chain(producing(newMessage("2")), middleware.Publish(&pub, "topic", discard()))(msg)
			require.ErrorIs(t, err, context.DeadlineExceeded)
			require.ErrorIs(t, err, errBroker)
			require.ErrorContains(t, err, "publish to topic")
			require.Empty(t, produced)
			require.Equal(t, time.Second, time.Since(start))
			require.Equal(t, 4, pub.tries)
		})
	})

	t.Run("tries once when the context is over already", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for _, fails := range []error{nil, errBroker} {
			pub := recorder{fail: func(int) error { return fails }}
			msg := newMessage("1")
			msg.SetContext(ctx)
			_, err := middleware.Chain(producing(newMessage("2")), middleware.Publish(&pub, "topic", discard()))(msg)
			require.ErrorIs(t, err, fails)
			require.Equal(t, 1, pub.tries)
		}
	})

	t.Run("holds no permit while it tries", func(t *testing.T) {
		limiter := middleware.NewLimiter(1)
		pub := publisherFunc(func(string, ...*message.Message) error {
			require.Zero(t, limiter.InFlight())
			return nil
		})
		h := middleware.Chain(producing(newMessage("2")), middleware.Publish(pub, "topic", discard()), middleware.Throttle(limiter))
		_, err := h(newMessage("1"))
		require.NoError(t, err)
	})
}
