package pubsub_test

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"
)

// runRouter runs a router until the test closes it, and returns it with a
// channel that takes the result of Run.
func runRouter(t *testing.T, add func(*message.Router)) (*message.Router, <-chan error) {
	t.Helper()
	router, err := message.NewRouter(message.RouterConfig{CloseTimeout: patience}, watermill.NopLogger{})
	require.NoError(t, err)
	add(router)
	stopped := make(chan error, 1)
	go func() { stopped <- router.Run(context.Background()) }()
	requireDone(t, router.Running())
	t.Cleanup(func() { require.NoError(t, router.Close()) })
	return router, stopped
}

// Trap: closing the router is no drain. It cancels what its handlers are doing
// and has it delivered again. Draining first repeats nothing and cancels
// nothing.
func TestRouterStopsGracefullyAfterADrain(t *testing.T) {
	const inFlight = 16
	p := openGoChannel(t)
	orders, outcomes := p.Subscriber("dispatch", inFlight), p.Subscriber("intake", inFlight)
	var started, finished, cancelled, recorded atomic.Int64
	release := make(chan struct{})
	router, stopped := runRouter(t, func(router *message.Router) {
		router.AddConsumerHandler("dispatch", "orders", orders, func(msg *message.Message) error {
			started.Add(1)
			<-release
			if msg.Context().Err() != nil {
				cancelled.Add(1)
			}
			if err := p.Confirmed().Publish("outcomes", newMessage(msg.UUID+" saved", "")); err != nil {
				return err
			}
			finished.Add(1)
			return nil
		})
		router.AddConsumerHandler("intake", "outcomes", outcomes, func(*message.Message) error {
			recorded.Add(1)
			return nil
		})
	})
	publishMany(t, p, "orders", 10*inFlight)
	require.Eventually(t, func() bool { return started.Load() == inFlight }, patience, time.Millisecond)

	drained := drain(orders)
	requireNotYet(t, drained)
	close(release)
	require.NoError(t, receiveError(t, drained))
	require.EqualValues(t, inFlight, recorded.Load(), "a confirmed outcome was recorded before its order was acked")
	require.NoError(t, outcomes.Drain(t.Context()))
	require.False(t, router.IsClosed(), "a router with drained subscribers must wait to be closed")
	require.NoError(t, router.Close())
	require.NoError(t, receiveError(t, stopped))
	require.NoError(t, p.Close())

	require.EqualValues(t, inFlight, started.Load(), "nothing was taken after the drain, and nothing twice")
	require.EqualValues(t, inFlight, finished.Load())
	require.Zero(t, cancelled.Load())
}

// A router that is closed in the middle of things gives up the waiting
// publishers with the contexts of its messages, and hangs nowhere.
func TestRouterStopsWithoutADrain(t *testing.T) {
	p := openGoChannel(t)
	published := make(chan error, 1)
	router, stopped := runRouter(t, func(router *message.Router) {
		router.AddConsumerHandler("dispatch", "orders", p.Subscriber("dispatch", 1), func(msg *message.Message) error {
			outcome := newMessage("outcome", "")
			outcome.SetContext(msg.Context())
			published <- nil
			err := p.Confirmed().Publish("outcomes", outcome)
			published <- err
			return err
		})
	})
	blocked := subscribe(t, p.Subscriber("intake", 1), "outcomes")
	publishMany(t, p, "orders", 3)
	require.NoError(t, receiveError(t, published))
	receive(t, blocked) // and never answered
	require.NoError(t, router.Close())
	require.ErrorIs(t, receiveError(t, published), context.Canceled)
	require.NoError(t, receiveError(t, stopped))
	require.NoError(t, p.Close())
}

func TestRouterRedeliversWhatAHandlerFails(t *testing.T) {
	p := openGoChannel(t)
	var calls atomic.Int64
	done := make(chan struct{})
	runRouter(t, func(router *message.Router) {
		router.AddConsumerHandler("handler", "topic", p.Subscriber("g", 1), func(*message.Message) error {
			switch calls.Add(1) {
			case 1:
				return errors.New("not now")
			case 2:
				panic("nor now")
			default:
				close(done)
				return nil
			}
		})
	})
	require.NoError(t, p.Confirmed().Publish("topic", newMessage("1", "")))
	requireDone(t, done)
	require.EqualValues(t, 3, calls.Load())
}
