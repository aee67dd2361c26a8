package pubsub

import (
	"errors"
	"fmt"
	"strconv"

	wamqp "github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"
)

// Headers that are not metadata.
const (
	headerID            = wamqp.DefaultMessageUUIDHeaderKey
	headerDeliveryCount = "x-delivery-count" // by quorum queues, from the second delivery on
)

// keyDelivery is the metadata key under which a delivery carries its number
// through the library. Consumers do not see it.
const keyDelivery = "sluice_delivery"

// Limits of the protocol. Passing one costs the connection, so what would is
// refused before.
const (
	longestHeaderKey = 255
	largestHeaders   = 100_000 // they must fit one frame of 128 KiB
)

// errGhost refuses the empty delivery that the library makes up when the broker
// cancels a consumer. It ends the library's subscription, which begins anew.
var errGhost = errors.New("the broker cancelled the consumer")

// amqpMarshaler takes metadata to headers and back, byte for byte. It refuses no
// delivery: the library requeues what is refused, at once and for ever.
type amqpMarshaler struct {
	marshalled func()
}

type publishingKey struct{}

// Marshal implements wamqp.Marshaler. What is published was made before: the
// caller of Publish may have given up by now, and be changing its message.
func (m amqpMarshaler) Marshal(msg *message.Message) (amqp.Publishing, error) {
	m.marshalled()
	made, ok := msg.Context().Value(publishingKey{}).(*amqp.Publishing)
	if !ok {
		return amqp.Publishing{}, errors.New("message of somebody else")
	}
	return *made, nil
}

// marshal makes a publishing of a message. number is what it is known by if it
// comes back.
func marshal(msg *message.Message, number string) (*amqp.Publishing, error) {
	headers := make(amqp.Table, len(msg.Metadata)+1)
	size := len(msg.UUID)
	for key, value := range msg.Metadata {
		if len(key) > longestHeaderKey {
			return nil, fmt.Errorf("metadata key of %d bytes, %d are possible", len(key), longestHeaderKey)
		}
		headers[key] = value
		size += len(key) + len(value)
	}
	if size > largestHeaders {
		return nil, fmt.Errorf("id and metadata of %d bytes, %d are possible", size, largestHeaders)
	}
	headers[headerID] = msg.UUID
	return &amqp.Publishing{Headers: headers, DeliveryMode: amqp.Persistent, CorrelationId: number, Body: msg.Payload}, nil
}

// Unmarshal implements wamqp.Marshaler.
func (m amqpMarshaler) Unmarshal(d amqp.Delivery) (*message.Message, error) {
	if d.Acknowledger == nil {
		return nil, errGhost
	}
	id := d.MessageId
	metadata := make(message.Metadata, len(d.Headers)+1)
	for key, value := range d.Headers {
		switch key {
		case headerID:
			id = headerText(value)
		case headerDeliveryCount:
		default:
			metadata[key] = headerText(value)
		}
	}
	metadata[keyDelivery] = strconv.FormatInt(deliveryNumber(d), 10)
	msg := message.NewMessage(id, d.Body)
	msg.Metadata = metadata
	return msg, nil
}

func headerText(value any) string {
	switch v := value.(type) {
	case string:
		return v
	case []byte:
		return string(v)
	default:
		return fmt.Sprint(v)
	}
}

// deliveryNumber is 1 for the first delivery. Classic queues do not count.
func deliveryNumber(d amqp.Delivery) int64 {
	var before int64
	switch count := d.Headers[headerDeliveryCount].(type) {
	case int64:
		before = count
	case int32:
		before = int64(count)
	}
	if d.Redelivered {
		before = max(before, 1)
	}
	return 1 + before
}
