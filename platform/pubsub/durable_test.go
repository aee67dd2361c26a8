package pubsub_test

import (
	"bytes"
	"context"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
	"sluice/platform/pubsub"
)

// durableBroker is what the tests need to know of a broker that keeps messages.
type durableBroker struct {
	name string
	// config returns a broker with nothing in it. What is made in it is removed
	// at the end of the test.
	config func(t *testing.T) pubsub.Config
	// upstream is the broker's address, host:port, and through the same
	// configuration by way of another address.
	upstream func(cfg pubsub.Config) string
	through  func(cfg pubsub.Config, proxy *services.Proxy) pubsub.Config
	// impatient sets how long a publish may take.
	impatient func(cfg pubsub.Config, timeout time.Duration) pubsub.Config
	// waiting is the number of messages that no consumer has.
	waiting func(t *testing.T, cfg pubsub.Config, topic, group string) int
	// purge empties a group's queue, remove takes it away altogether.
	purge, remove func(t *testing.T, cfg pubsub.Config, topic, group string)
}

func durableBrokers() []durableBroker {
	return []durableBroker{amqpBroker(), sqlBroker()}
}

// TestDurable is what every broker must do that keeps messages, on top of the
// suite.
func TestDurable(t *testing.T) {
	for _, broker := range durableBrokers() {
		t.Run(broker.name, func(t *testing.T) { durable(t, broker) })
	}
}

func durable(t *testing.T, broker durableBroker) {
	topology := pubsub.Topology{"topic": {"g"}, "poison": {"poison"}}

	// proxied is a broker that the test can take away.
	proxied := func(t *testing.T) (cfg, direct pubsub.Config, proxy *services.Proxy) {
		t.Helper()
		direct = broker.config(t)
		proxy = services.NewProxy(t, broker.upstream(direct))
		proxy.Start()
		return broker.through(direct, proxy), direct, proxy
	}

	t.Run("says that it is durable and has no window", func(t *testing.T) {
		p := open(t, broker.config(t), topology)
		require.Equal(t, broker.name, p.Name())
		require.True(t, p.Durable())
		require.Zero(t, p.Window())
		require.NoError(t, p.Health(t.Context()))
	})

	t.Run("keeps what is published before anybody has subscribed", func(t *testing.T) {
		cfg := broker.config(t)
		p := open(t, cfg, topology)
		publishMany(t, p, "topic", 100)
		require.NoError(t, p.Confirmed().Publish("poison", newMessage("nobody can read it", "")))
		require.NoError(t, p.Close())
		require.Equal(t, 100, broker.waiting(t, cfg, "topic", "g"))
		require.Equal(t, 1, broker.waiting(t, cfg, "poison", "poison"))

		p = open(t, cfg, topology)
		out := subscribe(t, p.Subscriber("g", 4), "topic")
		seen := make(map[string]bool)
		for len(seen) < 100 {
			seen[receiveAcked(t, out)] = true
		}
		require.Equal(t, 1, broker.waiting(t, cfg, "poison", "poison"), "it stays for whoever looks into it")
	})

	t.Run("an ack counts, however soon the end comes after it", func(t *testing.T) {
		const messages = 64
		cfg := broker.config(t)
		for range 5 {
			p := open(t, cfg, topology)
			publishMany(t, p, "topic", messages)
			out := subscribe(t, p.Subscriber("g", messages), "topic")
			var taken []*message.Message
			for range messages {
				taken = append(taken, receive(t, out))
			}
			for _, msg := range taken {
				msg.Ack()
			}
			require.NoError(t, p.Close())
			require.Zero(t, broker.waiting(t, cfg, "topic", "g"))
		}
	})

	t.Run("keeps the metadata over a restart and marks no first delivery", func(t *testing.T) {
		cfg := broker.config(t)
		p := open(t, cfg, topology)
		sent := newMessage("1", "payload")
		sent.Metadata.Set("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
		sent.Metadata.Set("tracestate", "vendor=a,other=b")
		require.NoError(t, p.Publisher().Publish("topic", sent))
		require.NoError(t, p.Close())

		p = open(t, cfg, topology)
		got := receive(t, subscribe(t, p.Subscriber("g", 1), "topic"))
		require.True(t, sent.Equals(got), "%v", got.Metadata)
		require.False(t, pubsub.Redelivered(got))
		got.Ack()
	})

	t.Run("processes compete for the messages of a group, each within its own bound", func(t *testing.T) {
		const limit, messages = 8, 600
		cfg := broker.config(t)
		var mu sync.Mutex
		seen := make(map[string]int)
		var total atomic.Int64
		var consumers sync.WaitGroup
		var ps []*pubsub.PubSub
		for range 2 {
			p := open(t, cfg, topology)
			ps = append(ps, p)
			sub := p.Subscriber("g", limit)
			out := subscribe(t, sub, "topic")
			var inFlight, handled atomic.Int64
			for range limit {
				consumers.Go(func() {
					for msg := range out {
						if inFlight.Add(1) > limit {
							t.Errorf("more than %d in flight", limit)
						}
						handled.Add(1)
						mu.Lock()
						seen[msg.UUID]++
						mu.Unlock()
						inFlight.Add(-1)
						msg.Ack()
						total.Add(1)
					}
				})
			}
			t.Cleanup(func() { require.Positive(t, handled.Load(), "one process got nothing") })
		}
		publishMany(t, ps[0], "topic", messages)
		require.Eventually(t, func() bool { return total.Load() >= messages }, patience, 5*time.Millisecond)
		for _, p := range ps {
			require.NoError(t, p.Close())
		}
		consumers.Wait()
		require.Len(t, seen, messages)
		require.EqualValues(t, messages, total.Load(), "a message came twice")
	})

	t.Run("tells a consumer that its message goes to somebody else", func(t *testing.T) {
		cfg, direct, proxy := proxied(t)
		p := open(t, cfg, topology)
		publishMany(t, p, "topic", 1)
		msg := receive(t, subscribe(t, p.Subscriber("g", 1), "topic"))
		require.False(t, pubsub.Lost(msg))
		proxy.Stop()
		require.Eventually(t, func() bool { return pubsub.Lost(msg) }, patience, 10*time.Millisecond)
		other := open(t, direct, topology)
		again := receive(t, subscribe(t, other.Subscriber("g", 1), "topic"))
		require.Equal(t, msg.UUID, again.UUID)
		require.False(t, pubsub.Lost(again))
		again.Ack()
		msg.Ack() // too late, and no harm
	})

	t.Run("gives what a dead process had to another one, and marks it", func(t *testing.T) {
		cfg, direct, proxy := proxied(t)
		dead := open(t, cfg, topology)
		publishMany(t, dead, "topic", 3)
		out := subscribe(t, dead.Subscriber("g", 3), "topic")
		held := make(map[string]bool)
		for range 3 {
			held[receive(t, out).UUID] = true
		}
		proxy.Stop()

		p := open(t, direct, topology)
		again := subscribe(t, p.Subscriber("g", 3), "topic")
		for range 3 {
			msg := receive(t, again)
			require.True(t, held[msg.UUID])
			require.True(t, pubsub.Redelivered(msg))
			msg.Ack()
		}
		require.Error(t, dead.Health(t.Context()))
		require.NoError(t, dead.Close(), "closing does not wait for a broker that is away")
	})

	t.Run("neither drops nor hurries a message that is always nacked", func(t *testing.T) {
		p := open(t, broker.config(t), topology)
		publishMany(t, p, "topic", 1)
		out := subscribe(t, p.Subscriber("g", 4), "topic")
		const nacks = 4 // 100 ms, 200 ms, 400 ms, 800 ms
		began := time.Now()
		for range nacks {
			receive(t, out).Nack()
		}
		msg := receive(t, out)
		require.GreaterOrEqual(t, time.Since(began), 700*time.Millisecond)
		require.True(t, pubsub.Redelivered(msg))
		msg.Ack()
	})

	t.Run("a drain and a close repeat nothing and lose nothing", func(t *testing.T) {
		const limit, messages = 64, 1000
		cfg := broker.config(t)
		var mu sync.Mutex
		seen := make(map[string]int)
		handled := func() int {
			mu.Lock()
			defer mu.Unlock()
			return len(seen)
		}
		for handled() < messages {
			p := open(t, cfg, topology)
			if handled() == 0 {
				publishMany(t, p, "topic", messages)
			}
			sub := p.Subscriber("g", limit)
			out := subscribe(t, sub, "topic")
			before := handled()
			var consumers sync.WaitGroup
			for range limit {
				consumers.Go(func() {
					for msg := range out {
						mu.Lock()
						seen[msg.UUID]++
						mu.Unlock()
						msg.Ack()
					}
				})
			}
			require.Eventually(t, func() bool { return handled() >= min(before+messages/3, messages) }, patience, time.Millisecond)
			require.NoError(t, sub.Drain(t.Context()))
			require.NoError(t, p.Close())
			consumers.Wait()
		}
		for id, times := range seen {
			require.Equal(t, 1, times, id)
		}
		require.Zero(t, broker.waiting(t, cfg, "topic", "g"))
	})

	t.Run("reaches 64 in flight and never passes it", func(t *testing.T) {
		const limit = 64
		p := open(t, broker.config(t), topology)
		sub := p.Subscriber("g", limit)
		out := subscribe(t, sub, "topic")
		publishMany(t, p, "topic", 4*limit)
		held := make([]*message.Message, 0, limit)
		for range limit {
			held = append(held, receive(t, out))
		}
		requireNothing(t, out)
		require.Equal(t, limit, sub.InFlight())
		for i := range 3 * limit {
			held[i%limit].Ack()
			held[i%limit] = receive(t, out)
			require.LessOrEqual(t, sub.InFlight(), limit)
		}
		for _, msg := range held {
			msg.Ack()
		}
		requireIdle(t, sub)
	})

	t.Run("waits at the start for a broker that is away, and says so once", func(t *testing.T) {
		direct := broker.config(t)
		proxy := services.NewProxy(t, broker.upstream(direct))
		log := new(logBuffer)
		opened := make(chan *pubsub.PubSub, 1)
		failed := make(chan error, 1)
		go func() {
			p, err := pubsub.Open(t.Context(), broker.through(direct, proxy), topology, slog.New(slog.NewTextHandler(log, nil)))
			failed <- err
			opened <- p
		}()
		require.Eventually(t, func() bool { return log.lines() == 1 }, patience, time.Millisecond)
		requireNotYet(t, failed)
		proxy.Start()
		require.NoError(t, receiveError(t, failed))
		p := <-opened
		require.NoError(t, p.Health(t.Context()))
		publishMany(t, p, "topic", 1)
		require.NoError(t, p.Close())
		require.Equal(t, 2, log.lines(), log.String())
		require.NotContains(t, log.String(), "guest", "a password")
	})

	t.Run("stops waiting for a broker with the context", func(t *testing.T) {
		direct := broker.config(t)
		proxy := services.NewProxy(t, broker.upstream(direct))
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		_, err := pubsub.Open(ctx, broker.through(direct, proxy), topology, slog.New(slog.DiscardHandler))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "connection refused")
	})

	t.Run("and for one that accepts connections and says nothing", func(t *testing.T) {
		cfg, _, proxy := proxied(t)
		proxy.Hang(true)
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		began := time.Now()
		_, err := pubsub.Open(ctx, cfg, topology, slog.New(slog.DiscardHandler))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.Less(t, time.Since(began), 5*time.Second)
	})

	t.Run("survives cuts in the middle of traffic", func(t *testing.T) {
		const messages, cuts = 1500, 3
		cfg, _, proxy := proxied(t)
		log := new(logBuffer)
		p, err := pubsub.Open(t.Context(), cfg, topology, slog.New(slog.NewTextHandler(log, nil)))
		require.NoError(t, err)
		sub := p.Subscriber("g", 32)
		out := subscribe(t, sub, "topic")
		published := make(chan error, 1)
		go func() {
			publish := func(i int) error {
				for {
					msg := newMessage(strconv.Itoa(i), "")
					if err := p.Publisher().Publish("topic", msg); err == nil || t.Context().Err() != nil {
						return err
					}
				}
			}
			for i := range messages {
				if err := publish(i); err != nil {
					published <- err
					return
				}
			}
			published <- nil
		}()
		seen := make(map[string]bool)
		for cut := 1; len(seen) < messages; {
			seen[receiveAcked(t, out)] = true
			if cut <= cuts && len(seen) == cut*messages/(cuts+1) {
				proxy.Cut()
				cut++
			}
		}
		require.NoError(t, receiveError(t, published))
		require.NoError(t, sub.Drain(t.Context()))
		require.NoError(t, p.Close())
		require.LessOrEqual(t, log.lines(), 4*cuts, log.String())
	})

	t.Run("a broker that does not answer costs a publish its time limit and no more", func(t *testing.T) {
		const limit = time.Second
		cfg, _, proxy := proxied(t)
		p := open(t, broker.impatient(cfg, limit), topology)
		out := subscribe(t, p.Subscriber("g", 4), "topic")
		publishMany(t, p, "topic", 1)
		receiveAcked(t, out)

		proxy.Hang(true)
		began := time.Now()
		for range 2 {
			require.Error(t, p.Publisher().Publish("topic", newMessage("hung", ""), newMessage("hung too", "")))
		}
		require.Less(t, time.Since(began), 2*limit+2*time.Second)
		began = time.Now()
		_ = p.Health(t.Context())
		require.Less(t, time.Since(began), limit, "health does not wait")

		proxy.Hang(false)
		proxy.Cut() // what went through it is of no use any more
		require.Eventually(t, func() bool { return p.Publisher().Publish("topic", newMessage("again", "")) == nil }, patience, time.Millisecond)
		for receiveAcked(t, out) != "again" { // the others may be there
		}
		require.NoError(t, p.Health(t.Context()))
	})

	t.Run("closes while the broker does not answer", func(t *testing.T) {
		cfg, _, proxy := proxied(t)
		p := open(t, broker.impatient(cfg, time.Second), topology)
		sub := p.Subscriber("g", 4)
		out := subscribe(t, sub, "topic")
		publishMany(t, p, "topic", 2)
		receive(t, out).Ack()
		receive(t, out)
		proxy.Hang(true)
		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		require.ErrorIs(t, sub.Drain(ctx), context.DeadlineExceeded)
		publishing := confirm(p, "topic", newMessage("hung", ""))
		began := time.Now()
		require.NoError(t, p.Close())
		require.Less(t, time.Since(began), 10*time.Second)
		require.Error(t, receiveError(t, publishing))
	})

	t.Run("goes on after its queue was purged or removed", func(t *testing.T) {
		cfg := broker.config(t)
		p := open(t, cfg, topology)
		out := subscribe(t, p.Subscriber("g", 8), "topic")
		for _, take := range []func(*testing.T, pubsub.Config, string, string){broker.purge, broker.remove} {
			publishMany(t, p, "topic", 20)
			receiveAcked(t, out)
			take(t, cfg, "topic", "g")
			require.NoError(t, p.Confirmed().Publish("topic", newMessage("later", "")))
			for {
				msg := receive(t, out)
				require.NotEmpty(t, msg.UUID, "a message that nobody has sent")
				msg.Ack()
				if msg.UUID == "later" {
					break
				}
			}
		}
	})
}

// logBuffer is a log that can be read while it is written.
type logBuffer struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buffer.String()
}

func (b *logBuffer) lines() int { return strings.Count(b.String(), "\n") }
