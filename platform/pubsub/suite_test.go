package pubsub_test

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"sluice/platform/pubsub"
)

// patience is how long a test waits for something that must happen.
const patience = 20 * time.Second

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

func TestSuite(t *testing.T) {
	for _, backend := range []struct {
		name   string
		config func(t *testing.T) pubsub.Config // a broker of its own for each call
	}{
		{name: pubsub.BackendGoChannel, config: func(*testing.T) pubsub.Config { return pubsub.DefaultConfig() }},
		{name: pubsub.BackendAMQP, config: func(t *testing.T) pubsub.Config { return amqpConfig(t) }},
	} {
		t.Run(backend.name, func(t *testing.T) {
			suite(t, func(t *testing.T) *pubsub.PubSub {
				t.Helper()
				return open(t, backend.config(t), nil)
			})
		})
	}
}

// open opens a broker and closes it at the end of the test.
func open(t *testing.T, cfg pubsub.Config, topology pubsub.Topology) *pubsub.PubSub {
	t.Helper()
	p, err := pubsub.Open(t.Context(), cfg, topology, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	return p
}

func openGoChannel(t *testing.T) *pubsub.PubSub {
	t.Helper()
	return open(t, pubsub.DefaultConfig(), nil)
}

// suite is what every backend must do.
func suite(t *testing.T, open func(t *testing.T) *pubsub.PubSub) {
	t.Run("delivers payload and metadata byte for byte", func(t *testing.T) {
		p := open(t)
		out := subscribe(t, p.Subscriber("g", 1), "topic")
		every := make([]byte, 256)
		for i := range every {
			every[i] = byte(i)
		}
		for _, sent := range []*message.Message{
			newMessage("plain", "payload"),
			{UUID: "binary", Payload: every, Metadata: message.Metadata{"ce_id": "1", "empty": "", "ümläut": "\"quoted\" ⚙ ,;"}},
			{UUID: "empty"},
			{Payload: []byte("no id")},
		} {
			before := maps.Clone(sent.Metadata)
			require.NoError(t, p.Publisher().Publish("topic", sent))
			got := receive(t, out)
			require.Equal(t, sent.UUID, got.UUID)
			require.Equal(t, string(sent.Payload), string(got.Payload))
			require.Len(t, got.Metadata, len(sent.Metadata))
			require.True(t, sent.Equals(got), "metadata is %v, was %v", got.Metadata, sent.Metadata)
			require.Equal(t, before, maps.Clone(sent.Metadata), "the caller's message is left alone")
			require.False(t, pubsub.Redelivered(got))
			got.Ack()
		}
	})

	t.Run("gives each consumer group a copy", func(t *testing.T) {
		p := open(t)
		first := subscribe(t, p.Subscriber("first", 4), "topic")
		second := subscribe(t, p.Subscriber("second", 4), "topic")
		other := subscribe(t, p.Subscriber("first", 4), "other topic")
		require.NoError(t, p.Publisher().Publish("topic", newMessage("1", "a"), newMessage("2", "b")))
		require.NoError(t, p.Publisher().Publish("other topic", newMessage("3", "c")))

		require.ElementsMatch(t, []string{"1", "2"}, []string{receiveAcked(t, first), receiveAcked(t, first)})
		require.ElementsMatch(t, []string{"1", "2"}, []string{receiveAcked(t, second), receiveAcked(t, second)})
		require.Equal(t, "3", receiveAcked(t, other))
	})

	t.Run("reaches the limit of messages in flight and never passes it", func(t *testing.T) {
		const limit, messages = 8, 400
		p := open(t)
		sub := p.Subscriber("g", limit)
		out := subscribe(t, sub, "topic")
		publishMany(t, p, "topic", messages)

		var inFlight atomic.Int64
		var most int64
		var all sync.WaitGroup
		full := make(chan struct{})
		for range messages {
			msg := receive(t, out)
			now := inFlight.Add(1)
			if now == limit && most < limit {
				close(full)
			}
			most = max(most, now)
			require.LessOrEqual(t, sub.InFlight(), limit)
			all.Go(func() {
				<-full // nobody is done before the limit is reached
				inFlight.Add(-1)
				msg.Ack()
			})
		}
		all.Wait()
		require.EqualValues(t, limit, most)
		requireIdle(t, sub)
	})

	t.Run("frees no slot before the ack", func(t *testing.T) {
		p := open(t)
		sub := p.Subscriber("g", 2)
		out := subscribe(t, sub, "topic")
		publishMany(t, p, "topic", 3)
		first, second := receive(t, out), receive(t, out)
		require.Equal(t, 2, sub.InFlight())
		requireNothing(t, out)
		first.Ack()
		third := receive(t, out)
		require.Equal(t, 2, sub.InFlight())
		second.Ack()
		third.Ack()
		requireIdle(t, sub)
	})

	t.Run("counts the limit for each topic", func(t *testing.T) {
		p := open(t)
		sub := p.Subscriber("g", 1)
		busy, quiet := subscribe(t, sub, "busy"), subscribe(t, sub, "quiet")
		require.NoError(t, p.Publisher().Publish("busy", newMessage("1", "")))
		held := receive(t, busy)
		require.NoError(t, p.Publisher().Publish("quiet", newMessage("2", "")))
		require.Equal(t, "2", receiveAcked(t, quiet))
		held.Ack()
	})

	t.Run("delivers a nacked message again and marks it", func(t *testing.T) {
		p := open(t)
		out := subscribe(t, p.Subscriber("g", 1), "topic")
		sent := newMessage("1", "payload")
		sent.Metadata.Set("key", "value")
		require.NoError(t, p.Publisher().Publish("topic", sent))
		got := receive(t, out)
		require.False(t, pubsub.Redelivered(got))
		for range 2 {
			got.Metadata.Set("key", "changed by the consumer")
			got.Nack()
			got = receive(t, out)
			require.True(t, pubsub.Redelivered(got))
			require.Equal(t, "1", got.UUID)
			require.Equal(t, "payload", string(got.Payload))
			require.Equal(t, "value", got.Metadata.Get("key"))
		}
		got.Ack()

		// A mark that travelled along with a republished message is no mark.
		require.NoError(t, p.Publisher().Publish("topic", got))
		got = receive(t, out)
		require.False(t, pubsub.Redelivered(got))
		got.Ack()
	})

	t.Run("ends the subscription and its messages with the context", func(t *testing.T) {
		p := open(t)
		sub := p.Subscriber("g", 2)
		ctx, cancel := context.WithCancel(t.Context())
		out, err := sub.Subscribe(ctx, "topic")
		require.NoError(t, err)
		publishMany(t, p, "topic", 10)
		msg := receive(t, out)
		require.NoError(t, msg.Context().Err())
		cancel()
		requireDone(t, msg.Context().Done())
		requireClosed(t, out)

		// The group may come back, also on the same Subscriber.
		again := subscribe(t, sub, "topic")
		require.NoError(t, p.Publisher().Publish("topic", newMessage("later", "")))
		for receiveAcked(t, again) != "later" { // a durable broker has kept the others
			require.True(t, p.Durable())
		}
		go func() { // some of them may come back only now
			for msg := range again {
				msg.Ack()
			}
		}()
		msg.Ack() // does no harm
		requireIdle(t, sub)
	})

	t.Run("does not hand the publisher's context to the consumer", func(t *testing.T) {
		p := open(t)
		out := subscribe(t, p.Subscriber("g", 1), "topic")
		ctx, cancel := context.WithCancel(context.WithValue(t.Context(), contextKey{}, "publisher"))
		sent := newMessage("1", "")
		sent.SetContext(ctx)
		require.NoError(t, p.Publisher().Publish("topic", sent))
		cancel()
		got := receive(t, out)
		require.NoError(t, got.Context().Err())
		require.Nil(t, got.Context().Value(contextKey{}))
		got.Ack()
	})

	t.Run("drain lets what is in flight finish and takes nothing more", func(t *testing.T) {
		p := open(t)
		sub := p.Subscriber("g", 3)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		out, err := sub.Subscribe(ctx, "topic")
		require.NoError(t, err)
		publishMany(t, p, "topic", 20)
		held := []*message.Message{receive(t, out), receive(t, out), receive(t, out)}

		drained := drain(sub)
		for _, msg := range held {
			requireNotYet(t, drained)
			require.NoError(t, msg.Context().Err(), "drain cancels nothing")
			msg.Ack()
		}
		require.NoError(t, receiveError(t, drained))
		require.Zero(t, sub.InFlight())
		requireNothing(t, out) // but it is still open

		_, err = sub.Subscribe(t.Context(), "another topic")
		require.Error(t, err)
		require.NoError(t, sub.Drain(t.Context()), "draining again")
		cancel()
		require.Zero(t, requireClosed(t, out))
	})

	t.Run("drain is bounded by its context and can be taken up again", func(t *testing.T) {
		p := open(t)
		sub := p.Subscriber("g", 3)
		out := subscribe(t, sub, "topic")
		publishMany(t, p, "topic", 3)
		held := []*message.Message{receive(t, out), receive(t, out), receive(t, out)}
		held[0].Ack()
		require.Eventually(t, func() bool { return sub.InFlight() == 2 }, patience, time.Millisecond)

		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		err := sub.Drain(ctx)
		require.ErrorIs(t, err, context.Canceled)
		require.ErrorContains(t, err, "2 messages still in flight")

		drained := drain(sub)
		held[1].Ack()
		held[2].Ack()
		require.NoError(t, receiveError(t, drained))
	})

	t.Run("a drain with nothing in flight works although its context is over", func(t *testing.T) {
		sub := open(t).Subscriber("g", 1)
		subscribe(t, sub, "topic")
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range 20 { // a select would pick either of two open cases
			require.NoError(t, sub.Drain(ctx))
		}
	})

	t.Run("a message nacked during the drain does not come back and does not hold it up", func(t *testing.T) {
		p := open(t)
		sub := p.Subscriber("g", 2)
		out := subscribe(t, sub, "topic")
		publishMany(t, p, "topic", 2)
		before, during := receive(t, out), receive(t, out)
		before.Nack() // in its pause when the drain begins
		drained := drain(sub)
		during.Nack()
		require.NoError(t, receiveError(t, drained))
		require.Zero(t, sub.InFlight())
		requireNothing(t, out)
	})

	t.Run("drain may race with the hand-out", func(t *testing.T) {
		rounds := 100
		if open(t).Durable() {
			rounds = 10 // each takes its time
		}
		for round := range rounds {
			p := open(t)
			sub := p.Subscriber("g", 4)
			out := subscribe(t, sub, "topic")
			publishMany(t, p, "topic", 50)

			begin := make(chan struct{}) // while messages are being handed out
			var taken, settled atomic.Int64
			var consumers sync.WaitGroup
			for range 4 {
				consumers.Go(func() {
					for msg := range out {
						if taken.Add(1) == int64(1+round%40) {
							close(begin)
						}
						runtime.Gosched()
						settled.Add(1)
						if rand.IntN(20) == 0 {
							msg.Nack()
						} else {
							msg.Ack()
						}
					}
				})
			}
			requireDone(t, begin)
			require.NoError(t, sub.Drain(t.Context()))
			after := taken.Load()
			require.Equal(t, after, settled.Load(), "drain returned before the last answer")
			require.Zero(t, sub.InFlight())
			require.NoError(t, p.Close())
			consumers.Wait()
			require.Equal(t, after, taken.Load(), "a message was handed out after the drain")
		}
	})

	t.Run("goes on publishing while another group is drained", func(t *testing.T) {
		p := open(t)
		orders, outcomes := p.Subscriber("dispatch", 4), p.Subscriber("intake", 4)
		ordersOut, outcomesOut := subscribe(t, orders, "orders"), subscribe(t, outcomes, "outcomes")
		publishMany(t, p, "orders", 10)
		order := receive(t, ordersOut)
		require.Eventually(t, func() bool { return orders.InFlight() > 0 }, patience, time.Millisecond)

		drained := drain(orders)
		confirmed := confirm(p, "outcomes", newMessage("saved", ""))
		require.Equal(t, "saved", receiveAcked(t, outcomesOut))
		require.NoError(t, receiveError(t, confirmed))
		order.Ack()
		go func() { // those that were handed out before the drain
			for msg := range ordersOut {
				msg.Ack()
			}
		}()
		require.NoError(t, receiveError(t, drained))
		require.NoError(t, p.Publisher().Publish("outcomes", newMessage("late", "")))
		require.Equal(t, "late", receiveAcked(t, outcomesOut))
	})

	t.Run("confirmed publishers wait at the same time, each for its own message", func(t *testing.T) {
		const messages = 64
		p := open(t)
		out := subscribe(t, p.Subscriber("g", messages), "topic")
		results := make(map[string]<-chan error)
		for i := range messages {
			msg := newMessage(strconv.Itoa(i), "")
			results[msg.UUID] = confirm(p, "topic", msg)
		}
		// All of them arrive while none is acked.
		var got []*message.Message
		for range messages {
			got = append(got, receive(t, out))
		}
		for _, msg := range got {
			if !p.Durable() {
				requireNotYet(t, results[msg.UUID])
			}
			msg.Ack()
			require.NoError(t, receiveError(t, results[msg.UUID]))
		}
	})

	t.Run("ten thousand messages arrive once each", func(t *testing.T) {
		const messages = 10_000
		p := open(t)
		sub := p.Subscriber("g", 64)
		out := subscribe(t, sub, "topic")
		publishMany(t, p, "topic", messages)
		seen := make(map[string]int)
		for range messages {
			seen[receiveAcked(t, out)]++
		}
		require.Len(t, seen, messages)
		requireIdle(t, sub)
		requireNothing(t, out)
	})

	t.Run("closing a publisher changes nothing", func(t *testing.T) {
		// The router closes a handler's publisher before its last handlers
		// are done.
		p := open(t)
		out := subscribe(t, p.Subscriber("g", 1), "topic")
		require.NoError(t, p.Publisher().Close())
		require.NoError(t, p.Confirmed().Close())
		require.NoError(t, p.Publisher().Publish("topic", newMessage("1", "")))
		require.Equal(t, "1", receiveAcked(t, out))
		require.NoError(t, p.Publisher().Publish("topic"), "no messages")
	})

	t.Run("close ends everything and leaves no goroutines", func(t *testing.T) {
		ignore := goleak.IgnoreCurrent()
		p := open(t)
		require.NoError(t, p.Health(t.Context()))
		sub, drainedSub := p.Subscriber("g", 4), p.Subscriber("drained", 4)
		out, drainedOut := subscribe(t, sub, "topic"), subscribe(t, drainedSub, "drained topic")
		publishMany(t, p, "topic", 1000)
		msg, nacked := receive(t, out), receive(t, out)
		nacked.Nack()
		require.NoError(t, drainedSub.Drain(t.Context()))
		drained := drain(sub) // waits for msg

		require.NoError(t, p.Close())
		require.ErrorIs(t, receiveError(t, drained), pubsub.ErrClosed)
		requireClosed(t, out)
		require.Zero(t, requireClosed(t, drainedOut))
		msg.Ack()
		goleak.VerifyNone(t, ignore)

		require.NoError(t, p.Close(), "closing again")
		require.NoError(t, sub.Close())
		require.ErrorIs(t, p.Health(t.Context()), pubsub.ErrClosed)
		require.ErrorIs(t, p.Publisher().Publish("topic", newMessage("1", "")), pubsub.ErrClosed)
		require.ErrorIs(t, p.Confirmed().Publish("topic", newMessage("1", "")), pubsub.ErrClosed)
		_, err := p.Subscriber("late", 1).Subscribe(t.Context(), "topic")
		require.ErrorIs(t, err, pubsub.ErrClosed)
	})

	t.Run("a subscriber needs a group and room for a message", func(t *testing.T) {
		p := open(t)
		_, err := p.Subscriber("", 1).Subscribe(t.Context(), "topic")
		require.ErrorContains(t, err, "group")
		_, err = p.Subscriber("g", 0).Subscribe(t.Context(), "topic")
		require.ErrorContains(t, err, "must be at least 1, is 0")
	})
}

type contextKey struct{}

func newMessage(id, payload string) *message.Message {
	return message.NewMessage(id, []byte(payload))
}

func publishMany(t *testing.T, p *pubsub.PubSub, topic string, n int) {
	t.Helper()
	msgs := make([]*message.Message, n)
	for i := range msgs {
		msgs[i] = newMessage(fmt.Sprintf("%s %d", topic, i), "payload")
	}
	require.NoError(t, p.Publisher().Publish(topic, msgs...))
}

func subscribe(t *testing.T, sub *pubsub.Subscriber, topic string) <-chan *message.Message {
	t.Helper()
	out, err := sub.Subscribe(t.Context(), topic)
	require.NoError(t, err)
	return out
}

func receive(t *testing.T, out <-chan *message.Message) *message.Message {
	t.Helper()
	select {
	case msg, ok := <-out:
		require.True(t, ok, "the subscription has ended")
		return msg
	case <-time.After(patience):
		require.FailNow(t, "no message came")
		return nil
	}
}

func receiveAcked(t *testing.T, out <-chan *message.Message) string {
	t.Helper()
	msg := receive(t, out)
	require.True(t, msg.Ack())
	return msg.UUID
}

// requireNothing fails if a message is on offer. What a broken Subscriber hands
// out too much is there within microseconds.
func requireNothing(t *testing.T, out <-chan *message.Message) {
	t.Helper()
	select {
	case msg, ok := <-out:
		require.True(t, ok, "the subscription has ended")
		require.FailNow(t, "a message was handed out", msg.UUID)
	case <-time.After(20 * time.Millisecond):
	}
}

// requireClosed reads until the channel is closed, and returns how many messages
// came before that.
func requireClosed(t *testing.T, out <-chan *message.Message) int {
	t.Helper()
	for n, deadline := 0, time.After(patience); ; n++ {
		select {
		case msg, ok := <-out:
			if !ok {
				return n
			}
			msg.Ack()
		case <-deadline:
			require.FailNow(t, "the subscription did not end")
			return n
		}
	}
}

func requireIdle(t *testing.T, sub *pubsub.Subscriber) {
	t.Helper()
	require.Eventually(t, func() bool { return sub.InFlight() == 0 }, patience, time.Millisecond)
}

func requireDone(t *testing.T, done <-chan struct{}) {
	t.Helper()
	select {
	case <-done:
	case <-time.After(patience):
		require.FailNow(t, "it is not done")
	}
}

func requireNotYet(t *testing.T, result <-chan error) {
	t.Helper()
	select {
	case err := <-result:
		require.FailNow(t, "it returned too early", "%v", err)
	case <-time.After(time.Millisecond):
	}
}

func receiveError(t *testing.T, result <-chan error) error {
	t.Helper()
	select {
	case err := <-result:
		return err
	case <-time.After(patience):
		require.FailNow(t, "it did not return")
		return nil
	}
}

func drain(sub *pubsub.Subscriber) <-chan error {
	result := make(chan error, 1)
	go func() { result <- sub.Drain(context.Background()) }()
	return result
}

func confirm(p *pubsub.PubSub, topic string, msgs ...*message.Message) <-chan error {
	result := make(chan error, 1)
	go func() { result <- p.Confirmed().Publish(topic, msgs...) }()
	return result
}
