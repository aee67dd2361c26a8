package middleware

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	wm "github.com/ThreeDotsLabs/watermill/message/router/middleware"
)

// poisonTimeout bounds a publish to the poison topic, which does not end with
// the context of the poisoned message.
const poisonTimeout = 10 * time.Second

// Poison publishes a copy of a message to topic when the handler's error is one
// for which undecodable reports true, that is, when no later delivery of the
// message can fare better. The message is then done with. All other errors pass:
// an order must not be given up because a shutdown cancelled its handler.
//
// The copy says in its metadata why it was poisoned and where it came from,
// under the keys of Watermill's own PoisonQueue. Its context carries the values
// of the message's, but not its end. If it cannot be published, both errors are
// returned and the message must come again.
func Poison(pub message.Publisher, topic string, undecodable func(error) bool) message.HandlerMiddleware {
	return func(h message.HandlerFunc) message.HandlerFunc {
		return func(msg *message.Message) ([]*message.Message, error) {
			produced, err := h(msg)
			if err == nil || !undecodable(err) {
				return produced, err
			}
			if publishErr := publishPoison(pub, topic, msg, err); publishErr != nil {
				return nil, errors.Join(err, fmt.Errorf("publish message %s to %s: %w", msg.UUID, topic, publishErr))
			}
			return nil, nil
		}
	}
}

func publishPoison(pub message.Publisher, topic string, msg *message.Message, reason error) error {
	// The message must not be lost because its own context is over already.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(msg.Context()), poisonTimeout)
	defer cancel()
	poisoned := msg.Copy()
	poisoned.SetContext(ctx)
	poisoned.Metadata.Set(wm.ReasonForPoisonedKey, reason.Error())
	poisoned.Metadata.Set(wm.PoisonedTopicKey, message.SubscribeTopicFromCtx(ctx))
	poisoned.Metadata.Set(wm.PoisonedHandlerKey, message.HandlerNameFromCtx(ctx))
	poisoned.Metadata.Set(wm.PoisonedSubscriberKey, message.SubscriberNameFromCtx(ctx))
	return pub.Publish(topic, poisoned)
}
