package e2e

import (
	"context"
	"database/sql"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
)

// home is where a gateway has its orders and its messages. A gateway that is
// started in the home of another goes on where that one ended, or shares the
// work with it.
type home struct {
	settings settings
	durable  bool // the broker keeps messages when the gateway ends
}

// embedded is the default: all in one process and one file of that directory.
func embedded(dir string) home {
	return home{settings: settings{"store.dsn": filepath.Join(dir, "sluice.db")}}
}

// kindOfHome is a combination of store and broker.
type kindOfHome struct {
	name string
	open func(t testing.TB) home
}

// homes are all that promise the same.
func homes() []kindOfHome {
	return append([]kindOfHome{
		{"sqlite-gochannel", func(t testing.TB) home { return embedded(t.TempDir()) }},
	}, durableHomes()...)
}

// durableHomes are those whose broker keeps messages.
func durableHomes() []kindOfHome {
	return append([]kindOfHome{
		{"sqlite-amqp", func(t testing.TB) home { return onAMQP(t, embedded(t.TempDir())) }},
	}, sharedHomes()...)
}

// sharedHomes are those that several processes can live in.
func sharedHomes() []kindOfHome {
	return []kindOfHome{
		{"postgres-amqp", func(t testing.TB) home { return onAMQP(t, onPostgres(services.Postgres(t))) }},
		{"postgres-sql", func(t testing.TB) home { return onSQL(onPostgres(services.Postgres(t))) }},
	}
}

// eachHome runs a test in a new home of every kind.
func eachHome(t *testing.T, test func(t *testing.T, h home)) {
	t.Helper()
	inEach(t, homes(), test)
}

func inEach(t *testing.T, kinds []kindOfHome, test func(t *testing.T, h home)) {
	t.Helper()
	for _, kind := range kinds {
		t.Run(kind.name, func(t *testing.T) { test(t, kind.open(t)) })
	}
}

// onPostgres is a home with its orders in that database.
func onPostgres(dsn string) home {
	return home{settings: settings{"store.driver": "postgres", "store.dsn": dsn}}
}

// onSQL moves the messages of a home to the database that has its orders.
func onSQL(h home) home {
	return h.with(true, settings{"pubsub.backend": "sql"})
}

// onAMQP moves the messages of a home to RabbitMQ, under names that are deleted
// at the end.
func onAMQP(t testing.TB, h home) home {
	t.Helper()
	url, prefix := services.AMQP(t)
	h = onAMQPAt(h, url, prefix)
	t.Cleanup(func() {
		onChannel(t, url, func(ch *amqp.Channel) {
			for _, topic := range []string{"orders.submitted", "orders.outcome", "orders.poison"} {
				require.NoError(t, ch.ExchangeDelete(prefix+"."+topic, false, false))
			}
			for _, queue := range h.queues() {
				_, err := ch.QueueDelete(queue, false, false, false)
				require.NoError(t, err)
			}
		})
	})
	return h
}

// onAMQPAt moves the messages of a home to the RabbitMQ with that URL.
func onAMQPAt(h home, url, prefix string) home {
	return h.with(true, settings{"pubsub.backend": "amqp", "pubsub.amqp.url": url, "pubsub.amqp.prefix": prefix})
}

// with returns the home with other settings.
func (h home) with(durable bool, more settings) home {
	all := settings{}
	for _, s := range []settings{h.settings, more} {
		for key, value := range s {
			all[key] = value
		}
	}
	return home{settings: all, durable: durable}
}

// system is how traces call the broker.
func (h home) system() string {
	switch h.settings["pubsub.backend"] {
	case "amqp":
		return "rabbitmq"
	case "sql":
		return "postgresql"
	default:
		return "gochannel"
	}
}

// queues are the names of a home's queues in RabbitMQ; the first is that of the
// orders.
func (h home) queues() []string {
	prefix := h.settings["pubsub.amqp.prefix"]
	return []string{prefix + ".orders.submitted:dispatch", prefix + ".orders.outcome:intake", prefix + ".orders.poison:poison"}
}

// purge takes all messages with orders away from the broker.
func (h home) purge(t testing.TB) {
	t.Helper()
	if h.settings["pubsub.backend"] == "sql" {
		h.onQueue(t, `DELETE FROM `)
		return
	}
	onChannel(t, h.settings["pubsub.amqp.url"], func(ch *amqp.Channel) {
		_, err := ch.QueuePurge(h.queues()[0], false)
		require.NoError(t, err)
	})
}

// remove takes the queue of the orders away, with the messages in it.
func (h home) remove(t testing.TB) {
	t.Helper()
	if h.settings["pubsub.backend"] == "sql" {
		h.onQueue(t, `DROP TABLE `)
		return
	}
	onChannel(t, h.settings["pubsub.amqp.url"], func(ch *amqp.Channel) {
		_, err := ch.QueueDelete(h.queues()[0], false, false, false)
		require.NoError(t, err)
	})
}

// onQueue does something to the table in which the orders wait.
func (h home) onQueue(t testing.TB, statement string) {
	t.Helper()
	onDatabase(t, h.settings["store.dsn"], func(db *sql.DB) {
		var id int
		require.NoError(t, db.QueryRow(`SELECT id FROM sluice_groups WHERE topic = 'orders.submitted' AND consumer_group = 'dispatch'`).Scan(&id))
		_, err := db.Exec(statement + `sluice_queue_` + strconv.Itoa(id))
		require.NoError(t, err)
	})
}

func onChannel(t testing.TB, url string, f func(*amqp.Channel)) {
	t.Helper()
	conn, err := amqp.Dial(url)
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close()) }()
	ch, err := conn.Channel()
	require.NoError(t, err)
	f(ch)
}

func onDatabase(t testing.TB, dsn string, f func(*sql.DB)) {
	t.Helper()
	db, err := sql.Open("pgx", dsn)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	require.NoError(t, db.PingContext(ctx))
	f(db)
}
