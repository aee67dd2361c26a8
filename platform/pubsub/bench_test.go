package pubsub_test

import (
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/pubsub/gochannel"
	"github.com/stretchr/testify/require"

	"sluice/platform/pubsub"
)

// BenchmarkThroughput sends messages to a consumer that acks at once: through
// the bare library, and through the Subscriber.
func BenchmarkThroughput(b *testing.B) {
	b.Run("library", func(b *testing.B) {
		library := gochannel.NewGoChannel(gochannel.Config{}, watermill.NewSlogLogger(slog.New(slog.DiscardHandler)))
		out, err := library.Subscribe(b.Context(), "topic")
		require.NoError(b, err)
		benchmark(b, library, out)
		require.NoError(b, library.Close())
	})
	for _, maxInFlight := range []int{1, 64, 500} {
		b.Run("subscriber "+strconv.Itoa(maxInFlight), func(b *testing.B) {
			p, err := pubsub.Open(b.Context(), pubsub.DefaultConfig(), nil, slog.New(slog.DiscardHandler))
			require.NoError(b, err)
			out, err := p.Subscriber("g", maxInFlight).Subscribe(b.Context(), "topic")
			require.NoError(b, err)
			benchmark(b, p.Publisher(), out)
			require.NoError(b, p.Close())
		})
	}
}

// BenchmarkConfirmed waits for the ack of each message, 64 at a time.
func BenchmarkConfirmed(b *testing.B) {
	p, err := pubsub.Open(b.Context(), pubsub.DefaultConfig(), nil, slog.New(slog.DiscardHandler))
	require.NoError(b, err)
	out, err := p.Subscriber("g", 64).Subscribe(b.Context(), "topic")
	require.NoError(b, err)
	go func() {
		for msg := range out {
			msg.Ack()
		}
	}()
	confirmed := p.Confirmed()
	b.SetParallelism(32)
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			if err := confirmed.Publish("topic", benchmarkMessage()); err != nil {
				b.Error(err)
			}
		}
	})
	b.StopTimer()
	require.NoError(b, p.Close())
}

// BenchmarkAMQPPublish is the rate of confirmed messages, by the number of
// publishers that wait at the same time.
func BenchmarkAMQPPublish(b *testing.B) {
	for _, publishers := range []int{1, 16, 64} {
		b.Run(strconv.Itoa(publishers), func(b *testing.B) {
			p, err := pubsub.Open(b.Context(), amqpConfig(b), pubsub.Topology{"topic": {"g"}}, slog.New(slog.DiscardHandler))
			require.NoError(b, err)
			var next atomic.Int64
			var all sync.WaitGroup
			b.ResetTimer()
			for range publishers {
				all.Go(func() {
					for next.Add(1) <= int64(b.N) {
						if err := p.Publisher().Publish("topic", benchmarkMessage()); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			all.Wait()
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "msgs/s")
			require.NoError(b, p.Close())
		})
	}
}

// BenchmarkAMQPThroughput sends messages from 64 publishers through RabbitMQ to
// 64 consumers that ack at once, and prints what that costs this process. With a
// classic queue the disk has no part in it.
//
//	go test -run '^$' -bench AMQPThroughput -benchtime 30000x ./platform/pubsub
func BenchmarkAMQPThroughput(b *testing.B) {
	const concurrency = 64
	cfg := amqpConfig(b)
	cfg.AMQP.QueueType = pubsub.QueueClassic
	p, err := pubsub.Open(b.Context(), cfg, pubsub.Topology{"topic": {"g"}}, slog.New(slog.DiscardHandler))
	require.NoError(b, err)
	sub := p.Subscriber("g", concurrency)
	out, err := sub.Subscribe(b.Context(), "topic")
	require.NoError(b, err)
	var next atomic.Int64
	var all sync.WaitGroup
	b.ReportAllocs()
	b.ResetTimer()
	before := cpuTime(b)
	for range concurrency {
		all.Go(func() {
			for next.Add(1) <= int64(b.N) {
				if err := p.Publisher().Publish("topic", benchmarkMessage()); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	for range b.N {
		(<-out).Ack()
	}
	all.Wait()
	require.NoError(b, sub.Drain(b.Context()))
	b.ReportMetric(float64((cpuTime(b)-before).Microseconds())/float64(b.N), "cpu-µs/msg")
	b.StopTimer()
	require.NoError(b, p.Close())
}

// cpuTime returns what this process has used.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var used syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &used))
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}

// BenchmarkAMQPDrain drains a backlog with handlers of 50 ms, and prints the
// share of the ideal rate, concurrency by latency, that it reaches.
func BenchmarkAMQPDrain(b *testing.B) {
	const latency = 50 * time.Millisecond
	for _, concurrency := range []int{64, 256, 500} {
		b.Run(strconv.Itoa(concurrency), func(b *testing.B) {
			p, err := pubsub.Open(b.Context(), amqpConfig(b), pubsub.Topology{"topic": {"g"}}, slog.New(slog.DiscardHandler))
			require.NoError(b, err)
			const rounds = 40
			messages := rounds * concurrency
			for range b.N {
				publishBenchmark(b, p, messages)
				sub := p.Subscriber("g", concurrency)
				out, err := sub.Subscribe(b.Context(), "topic")
				require.NoError(b, err)
				first := <-out // the subscriptions are on their way
				began := time.Now()
				first.Ack()
				var all sync.WaitGroup
				for range messages - 1 {
					msg := <-out
					all.Add(1)
					time.AfterFunc(latency, func() {
						msg.Ack()
						all.Done()
					})
				}
				all.Wait()
				rate := float64(messages) / time.Since(began).Seconds()
				b.ReportMetric(rate, "msgs/s")
				b.ReportMetric(100*rate*latency.Seconds()/float64(concurrency), "%ideal")
				require.NoError(b, sub.Close())
			}
			require.NoError(b, p.Close())
		})
	}
}

// benchmark keeps at most window messages published and unfinished.
func benchmark(b *testing.B, pub message.Publisher, out <-chan *message.Message) {
	const window = 1000
	unfinished := make(chan struct{}, window)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for range b.N {
			msg := <-out
			msg.Ack()
			<-unfinished
		}
	}()
	b.ReportAllocs()
	b.ResetTimer()
	for range b.N {
		unfinished <- struct{}{}
		if err := pub.Publish("topic", benchmarkMessage()); err != nil {
			b.Fatal(err)
		}
	}
	<-done
	b.StopTimer()
}

func benchmarkMessage() *message.Message {
	msg := message.NewMessage("0199aaaa-0000-7000-8000-000000000000.1", make([]byte, 256))
	for _, key := range []string{"ce_id", "ce_type", "ce_source", "ce_time", "ce_subject", "order_number", "attempt", "traceparent"} {
		msg.Metadata.Set(key, "value")
	}
	return msg
}
