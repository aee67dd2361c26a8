package middleware_test

import (
	"fmt"
	"log/slog"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"

	"sluice/platform/middleware"
)

// A handler that publishes what it produces without a permit, and runs with
// one: at most 64 at once, each for at most ten seconds.
func ExampleChain() {
	logger := slog.New(slog.DiscardHandler)
	limiter := middleware.NewLimiter(64)
	outcomes := publisherFunc(func(topic string, msgs ...*message.Message) error {
		fmt.Printf("%s: %s, permits in use: %d\n", topic, msgs[0].Payload, limiter.InFlight())
		return nil
	})
	handler := middleware.Chain(
		func(msg *message.Message) ([]*message.Message, error) {
			fmt.Printf("saving %s, permits in use: %d\n", msg.Payload, limiter.InFlight())
			return []*message.Message{message.NewMessage("2", []byte("saved"))}, nil
		},
		middleware.Recover(logger),
		middleware.Publish(outcomes, "orders.outcome", logger),
		middleware.Throttle(limiter),
		middleware.Timeout(10*time.Second),
	)
	_, err := handler(message.NewMessage("1", []byte("order 1")))
	fmt.Println(err)

	// Output:
	// saving order 1, permits in use: 1
	// orders.outcome: saved, permits in use: 0
	// <nil>
}
