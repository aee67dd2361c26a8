package pubsub

import (
	"fmt"
	"strings"

	"github.com/ThreeDotsLabs/watermill"
	wamqp "github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	amqp "github.com/rabbitmq/amqp091-go"
)

// exchange is the name of a topic's exchange.
func (c AMQPConfig) exchange(topic string) string { return c.Prefix + "." + topic }

// queue is the name of the queue in which a topic's messages wait for a group.
// The colon keeps topic and group apart, since both may contain dots.
func (c AMQPConfig) queue(topic, group string) string { return c.exchange(topic) + ":" + group }

// library is the configuration of Watermill's Publisher and of a Subscriber of
// the group.
func (c AMQPConfig) library(group string, marshaler wamqp.Marshaler, topology wamqp.TopologyBuilder) wamqp.Config {
	return wamqp.Config{
		Marshaler:       marshaler,
		TopologyBuilder: topology,
		Exchange:        wamqp.ExchangeConfig{GenerateName: c.exchange, Type: amqp.ExchangeTopic, Durable: true},
		Queue:           wamqp.QueueConfig{GenerateName: func(topic string) string { return c.queue(topic, group) }, Durable: true},
		QueueBind:       wamqp.QueueBindConfig{GenerateRoutingKey: everything},
		Publish: wamqp.PublishConfig{
			GenerateRoutingKey: func(topic string) string { return topic },
			Mandatory:          true, // what no queue takes comes back, see amqpSender
			ConfirmDelivery:    true,
			ChannelPoolSize:    amqpPool,
		},
		Consume: wamqp.ConsumeConfig{Qos: wamqp.QosConfig{PrefetchCount: 1}},
	}
}

func everything(string) string { return "#" }

// declare makes the exchange of a topic and the queues of its groups. What
// exists already is left as it is, unless it differs, which is an error.
func (c AMQPConfig) declare(connection *amqp.Connection, topic string, groups ...string) error {
	channel, err := connection.Channel()
	if err != nil {
		return fmt.Errorf("declare %s: %w", topic, err)
	}
	defer channel.Close() //nolint:errcheck // nothing depends on it, and a refusal has closed it already
	if err := c.declareOn(channel, arguments(c.QueueType, connection), topic, groups...); err != nil {
		return fmt.Errorf("declare %s: %w", topic, err)
	}
	return nil
}

func (c AMQPConfig) declareOn(channel *amqp.Channel, arguments amqp.Table, topic string, groups ...string) error {
	exchange := c.exchange(topic)
	if err := channel.ExchangeDeclare(exchange, amqp.ExchangeTopic, true, false, false, false, nil); err != nil {
		return fmt.Errorf("exchange %s: %w", exchange, err)
	}
	for _, group := range groups {
		queue := c.queue(topic, group)
		if _, err := channel.QueueDeclare(queue, true, false, false, false, arguments); err != nil {
			return fmt.Errorf("queue %s: %w", queue, err)
		}
		if err := channel.QueueBind(queue, everything(topic), exchange, false, nil); err != nil {
			return fmt.Errorf("bind queue %s: %w", queue, err)
		}
	}
	return nil
}

// arguments are those of every queue: no length limit, no time to live, and no
// number of deliveries after which a message is dropped. Quorum queues have one
// from RabbitMQ 4 on, unless they are told otherwise; before, they did not know
// the value that says so.
func arguments(queueType string, connection *amqp.Connection) amqp.Table {
	table := amqp.Table{amqp.QueueTypeArg: queueType}
	version, _ := connection.Properties["version"].(string)
	if major, _, _ := strings.Cut(version, "."); queueType == QueueQuorum && major != "" && major != "3" {
		table["x-delivery-limit"] = int64(-1)
	}
	return table
}

// lateTopology makes queue and exchange again before a subscription of the
// library begins anew, which it does when the queue was deleted. The first
// beginning follows on a declaration, and does without.
type lateTopology struct {
	cfg        AMQPConfig
	group      string
	connection *amqp.Connection
	begun      bool // the library builds one after the other
}

// BuildTopology implements wamqp.TopologyBuilder.
func (t *lateTopology) BuildTopology(channel *amqp.Channel, params wamqp.BuildTopologyParams, _ wamqp.Config, _ watermill.LoggerAdapter) error {
	if !t.begun {
		t.begun = true
		return nil
	}
	return t.cfg.declareOn(channel, arguments(t.cfg.QueueType, t.connection), params.Topic, t.group)
}

// ExchangeDeclare implements wamqp.TopologyBuilder.
func (t *lateTopology) ExchangeDeclare(*amqp.Channel, string, wamqp.Config) error { return nil }
