package middleware

import "github.com/ThreeDotsLabs/watermill/message"

// room is what the stack of a handler takes when it calls a backend or reads
// JSON, a little less than 16 KiB.
const room = 12 << 10

// Roomy gives the handler a stack that is large enough from the start. Each
// message is handled by a goroutine of its own (message.Router), whose stack of
// 2 KiB would otherwise be outgrown three times, and copied with all that is on
// it, each time deeper down. Make it the outermost.
func Roomy(h message.HandlerFunc) message.HandlerFunc {
	return func(msg *message.Message) ([]*message.Message, error) {
		grow(len(msg.Payload))
		return h(msg)
	}
}

// grow makes the runtime grow the stack by needing it. What it does with the
// array keeps the compiler from doing without.
//
//go:noinline
func grow(n int) byte {
	var stack [room]byte
	stack[n%room] = 1
	return stack[(n+1)%room]
}
