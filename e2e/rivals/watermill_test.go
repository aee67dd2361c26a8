package rivals

import (
	"context"
	stdsql "database/sql"
	"fmt"
	"testing"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	"github.com/ThreeDotsLabs/watermill-sql/v3/pkg/sql"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/pubsub/gochannel"
	_ "github.com/jackc/pgx/v5/stdlib" // registers the driver "pgx"
	amqp091 "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"
)

// watermillQueue is a broker behind Watermill's publisher and subscriber, with
// one router that has one handler and no middleware, as in Watermill's "Getting
// started" (https://watermill.io/docs/getting-started/).
type watermillQueue struct {
	publisher  message.Publisher
	subscriber message.Subscriber
	submitted  string // topic of orders
	outcome    string // topic of what became of them

	stop func(testing.TB) // of the router; nil before work
}

func newWatermillQueue(publisher message.Publisher, subscriber message.Subscriber) watermillQueue {
	topic := name()
	return watermillQueue{publisher: publisher, subscriber: subscriber, submitted: topic, outcome: topic + "_outcome"}
}

func (q *watermillQueue) put(_ context.Context, orders []order) error {
	messages := make([]*message.Message, len(orders))
	for i, o := range orders {
		messages[i] = message.NewMessage(o.id, o.body)
	}
	return q.publisher.Publish(q.submitted, messages...)
}

func (q *watermillQueue) work(tb testing.TB, s save) {
	tb.Helper()
	router, err := message.NewRouter(message.RouterConfig{}, watermill.NopLogger{})
	require.NoError(tb, err)
	router.AddHandler("dispatch", q.submitted, q.subscriber, q.outcome, q.publisher, func(msg *message.Message) ([]*message.Message, error) {
		if err := s(msg.Context(), order{msg.UUID, msg.Payload}); err != nil {
			return nil, err
		}
		saved := fmt.Appendf(nil, `{"orderId":%q,"statusCode":200}`, msg.UUID)
		return []*message.Message{message.NewMessage(watermill.NewUUID(), saved)}, nil
	})
	ended := make(chan error, 1)
	go func() { ended <- router.Run(tb.Context()) }()
	q.stop = func(tb testing.TB) {
		tb.Helper()
		require.NoError(tb, router.Close())
		require.NoError(tb, <-ended)
	}
	select {
	case <-router.Running():
	case err := <-ended:
		ended <- err // for stop
		require.FailNow(tb, "the router does not run", "%v", err)
	}
}

func (q *watermillQueue) close(tb testing.TB) {
	tb.Helper()
	if q.stop != nil {
		q.stop(tb)
	}
	require.NoError(tb, q.subscriber.Close())
	require.NoError(tb, q.publisher.Close())
}

// goChannel is Watermill's Pub/Sub in the process.
type goChannel struct{ watermillQueue }

// openGoChannel leaves all at its default (https://watermill.io/pubsubs/gochannel/):
// a publish does not wait for the consumer, and nothing bounds how many messages
// wait or how many handlers run. Outcomes, to which nobody subscribes, are dropped.
func openGoChannel(testing.TB) rival {
	library := gochannel.NewGoChannel(gochannel.Config{}, watermill.NopLogger{})
	return &goChannel{newWatermillQueue(library, library)}
}

// openAMQP takes the configuration of Watermill's documentation for work queues
// (https://watermill.io/pubsubs/amqp/): durable queues, persistent messages, a
// prefetch of 1. Each Publish opens a channel and does not wait for the broker's
// confirm; the subscriber handles one message at a time, which is also what makes
// of it the ideal of 1/latency.
func openAMQP(tb testing.TB) rival {
	address, admin := rabbitMQ(tb)
	return newAMQPQueue(tb, admin, amqp.NewDurableQueueConfig(address))
}

// openAMQPWithConfirms waits for the broker's word that it has the message, as a
// gateway must that promises to keep it, and keeps its channels, without which
// confirms are slow (Publish.ConfirmDelivery and Publish.ChannelPoolSize).
func openAMQPWithConfirms(tb testing.TB) rival {
	address, admin := rabbitMQ(tb)
	cfg := amqp.NewDurableQueueConfig(address)
	cfg.Publish.ConfirmDelivery = true
	cfg.Publish.ChannelPoolSize = publishers
	return newAMQPQueue(tb, admin, cfg)
}

// amqpQueue deletes its queues at the end.
type amqpQueue struct {
	watermillQueue
	admin *amqp091.Connection
}

func newAMQPQueue(tb testing.TB, admin *amqp091.Connection, cfg amqp.Config) rival {
	tb.Helper()
	publisher, err := amqp.NewPublisher(cfg, watermill.NopLogger{})
	require.NoError(tb, err)
	subscriber, err := amqp.NewSubscriber(cfg, watermill.NopLogger{})
	require.NoError(tb, err)
	q := &amqpQueue{newWatermillQueue(publisher, subscriber), admin}
	// RabbitMQ drops what is published before there is a queue, outcomes included.
	require.NoError(tb, subscriber.SubscribeInitialize(q.submitted))
	require.NoError(tb, subscriber.SubscribeInitialize(q.outcome))
	return q
}

func (q *amqpQueue) close(tb testing.TB) {
	tb.Helper()
	q.watermillQueue.close(tb)
	channel, err := q.admin.Channel()
	require.NoError(tb, err)
	for _, queue := range []string{q.submitted, q.outcome} {
		_, err := channel.QueueDelete(queue, false, false, false)
		require.NoError(tb, err)
	}
	require.NoError(tb, q.admin.Close())
}

// sqlConnections is how many connections the SQL publisher may open and keep, one
// for each goroutine that publishes; database/sql would close all but 2 of them
// again and again. PostgreSQL allows 100 by default.
const sqlConnections = publishers

// sqlQueue has a database of its own.
type sqlQueue struct {
	watermillQueue
	db     *stdsql.DB
	schema sql.DefaultPostgreSQLSchema
}

// openSQL takes the default schema and offsets of Watermill's documentation
// (https://watermill.io/pubsubs/sql/): a table that is a log, of which each
// consumer group reads 100 rows at a time and handles them one by one, which is
// also what makes of it the ideal of 1/latency. Payloads are JSON, as they are by
// default. The driver is pgx, which is faster here than lib/pq.
func openSQL(tb testing.TB) rival {
	tb.Helper()
	db, err := stdsql.Open("pgx", postgreSQL(tb))
	require.NoError(tb, err)
	db.SetMaxOpenConns(sqlConnections)
	db.SetMaxIdleConns(sqlConnections)
	schema := sql.DefaultPostgreSQLSchema{}
	publisher, err := sql.NewPublisher(db, sql.PublisherConfig{SchemaAdapter: schema}, watermill.NopLogger{})
	require.NoError(tb, err)
	subscriber, err := sql.NewSubscriber(db, sql.SubscriberConfig{
		SchemaAdapter:  schema,
		OffsetsAdapter: sql.DefaultPostgreSQLOffsetsAdapter{},
	}, watermill.NopLogger{})
	require.NoError(tb, err)
	q := &sqlQueue{newWatermillQueue(publisher, subscriber), db, schema}
	// The tables are made here and not by the first of 64 publishers: CREATE TABLE
	// IF NOT EXISTS can fail when two run at once.
	require.NoError(tb, subscriber.SubscribeInitialize(q.submitted))
	require.NoError(tb, subscriber.SubscribeInitialize(q.outcome))
	return q
}

func (q *sqlQueue) settle(tb testing.TB) {
	tb.Helper()
	_, err := q.db.ExecContext(tb.Context(), `ANALYZE `+q.schema.MessagesTable(q.submitted))
	require.NoError(tb, err)
}

func (q *sqlQueue) close(tb testing.TB) {
	tb.Helper()
	q.watermillQueue.close(tb)
	require.NoError(tb, q.db.Close())
}
