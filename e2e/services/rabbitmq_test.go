//go:build unix

package services_test

import (
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
)

func TestOwnRabbitMQComesBackAfterAKill(t *testing.T) {
	broker := services.OwnRabbitMQ(t)
	broker.Control("set_vm_memory_high_watermark", "0.6")
	broker.Kill()
	_, err := amqp.Dial(broker.URL)
	require.Error(t, err)
	broker.Start()
}
