package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"testing"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/stretchr/testify/require"
)

// listener follows all topics, as a module of somebody else would.
type listener struct {
	channel  *amqp.Channel
	messages map[string]<-chan amqp.Delivery // by topic
	schemas  *jsonschema.Compiler
	seen     map[string]int // by topic and type
}

var topics = []string{"orders.submitted", "orders.outcome", "orders.poison"}

// listen begins to follow before the gateway does its work. What it sets up
// goes with its connection, and the exchanges with the home.
func listen(t *testing.T, h home) *listener {
	t.Helper()
	conn, err := amqp.Dial(h.settings["pubsub.amqp.url"])
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, conn.Close()) })
	l := &listener{messages: map[string]<-chan amqp.Delivery{}, seen: map[string]int{}}
	l.channel, err = conn.Channel()
	require.NoError(t, err)
	for _, topic := range topics {
		exchange := h.settings["pubsub.amqp.prefix"] + "." + topic
		require.NoError(t, l.channel.ExchangeDeclare(exchange, amqp.ExchangeTopic, true, false, false, false, nil))
		queue, err := l.channel.QueueDeclare("", false, true, true, false, nil)
		require.NoError(t, err)
		require.NoError(t, l.channel.QueueBind(queue.Name, "#", exchange, false, nil))
		l.messages[topic], err = l.channel.Consume(queue.Name, "", true, true, false, false, nil)
		require.NoError(t, err)
	}
	text, err := os.ReadFile("../docs/asyncapi.yaml")
	require.NoError(t, err)
	l.schemas, err = schemasOf(text, "file:///asyncapi.yaml", jsonschema.Draft7)
	require.NoError(t, err)
	return l
}

// documented are the messages of docs/asyncapi.yaml by their type.
var documented = map[string]string{
	"order.submitted.v1": "orderSubmitted", "order.saved.v1": "orderSaved", "order.rejected.v1": "orderRejected",
	"order.attempt_failed.v1": "orderAttemptFailed", "order.dead.v1": "orderDead", "intake.marker.v1": "marker",
}

// await takes messages, each of which must be as documented, until it has seen
// so many of every kind.
func (l *listener) await(t *testing.T, want map[string]int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	enough := func() bool {
		for kind, n := range want {
			if l.seen[kind] < n {
				return false
			}
		}
		return true
	}
	for !enough() {
		var topic string
		var d amqp.Delivery
		select {
		case d = <-l.messages[topics[0]]:
			topic = topics[0]
		case d = <-l.messages[topics[1]]:
			topic = topics[1]
		case d = <-l.messages[topics[2]]:
			topic = topics[2]
		case <-ctx.Done():
			require.FailNow(t, "not all messages came", "want %v, saw %v", want, l.seen)
		}
		kind, _ := d.Headers["ce_type"].(string)
		name := documented[kind]
		if topic == "orders.poison" {
			kind, name = "poisoned", "poisoned"
		}
		l.seen[topic+" "+kind]++
		if d.Headers["test"] == nil { // by this test
			require.NoError(t, l.check(name, d), "%s %s: %v\n%s", topic, kind, d.Headers, d.Body)
		}
	}
}

func (l *listener) check(name string, d amqp.Delivery) error {
	place := "file:///asyncapi.yaml#/components/messages/" + name
	headers, err := json.Marshal(d.Headers)
	if err != nil {
		return err
	}
	for part, text := range map[string][]byte{"/headers": headers, "/payload": d.Body} {
		schema, err := l.schemas.Compile(place + part)
		if err != nil {
			return err
		}
		value, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
		if err != nil {
			return err
		}
		if err := schema.Validate(value); err != nil {
			return fmt.Errorf("%s: %w", part, err)
		}
	}
	return nil
}

func TestWhatIsPublishedIsAsDocumented(t *testing.T) {
	h := onAMQP(t, embedded(t.TempDir()))
	l := listen(t, h)
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, h, fast(b, "dispatch.max_attempts", "2"))

	saved := g.accept(t, "A-1", "Traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "Tracestate", "vendor=x")
	g.await(t, saved.ID, "saved")
	g.await(t, g.accept(t, "A-2-REJECT").ID, "rejected")
	b.control(t, `{"failNext": 2}`)
	g.await(t, g.accept(t, "A-3").ID, "dead")
	for _, topic := range topics[:2] {
		require.NoError(t, l.channel.PublishWithContext(t.Context(), h.settings["pubsub.amqp.prefix"]+"."+topic, "", false, false,
			amqp.Publishing{Headers: amqp.Table{"test": topic}, Body: []byte(`"nonsense"`)}))
	}
	l.await(t, map[string]int{
		"orders.submitted order.submitted.v1": 4, "orders.outcome order.saved.v1": 1, "orders.outcome order.rejected.v1": 1,
		"orders.outcome order.attempt_failed.v1": 2, "orders.outcome order.dead.v1": 1, "orders.poison poisoned": 2,
	})
	require.Zero(t, g.terminate(t))
	// What a process says at its end.
	l.await(t, map[string]int{"orders.outcome intake.marker.v1": 1})
}
