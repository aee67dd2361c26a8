package pubsub_test

import (
	"log/slog"
	"strconv"
	"testing"

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
