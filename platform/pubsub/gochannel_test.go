package pubsub_test

import (
	"context"
	"log/slog"
	"math/rand/v2"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"sluice/platform/pubsub"
)

func TestConfig(t *testing.T) {
	t.Run("the default is valid", func(t *testing.T) {
		require.NoError(t, pubsub.DefaultConfig().Validate())
	})

	t.Run("an unknown backend is refused with the choices", func(t *testing.T) {
		cfg := pubsub.DefaultConfig()
		cfg.Backend = "carrier-pigeon"
		const want = `pubsub.backend: must be one of amqp, gochannel, sql, is "carrier-pigeon"`
		require.EqualError(t, cfg.Validate(), want)
		_, err := pubsub.Open(t.Context(), cfg, nil, slog.New(slog.DiscardHandler))
		require.EqualError(t, err, want)
	})

	t.Run("a window without room is refused", func(t *testing.T) {
		cfg := pubsub.DefaultConfig()
		cfg.GoChannel.Window = 0
		require.EqualError(t, cfg.Validate(), "pubsub.gochannel.window: must be at least 1, is 0")
	})

	t.Run("open gives up with its context", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := pubsub.Open(ctx, pubsub.DefaultConfig(), nil, slog.New(slog.DiscardHandler))
		require.ErrorIs(t, err, context.Canceled)
	})
}

func TestGoChannelSaysWhatItIs(t *testing.T) {
	p := openGoChannel(t)
	require.Equal(t, "gochannel", p.Name())
	require.Equal(t, 10_000, p.Window())
	require.False(t, p.Durable())
}

// Trap: with nobody to take it a message would be gone, and nobody told.
func TestGoChannelRefusesWhatNobodyWouldTake(t *testing.T) {
	requireRefused := func(t *testing.T, p *pubsub.PubSub) {
		t.Helper()
		require.ErrorIs(t, p.Publisher().Publish("topic", newMessage("1", "")), pubsub.ErrNoSubscriber)
		require.ErrorIs(t, p.Confirmed().Publish("topic", newMessage("1", "")), pubsub.ErrNoSubscriber)
	}

	t.Run("before anybody subscribed", func(t *testing.T) {
		p := openGoChannel(t)
		subscribe(t, p.Subscriber("g", 1), "another topic")
		requireRefused(t, p)
	})

	t.Run("after the subscription has ended", func(t *testing.T) {
		p := openGoChannel(t)
		ctx, cancel := context.WithCancel(t.Context())
		_, err := p.Subscriber("g", 1).Subscribe(ctx, "topic")
		require.NoError(t, err)
		cancel()
		requireRefused(t, p)
	})

	t.Run("after the subscriber was closed", func(t *testing.T) {
		p := openGoChannel(t)
		sub := p.Subscriber("g", 1)
		out := subscribe(t, sub, "topic")
		require.NoError(t, sub.Close())
		requireClosed(t, out)
		requireRefused(t, p)
	})

	t.Run("after the subscriber was drained", func(t *testing.T) {
		p := openGoChannel(t)
		sub := p.Subscriber("g", 1)
		subscribe(t, sub, "topic")
		require.NoError(t, sub.Drain(t.Context()))
		requireRefused(t, p)
	})

	t.Run("but plain publishing serves the groups that are left", func(t *testing.T) {
		p := openGoChannel(t)
		gone, left := p.Subscriber("gone", 1), p.Subscriber("left", 1)
		subscribe(t, gone, "topic")
		out := subscribe(t, left, "topic")
		require.NoError(t, gone.Drain(t.Context()))
		require.NoError(t, p.Publisher().Publish("topic", newMessage("1", "")))
		require.Equal(t, "1", receiveAcked(t, out))
		require.ErrorIs(t, p.Confirmed().Publish("topic", newMessage("2", "")), pubsub.ErrNoSubscriber,
			"not every group can ack it")
		requireNothing(t, out)
	})
}

// Two subscriptions would share the messages and the confirmations of a group.
func TestGoChannelRefusesASecondSubscriptionOfAGroup(t *testing.T) {
	p := openGoChannel(t)
	first := p.Subscriber("g", 1)
	ctx, cancel := context.WithCancel(t.Context())
	out, err := first.Subscribe(ctx, "topic")
	require.NoError(t, err)
	_, err = first.Subscribe(t.Context(), "topic")
	require.ErrorContains(t, err, "subscribed already")
	_, err = p.Subscriber("g", 1).Subscribe(t.Context(), "topic")
	require.ErrorContains(t, err, "subscribed already")

	cancel()
	requireClosed(t, out)
	subscribe(t, p.Subscriber("g", 1), "topic")
}

func TestGoChannelIsAQueue(t *testing.T) {
	const messages = 5000
	p := openGoChannel(t)
	out := subscribe(t, p.Subscriber("g", 1), "topic")
	goroutines := runtime.NumGoroutine()
	for i := range messages / 2 {
		require.NoError(t, p.Publisher().Publish("topic", newMessage(strconv.Itoa(2*i), ""), newMessage(strconv.Itoa(2*i+1), "")))
	}
	require.Less(t, runtime.NumGoroutine(), goroutines+messages/10, "what waits has no goroutine")
	for i := range messages {
		require.Equal(t, strconv.Itoa(i), receiveAcked(t, out), "first come, first served")
	}
}

// What a consumer or the publisher makes of its message is nobody else's.
func TestGoChannelSharesNoMetadata(t *testing.T) {
	p := openGoChannel(t)
	first, second := subscribe(t, p.Subscriber("first", 1), "topic"), subscribe(t, p.Subscriber("second", 1), "topic")
	sent := newMessage("1", "")
	sent.Metadata.Set("key", "sent")
	require.NoError(t, p.Publisher().Publish("topic", sent))
	sent.Metadata.Set("key", "changed by the publisher")
	for _, out := range []<-chan *message.Message{first, second} {
		got := receive(t, out)
		require.Equal(t, "sent", got.Metadata.Get("key"))
		got.Metadata.Set("key", "changed by a consumer")
		got.Ack()
	}
}

func TestGoChannelConfirmed(t *testing.T) {
	t.Run("returns when every group has acked every message", func(t *testing.T) {
		p := openGoChannel(t)
		first := subscribe(t, p.Subscriber("first", 2), "topic")
		second := subscribe(t, p.Subscriber("second", 2), "topic")
		confirmed := confirm(p, "topic", newMessage("1", ""), newMessage("2", ""))
		for _, out := range []<-chan *message.Message{first, first, second} {
			receiveAcked(t, out)
			requireNotYet(t, confirmed)
		}
		receiveAcked(t, second)
		require.NoError(t, receiveError(t, confirmed))
	})

	t.Run("does not take a nack for an ack", func(t *testing.T) {
		p := openGoChannel(t)
		out := subscribe(t, p.Subscriber("g", 1), "topic")
		confirmed := confirm(p, "topic", newMessage("1", ""))
		receive(t, out).Nack()
		msg := receive(t, out)
		require.True(t, pubsub.Redelivered(msg))
		requireNotYet(t, confirmed)
		msg.Ack()
		require.NoError(t, receiveError(t, confirmed))
	})

	t.Run("tells messages of the same id apart", func(t *testing.T) {
		p := openGoChannel(t)
		out := subscribe(t, p.Subscriber("g", 2), "topic")
		first := confirm(p, "topic", newMessage("same", "first"))
		held := receive(t, out)
		second := confirm(p, "topic", newMessage("same", "second"))
		require.Equal(t, "same", receiveAcked(t, out))
		require.NoError(t, receiveError(t, second))
		requireNotYet(t, first)
		held.Ack()
		require.NoError(t, receiveError(t, first))
	})

	t.Run("gives up with the message's context", func(t *testing.T) {
		p := openGoChannel(t)
		sub := p.Subscriber("g", 1)
		out := subscribe(t, sub, "topic")
		ctx, cancel := context.WithCancel(t.Context())
		msg := newMessage("1", "")
		msg.SetContext(ctx)
		confirmed := confirm(p, "topic", msg)
		held := receive(t, out)
		cancel()
		require.ErrorIs(t, receiveError(t, confirmed), context.Canceled)
		require.NoError(t, held.Context().Err(), "the consumer is not concerned")
		held.Ack()
		requireIdle(t, sub)
	})

	t.Run("gives up at once when the context is over", func(t *testing.T) {
		p := openGoChannel(t)
		out := subscribe(t, p.Subscriber("g", 1), "topic")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		msg := newMessage("1", "")
		msg.SetContext(ctx)
		err := p.Confirmed().Publish("topic", msg)
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorContains(t, err, "confirm message 1 on topic")

		got := receive(t, out)
		got.Nack()
		got = receive(t, out)
		require.True(t, pubsub.Redelivered(got), "deliveries are counted though nobody waits")
		got.Ack()
	})

	t.Run("gives up when the pubsub closes", func(t *testing.T) {
		p := openGoChannel(t)
		out := subscribe(t, p.Subscriber("g", 1), "topic")
		inFlight := confirm(p, "topic", newMessage("1", ""))
		receive(t, out)
		waiting := confirm(p, "topic", newMessage("2", ""))
		require.NoError(t, p.Close())
		require.ErrorIs(t, receiveError(t, inFlight), pubsub.ErrClosed)
		require.ErrorIs(t, receiveError(t, waiting), pubsub.ErrClosed)
	})

	t.Run("may race with the close", func(t *testing.T) {
		for range 100 {
			p := openGoChannel(t)
			out := subscribe(t, p.Subscriber("g", 4), "topic")
			go func() {
				for msg := range out {
					msg.Ack()
				}
			}()
			var results []<-chan error
			for range 16 {
				results = append(results, confirm(p, "topic", newMessage("1", "")))
			}
			require.NoError(t, p.Close())
			for _, result := range results {
				if err := receiveError(t, result); err != nil {
					require.ErrorIs(t, err, pubsub.ErrClosed)
				}
			}
		}
	})

	t.Run("fails for what a draining group leaves behind, not for what it has in flight", func(t *testing.T) {
		p := openGoChannel(t)
		sub := p.Subscriber("g", 2)
		out, witness := subscribe(t, sub, "topic"), subscribe(t, p.Subscriber("witness", 1), "topic")
		acked := confirm(p, "topic", newMessage("acked", ""))
		first := receive(t, out)
		nacked := confirm(p, "topic", newMessage("nacked", ""))
		second := receive(t, out)
		left := confirm(p, "topic", newMessage("left", ""))
		for range 3 { // so all three are queued
			receiveAcked(t, witness)
		}

		drained := drain(sub)
		require.ErrorContains(t, receiveError(t, left), "stopped before it took the message")
		requireNotYet(t, acked)
		second.Nack()
		require.ErrorContains(t, receiveError(t, nacked), "stopped before it took the message")
		first.Ack()
		require.NoError(t, receiveError(t, acked))
		require.NoError(t, receiveError(t, drained))
	})

	t.Run("fails for what a group that ends leaves behind, not for what it has in flight", func(t *testing.T) {
		// The router closes its subscribers while handlers are at work.
		p := openGoChannel(t)
		ctx, cancel := context.WithCancel(t.Context())
		out, err := p.Subscriber("g", 1).Subscribe(ctx, "topic")
		require.NoError(t, err)
		witness := subscribe(t, p.Subscriber("witness", 1), "topic")
		inFlight := confirm(p, "topic", newMessage("in flight", ""))
		msg := receive(t, out)
		left := confirm(p, "topic", newMessage("left", ""))
		for range 2 { // so both are queued
			receiveAcked(t, witness)
		}
		cancel()
		require.ErrorContains(t, receiveError(t, left), "stopped before it took the message")
		requireNotYet(t, inFlight)
		msg.Ack()
		require.NoError(t, receiveError(t, inFlight))
	})
}

// Trap: nothing in Watermill slows down a handler that always fails.
func TestNackedMessagesPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := openGoChannel(t)
		sub := p.Subscriber("g", 1)
		out := subscribe(t, sub, "topic")
		require.NoError(t, p.Publisher().Publish("topic", newMessage("1", "")))
		var pauses []time.Duration
		for nacked := time.Now(); len(pauses) < 9; nacked = time.Now() {
			msg := receive(t, out)
			pauses = append(pauses, time.Since(nacked))
			msg.Nack()
		}
		require.Equal(t, []time.Duration{
			0, 100 * time.Millisecond, 200 * time.Millisecond, 400 * time.Millisecond, 800 * time.Millisecond,
			1600 * time.Millisecond, 3200 * time.Millisecond, 5 * time.Second, 5 * time.Second,
		}, pauses)
		require.NoError(t, p.Close())
	})
}

// When all messages fail, they must not go round: neither hot nor one after
// the other through the whole backlog.
func TestNackedMessagesHoldTheirSlotWhileTheyPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := openGoChannel(t)
		sub := p.Subscriber("g", 1)
		out := subscribe(t, sub, "topic")
		require.NoError(t, p.Publisher().Publish("topic", newMessage("1", "")))
		receive(t, out).Nack()
		synctest.Wait()
		require.NoError(t, p.Publisher().Publish("topic", newMessage("2", "")))
		synctest.Wait()
		select {
		case msg := <-out:
			require.FailNow(t, "a message took the slot", msg.UUID)
		default:
		}
		require.Equal(t, 1, sub.InFlight())
		start := time.Now()
		receiveAcked(t, out)
		require.Equal(t, 100*time.Millisecond, time.Since(start))
		receiveAcked(t, out)
		require.NoError(t, p.Close())
	})
}

func TestDrainEndsThePauseOfANackedMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := openGoChannel(t)
		sub := p.Subscriber("g", 1)
		out := subscribe(t, sub, "topic")
		require.NoError(t, p.Publisher().Publish("topic", newMessage("1", "")))
		receive(t, out).Nack()
		synctest.Wait()
		start := time.Now()
		require.NoError(t, sub.Drain(t.Context()))
		require.Zero(t, time.Since(start))
		require.NoError(t, p.Close())
	})
}

// Everything that may happen at the same time, for the race detector and for
// lock order: it must come to an end.
func TestGoChannelUnderEverythingAtOnce(t *testing.T) {
	for range 20 {
		p := openGoChannel(t)
		var all sync.WaitGroup
		for i := range 4 {
			all.Go(func() {
				for range 20 {
					sub := p.Subscriber("g"+strconv.Itoa(i%3), 2)
					ctx, cancel := context.WithCancel(t.Context())
					out, err := sub.Subscribe(ctx, "topic")
					if err == nil {
						for range 5 {
							select {
							case msg, ok := <-out:
								if ok && i%2 == 0 {
									msg.Nack()
								} else if ok {
									msg.Ack()
								}
							case <-time.After(time.Millisecond):
							}
						}
					}
					switch i {
					case 0:
						_ = sub.Drain(ctx) // its error depends on what else goes on
					case 1:
						_ = sub.Close() // never an error
					}
					cancel()
				}
			})
			all.Go(func() {
				for range 20 {
					ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
					msg := newMessage("1", "")
					msg.SetContext(ctx)
					// Both errors depend on what else goes on.
					_ = p.Confirmed().Publish("topic", msg)
					_ = p.Publisher().Publish("topic", newMessage("2", ""))
					cancel()
				}
			})
		}
		all.Go(func() { _ = p.Health(t.Context()) })
		if rand.IntN(2) == 0 {
			require.NoError(t, p.Close())
		}
		all.Wait()
		require.NoError(t, p.Close())
	}
}
