package middleware

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
)

// The pause before another try to publish doubles from firstPause to lastPause.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

// Publish publishes what the inner handler produced to topic, and returns none
// of it, so that nothing is left for the router to publish: its own way fails a
// message, and with it the work that was done for it, on the first error, and
// its publisher is closed while handlers still run.
//
// It tries again after a pause, from 100 ms growing to 5 s, until the messages
// are published or the context of the consumed message ends; then it returns an
// error that wraps both reasons. It tries once even if that context is over. A
// produced message that has no context of its own gets the consumed one's. All
// messages of a try are published again if one of them failed.
func Publish(pub message.Publisher, topic string, logger *slog.Logger) message.HandlerMiddleware {
	return func(h message.HandlerFunc) message.HandlerFunc {
		return func(msg *message.Message) ([]*message.Message, error) {
			produced, err := h(msg)
			if err != nil || len(produced) == 0 {
				return nil, err
			}
			for _, p := range produced {
				if p.Context() == context.Background() {
					p.SetContext(msg.Context())
				}
			}
			return nil, publishUntil(pub, topic, logger, msg, produced)
		}
	}
}

// publishUntil publishes until it works or msg's context ends.
func publishUntil(pub message.Publisher, topic string, logger *slog.Logger, msg *message.Message, produced []*message.Message) error {
	ctx := msg.Context()
	// One line when the trouble begins, not one for each try of each message.
	level := slog.LevelWarn
	for pause := firstPause; ; pause = min(2*pause, lastPause) {
		err := pub.Publish(topic, produced...)
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("publish to %s: %w", topic, errors.Join(ctx.Err(), err))
		}
		logger.LogAttrs(ctx, level, "publish failed, trying again", append(attrs(msg),
			slog.String("publish_topic", topic), slog.Duration("pause", pause), slog.Any("error", err))...)
		level = slog.LevelDebug

		timer := time.NewTimer(pause)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("publish to %s: %w", topic, errors.Join(ctx.Err(), err))
		}
	}
}
