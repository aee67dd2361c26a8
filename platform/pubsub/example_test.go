package pubsub_test

import (
	"context"
	"fmt"
	"log/slog"

	"github.com/ThreeDotsLabs/watermill/message"

	"sluice/platform/pubsub"
)

// A consumer group takes messages, at most four at a time, and stops without
// leaving one half done.
func Example() {
	ctx := context.Background()
	p, err := pubsub.Open(ctx, pubsub.DefaultConfig(), nil, slog.New(slog.DiscardHandler))
	if err != nil {
		fmt.Println(err)
		return
	}
	subscriber := p.Subscriber("billing", 4)
	messages, err := subscriber.Subscribe(ctx, "orders.outcome")
	if err != nil {
		fmt.Println(err)
		return
	}
	go func() {
		for msg := range messages {
			fmt.Printf("%s, redelivered: %t\n", msg.Payload, pubsub.Redelivered(msg))
			msg.Ack()
		}
	}()

	// Returns when billing has acked it.
	err = p.Confirmed().Publish("orders.outcome", message.NewMessage("1", []byte("order 1 is saved")))
	fmt.Println("published:", err)
	fmt.Println("drained:", subscriber.Drain(ctx))
	fmt.Println("closed:", p.Close())

	// Output:
	// order 1 is saved, redelivered: false
	// published: <nil>
	// drained: <nil>
	// closed: <nil>
}
