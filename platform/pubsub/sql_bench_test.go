package pubsub_test

import (
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"sluice/platform/pubsub"
)

// BenchmarkSQLPublish publishes one message a call, from so many goroutines.
func BenchmarkSQLPublish(b *testing.B) {
	config := sqlConfigs(b)
	for _, publishers := range []int{1, 16, 64} {
		b.Run(fmt.Sprintf("publishers=%d", publishers), func(b *testing.B) {
			p := openSQLBenchmark(b, config())
			b.ReportAllocs()
			b.ResetTimer()
			var all sync.WaitGroup
			for i := range publishers {
				all.Go(func() {
					for range (b.N + i) / publishers {
						if err := p.Publisher().Publish("topic", benchmarkMessage()); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			all.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msg/s")
		})
	}
}

// BenchmarkSQLDrain takes messages that are there already, each with a
// goroutine of its own, as the router does, and handles so many at a time. Like
// dispatch, it takes more messages than it handles. share is the part of the
// ideal, concurrency / handler time, that is reached.
func BenchmarkSQLDrain(b *testing.B) {
	config := sqlConfigs(b)
	for _, handler := range []time.Duration{0, 50 * time.Millisecond} {
		for _, concurrency := range []int{64, 256, 500} {
			b.Run(fmt.Sprintf("handler=%s/concurrency=%d", handler, concurrency), func(b *testing.B) {
				p := openSQLBenchmark(b, config())
				publishBenchmark(b, p, b.N)
				b.ResetTimer()
				out, err := p.Subscriber("g", concurrency+max(64, concurrency/2)).Subscribe(b.Context(), "topic")
				require.NoError(b, err)
				permits := make(chan struct{}, concurrency)
				var handlers sync.WaitGroup
				for range b.N {
					msg := <-out
					handlers.Go(func() {
						permits <- struct{}{}
						<-time.After(handler)
						<-permits
						msg.Ack()
					})
				}
				handlers.Wait()
				rate := float64(b.N) / b.Elapsed().Seconds()
				b.ReportMetric(rate, "msg/s")
				if handler > 0 {
					b.ReportMetric(rate*handler.Seconds()/float64(concurrency), "share")
				}
			})
		}
	}
}

// BenchmarkSQLMillion sends a million messages through a queue, ten thousand at
// a time, and tells how large its table and index are then, with what was empty
// and vacuumed, and what the last rounds took against the first.
//
//	go test -run '^$' -bench SQLMillion -benchtime 1x ./platform/pubsub
func BenchmarkSQLMillion(b *testing.B) {
	const messages, round = 1_000_000, 10_000
	for b.Loop() {
		cfg := sqlConfig(b)
		p := openSQLBenchmark(b, cfg)
		sub := p.Subscriber("g", 500)
		out, err := sub.Subscribe(b.Context(), "topic")
		require.NoError(b, err)
		table := sqlTable(b, cfg, "topic", "g")
		size := func() (heap, index float64) {
			onSQL(b, cfg, `VACUUM `+table)
			return float64(askSQL(b, cfg, `SELECT pg_table_size($1::regclass)`, table)) / 1024,
				float64(askSQL(b, cfg, `SELECT pg_indexes_size($1::regclass)`, table)) / 1024
		}
		heap, index := size()
		b.ReportMetric(heap, "empty-table-KiB")
		b.ReportMetric(index, "empty-index-KiB")
		var took []time.Duration
		for range messages / round {
			publishBenchmark(b, p, round)
			began := time.Now()
			for range round {
				(<-out).Ack()
			}
			took = append(took, time.Since(began))
		}
		heap, index = size()
		b.ReportMetric(heap+index, "vacuumed-KiB")
		// An empty queue gives back what vacuum cannot.
		require.Eventually(b, func() bool { heap, index = size(); return heap+index < 1024 }, patience, 100*time.Millisecond)
		b.ReportMetric(heap, "table-KiB")
		b.ReportMetric(index, "index-KiB")
		tenth := len(took) / 10
		b.ReportMetric(float64(sum(took[len(took)-tenth:]))/float64(sum(took[:tenth])), "last/first-tenth")
		b.ReportMetric(0, "ns/op")
	}
}

func sum(all []time.Duration) (total time.Duration) {
	for _, d := range all {
		total += d
	}
	return total
}

// BenchmarkSQLRoundTrip is the time from a publish to the hand-out, with nothing
// else going on: within a process, and to another one.
func BenchmarkSQLRoundTrip(b *testing.B) {
	config := sqlConfigs(b)
	for _, other := range []bool{false, true} {
		b.Run(fmt.Sprintf("other=%t", other), func(b *testing.B) {
			cfg := config()
			consumer := openSQLBenchmark(b, cfg)
			publisher := consumer
			if other {
				publisher = openSQLBenchmark(b, cfg)
			}
			out, err := consumer.Subscriber("g", 1).Subscribe(b.Context(), "topic")
			require.NoError(b, err)
			for b.Loop() {
				require.NoError(b, publisher.Publisher().Publish("topic", benchmarkMessage()))
				(<-out).Ack()
			}
		})
	}
}

func openSQLBenchmark(b *testing.B, cfg pubsub.Config) *pubsub.PubSub {
	b.Helper()
	p, err := pubsub.Open(b.Context(), cfg, pubsub.Topology{"topic": {"g"}}, slog.New(slog.DiscardHandler))
	require.NoError(b, err)
	b.Cleanup(func() { require.NoError(b, p.Close()) })
	return p
}

func publishBenchmark(b *testing.B, p *pubsub.PubSub, n int) {
	b.Helper()
	for ; n > 0; n -= 1000 {
		msgs := make([]*message.Message, min(n, 1000))
		for i := range msgs {
			msgs[i] = benchmarkMessage()
		}
		require.NoError(b, p.Publisher().Publish("topic", msgs...))
	}
}
