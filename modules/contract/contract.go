// Package contract is what the modules of Sluice share: the topics, the
// events that travel on them, the consumer groups and the states of an order.
// It is the only package that more than one module imports, and it imports
// nothing of Sluice: a module that wants to follow orders needs this package
// and a broker, nothing else.
//
// Events are Watermill messages. The payload of an OrderSubmitted is the
// order as the client sent it, byte for byte; the payload of an outcome is
// JSON. All else is metadata, named after the attributes of CloudEvents 1.0
// with the prefix "ce_" (CloudEvents Kafka and AMQP bindings use the same).
package contract

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
)

// Topics.
const (
	TopicSubmitted = "orders.submitted" // intake → dispatch: an order wants saving
	TopicOutcome   = "orders.outcome"   // dispatch → intake and whoever follows orders
	TopicPoison    = "orders.poison"    // messages that no handler can read
)

// Consumer groups. Each group gets its own copy of every message of a topic.
const (
	GroupDispatch = "dispatch"
	GroupIntake   = "intake"
)

// Event types, the values of the metadata key ce_type.
const (
	TypeSubmitted     = "order.submitted.v1"
	TypeSaved         = "order.saved.v1"
	TypeRejected      = "order.rejected.v1"
	TypeAttemptFailed = "order.attempt_failed.v1"
	TypeDead          = "order.dead.v1"
	// TypeMarker is no news of an order: see Marker. Who follows orders can
	// ignore it.
	TypeMarker = "intake.marker.v1"
)

// Sources, the values of the metadata key ce_source.
const (
	sourceIntake   = "/sluice/intake"
	sourceDispatch = "/sluice/dispatch"
)

// Metadata keys.
const (
	keyID          = "ce_id"
	keyType        = "ce_type"
	keySource      = "ce_source"
	keyTime        = "ce_time"
	keySubject     = "ce_subject"
	keySpecVersion = "ce_specversion"
	keyContentType = "ce_datacontenttype"
	keyOrderNumber = "order_number"
	keyAttempt     = "attempt"
	keySchema      = "schema_version"
)

const (
	cloudEventsVersion = "1.0"
	schemaVersion      = "1"
)

// ErrUndecodable is wrapped by the errors of the Decode functions: the message
// is not one of ours and never will be, however often it is delivered.
var ErrUndecodable = errors.New("undecodable message")

// Status is the state of an order as clients see it.
type Status string

// The states of an order. Saved, rejected and dead are final.
const (
	StatusAccepted Status = "accepted" // waiting, or in flight, before its first answer
	StatusRetrying Status = "retrying" // at least one attempt failed, the next one is scheduled or in flight
	StatusSaved    Status = "saved"    // the backend has it
	StatusRejected Status = "rejected" // the backend refused it for good
	StatusDead     Status = "dead"     // the last attempt failed; can be replayed
)

// Statuses lists every state, in the order of an order's life.
func Statuses() []Status {
	return []Status{StatusAccepted, StatusRetrying, StatusSaved, StatusRejected, StatusDead}
}

// Final reports whether an order in this state is done.
func (s Status) Final() bool {
	return s == StatusSaved || s == StatusRejected || s == StatusDead
}

// Submitted says that an order wants one attempt at being saved.
type Submitted struct {
	OrderID     string // UUIDv7
	OrderNumber string // the client's own number, "" where there is none
	Attempt     int    // 1 for the first
	ContentType string // of Body
	AcceptedAt  time.Time
	Body        []byte // as the client sent it
}

// Message encodes the event. The message id is made of the order's id and the
// attempt, so that a repeated publication is recognisable as such.
func (s Submitted) Message() *message.Message {
	msg := message.NewMessage(s.OrderID+"."+strconv.Itoa(s.Attempt), s.Body)
	stamp(msg, TypeSubmitted, sourceIntake, s.OrderID, s.AcceptedAt)
	msg.Metadata.Set(keyContentType, s.ContentType)
	msg.Metadata.Set(keyOrderNumber, s.OrderNumber)
	msg.Metadata.Set(keyAttempt, strconv.Itoa(s.Attempt))
	return msg
}

// DecodeSubmitted reads a message of TopicSubmitted. Its errors wrap
// ErrUndecodable. The body is the message's payload, not a copy.
func DecodeSubmitted(msg *message.Message) (Submitted, error) {
	if got := msg.Metadata.Get(keyType); got != TypeSubmitted {
		return Submitted{}, fmt.Errorf("%w %q: %s is %q, want %q", ErrUndecodable, msg.UUID, keyType, got, TypeSubmitted)
	}
	s := Submitted{
		OrderID:     msg.Metadata.Get(keySubject),
		OrderNumber: msg.Metadata.Get(keyOrderNumber),
		ContentType: msg.Metadata.Get(keyContentType),
		Body:        msg.Payload,
	}
	if s.OrderID == "" {
		return Submitted{}, fmt.Errorf("%w %q: %s is empty", ErrUndecodable, msg.UUID, keySubject)
	}
	var err error
	if s.Attempt, err = strconv.Atoi(msg.Metadata.Get(keyAttempt)); err != nil || s.Attempt < 1 {
		return Submitted{}, fmt.Errorf("%w %q: %s is %q, want a number from 1 on", ErrUndecodable, msg.UUID, keyAttempt, msg.Metadata.Get(keyAttempt))
	}
	if s.AcceptedAt, err = time.Parse(time.RFC3339Nano, msg.Metadata.Get(keyTime)); err != nil {
		return Submitted{}, fmt.Errorf("%w %q: %s: %w", ErrUndecodable, msg.UUID, keyTime, err)
	}
	return s, nil
}

// Outcome says what became of one attempt at saving an order, or (TypeDead)
// that there will be no further one.
type Outcome struct {
	Type        string `json:"-"` // TypeSaved, TypeRejected, TypeAttemptFailed or TypeDead
	OrderID     string `json:"orderId"`
	OrderNumber string `json:"orderNumber,omitempty"`
	Attempt     int    `json:"attempt"`

	StartedAt time.Time     `json:"startedAt"`
	Duration  time.Duration `json:"durationNanos"`

	// StatusCode is the backend's, 0 when it gave no answer.
	StatusCode int `json:"statusCode,omitempty"`
	// ContentType and Body are the backend's answer, cut off at
	// dispatch.max_response bytes; Truncated says that they were.
	ContentType string `json:"contentType,omitempty"`
	Body        []byte `json:"body,omitempty"`
	Truncated   bool   `json:"truncated,omitempty"`

	// Error says in one line why the attempt did not save the order.
	Error string `json:"error,omitempty"`
	// Timeout marks attempts that ended because backend.timeout passed.
	Timeout bool `json:"timeout,omitempty"`
	// RetryAfter is how long the backend asked to be left alone, 0 when it
	// did not ask.
	RetryAfter time.Duration `json:"retryAfterNanos,omitempty"`
}

// Message encodes the outcome for TopicOutcome.
func (o Outcome) Message() (*message.Message, error) {
	payload, err := json.Marshal(o)
	if err != nil {
		return nil, fmt.Errorf("encode outcome of order %s: %w", o.OrderID, err)
	}
	source := sourceDispatch
	if o.Type == TypeDead {
		source = sourceIntake
	}
	msg := message.NewMessage(o.OrderID+"."+strconv.Itoa(o.Attempt)+"."+o.Type, payload)
	stamp(msg, o.Type, source, o.OrderID, o.StartedAt.Add(o.Duration))
	msg.Metadata.Set(keyContentType, "application/json")
	msg.Metadata.Set(keyOrderNumber, o.OrderNumber)
	msg.Metadata.Set(keyAttempt, strconv.Itoa(o.Attempt))
	return msg, nil
}

// DecodeOutcome reads a message of TopicOutcome. Its errors wrap
// ErrUndecodable.
func DecodeOutcome(msg *message.Message) (Outcome, error) {
	o := Outcome{Type: msg.Metadata.Get(keyType)}
	switch o.Type {
	case TypeSaved, TypeRejected, TypeAttemptFailed, TypeDead:
	default:
		return Outcome{}, fmt.Errorf("%w %q: %s is %q, want an outcome", ErrUndecodable, msg.UUID, keyType, o.Type)
	}
	if err := json.Unmarshal(msg.Payload, &o); err != nil {
		return Outcome{}, fmt.Errorf("%w %q: %w", ErrUndecodable, msg.UUID, err)
	}
	if o.OrderID == "" || o.Attempt < 1 {
		return Outcome{}, fmt.Errorf("%w %q: orderId is %q, attempt is %d", ErrUndecodable, msg.UUID, o.OrderID, o.Attempt)
	}
	return o, nil
}

// Marker goes the way of an order without being one: intake publishes it on
// TopicSubmitted, dispatch passes it on to TopicOutcome, unchanged and without a
// call of the backend, and when it is back at intake, whatever was published
// before it has been handed out as well. That is how intake learns that silent
// orders were lost on the way, and do not just wait in a long queue.
type Marker struct {
	SentAt time.Time `json:"sentAt"`
	// LostBefore makes the marker the second of a pair: an order published
	// before this time was handed out before the first one came back, and had
	// all the time of an attempt since. If it is silent when this one comes
	// back, it was lost. The zero time says nothing.
	LostBefore time.Time `json:"lostBefore,omitzero"`
	// Last names a marker that did not go the way of the orders: a process that
	// stops published it on TopicOutcome itself, behind the last outcomes, and
	// waits for it to know that it has taken all of them.
	Last string `json:"last,omitempty"`
}

// Message encodes the marker for TopicSubmitted or, if it is a last one, for
// TopicOutcome.
func (m Marker) Message() (*message.Message, error) {
	payload, err := json.Marshal(m)
	if err != nil {
		return nil, fmt.Errorf("encode marker: %w", err)
	}
	msg := message.NewMessage("marker."+strconv.FormatInt(m.SentAt.UnixMicro(), 10), payload)
	stamp(msg, TypeMarker, sourceIntake, "", m.SentAt)
	msg.Metadata.Set(keyContentType, "application/json")
	return msg, nil
}

// IsMarker reports whether the message says that it is a marker.
func IsMarker(msg *message.Message) bool { return msg.Metadata.Get(keyType) == TypeMarker }

// DecodeMarker reads a marker. Its errors wrap ErrUndecodable.
func DecodeMarker(msg *message.Message) (Marker, error) {
	var m Marker
	if err := json.Unmarshal(msg.Payload, &m); err != nil {
		return Marker{}, fmt.Errorf("%w %q: %w", ErrUndecodable, msg.UUID, err)
	}
	return m, nil
}

// roomForMetadata is how many elements a message will have, those of its trace
// and of a redelivery included, so that the map need not grow.
const roomForMetadata = 16

func stamp(msg *message.Message, typ, source, subject string, at time.Time) {
	msg.Metadata = make(message.Metadata, roomForMetadata)
	msg.Metadata.Set(keyID, msg.UUID)
	msg.Metadata.Set(keyType, typ)
	msg.Metadata.Set(keySource, source)
	msg.Metadata.Set(keySubject, subject)
	msg.Metadata.Set(keyTime, at.UTC().Format(time.RFC3339Nano))
	msg.Metadata.Set(keySpecVersion, cloudEventsVersion)
	msg.Metadata.Set(keySchema, schemaVersion)
}
