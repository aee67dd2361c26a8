package middleware_test

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/ThreeDotsLabs/watermill/message"
	wm "github.com/ThreeDotsLabs/watermill/message/router/middleware"
	"github.com/stretchr/testify/require"

	"sluice/platform/middleware"
)

var errUndecodable = errors.New("undecodable")

func isUndecodable(err error) bool { return errors.Is(err, errUndecodable) }

func undecodable(*message.Message) ([]*message.Message, error) {
	return nil, fmt.Errorf("decode: %w", errUndecodable)
}

func TestPoison(t *testing.T) {
	t.Run("publishes what cannot be decoded, with the reason, and is done with it", func(t *testing.T) {
		var poison recorder
		msg := newMessage("1")
		msg.Metadata.Set("key", "value")
		_, err := middleware.Chain(undecodable, middleware.Poison(&poison, "poison", isUndecodable))(msg)
		require.NoError(t, err)

		require.Equal(t, []string{"poison"}, poison.topics)
		got := poison.published[0]
		require.NotSame(t, msg, got)
		require.Equal(t, "1", got.UUID)
		require.Equal(t, "payload of 1", string(got.Payload))
		require.Equal(t, "value", got.Metadata.Get("key"))
		require.Equal(t, "decode: undecodable", got.Metadata.Get(wm.ReasonForPoisonedKey))
		require.Empty(t, msg.Metadata.Get(wm.ReasonForPoisonedKey), "the consumed message is left alone")
	})

	// Trap: Watermill's PoisonQueue poisons every error, and what a shutdown
	// cancels with it.
	t.Run("lets all other errors and all results pass", func(t *testing.T) {
		var poison recorder
		mw := middleware.Poison(&poison, "poison", isUndecodable)
		_, err := middleware.Chain(failing, mw)(newMessage("1"))
		require.Equal(t, errHandler, err)
		_, err = middleware.Chain(func(*message.Message) ([]*message.Message, error) {
			return nil, context.Canceled
		}, mw)(newMessage("1"))
		require.Equal(t, context.Canceled, err)
		want := newMessage("2")
		produced, err := middleware.Chain(producing(want), mw)(newMessage("1"))
		require.NoError(t, err)
		require.Equal(t, []*message.Message{want}, produced)
		require.Zero(t, poison.tries)
	})

	// Trap: a publisher that heeds the context would refuse the poisoned
	// message during a shutdown.
	t.Run("publishes though the message's context is over", func(t *testing.T) {
		type key struct{}
		var atPublish error
		var bounded bool
		poison := publisherFunc(func(_ string, msgs ...*message.Message) error {
			atPublish = msgs[0].Context().Err()
			_, bounded = msgs[0].Context().Deadline()
			require.Equal(t, "value", msgs[0].Context().Value(key{}))
			return nil
		})
		ctx, cancel := context.WithCancel(context.WithValue(t.Context(), key{}, "value"))
		cancel()
		msg := newMessage("1")
		msg.SetContext(ctx)
		_, err := middleware.Chain(undecodable, middleware.Poison(poison, "poison", isUndecodable))(msg)
		require.NoError(t, err)
		require.NoError(t, atPublish)
		require.True(t, bounded)
	})

	t.Run("fails when the poison topic takes nothing", func(t *testing.T) {
		errBroker := errors.New("broker is gone")
		poison := recorder{fail: func(int) error { return errBroker }}
		_, err := middleware.Chain(undecodable, middleware.Poison(&poison, "poison", isUndecodable))(newMessage("1"))
		require.ErrorIs(t, err, errBroker)
		require.ErrorIs(t, err, errUndecodable)
		require.ErrorContains(t, err, "publish message 1 to poison")
	})
}

type publisherFunc func(topic string, msgs ...*message.Message) error

func (f publisherFunc) Publish(topic string, msgs ...*message.Message) error {
	return f(topic, msgs...)
}

func (f publisherFunc) Close() error { return nil }
