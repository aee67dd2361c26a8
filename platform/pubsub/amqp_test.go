package pubsub_test

import (
	"fmt"
	"testing"

	"github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
	"sluice/platform/pubsub"
)

// amqpConfig is a broker with nothing in it. What the test declares is deleted at
// its end.
func amqpConfig(t *testing.T) pubsub.Config {
	t.Helper()
	address, prefix := services.AMQP(t)
	cfg := pubsub.DefaultConfig()
	cfg.Backend = pubsub.BackendAMQP
	cfg.AMQP.URL, cfg.AMQP.Prefix = address, prefix
	t.Cleanup(func() { deleteAll(t, cfg.AMQP) })
	return cfg
}

func deleteAll(t *testing.T, cfg pubsub.AMQPConfig) {
	conn, err := amqp091.Dial(cfg.URL)
	require.NoError(t, err)
	defer conn.Close() //nolint:errcheck // the test is over
	ch, err := conn.Channel()
	require.NoError(t, err)
	for _, topic := range []string{"topic", "other topic", "busy", "quiet", "another topic", "orders", "outcomes", "drained topic"} {
		require.NoError(t, ch.ExchangeDelete(cfg.Prefix+"."+topic, false, false))
		for _, group := range []string{"g", "first", "second", "dispatch", "intake", "drained", "late"} {
			_, err := ch.QueueDelete(fmt.Sprintf("%s.%s:%s", cfg.Prefix, topic, group), false, false, false)
			require.NoError(t, err)
		}
	}
}
