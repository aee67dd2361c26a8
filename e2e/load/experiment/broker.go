package experiment

import (
	"context"
	"crypto/rand"
	"database/sql"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	_ "github.com/jackc/pgx/v5/stdlib" // the driver "pgx"
	amqp "github.com/rabbitmq/amqp091-go"
)

// Where the broker is, is for the environment to say, by the names that the gateway has for it.
const (
	envAMQPURL  = "SLUICE_PUBSUB_AMQP_URL"
	envSQLDSN   = "SLUICE_PUBSUB_SQL_DSN"
	envStoreDSN = "SLUICE_STORE_DSN"

	defaultAMQPURL = "amqp://guest:guest@localhost:5672/"
)

// queues are the broker's part of one gateway: its settings, and how to remove what it leaves.
type queues struct {
	settings map[string]string
	remove   func(ctx context.Context) error
}

// newQueues chooses names that nobody else has.
func newQueues(broker string, environ []string) (queues, error) {
	name := "sluice_experiment_" + strings.ToLower(rand.Text()[:10])
	switch broker {
	case BrokerGoChannel:
		return queues{map[string]string{"pubsub.backend": broker}, func(context.Context) error { return nil }}, nil
	case BrokerAMQP:
		url := lookup(environ, envAMQPURL)
		if url == "" {
			url = defaultAMQPURL
		}
		return queues{map[string]string{"pubsub.backend": broker, "pubsub.amqp.url": url, "pubsub.amqp.prefix": name},
			func(context.Context) error { return removeAMQP(url, name) }}, nil
	case BrokerSQL:
		dsn := lookup(environ, envSQLDSN)
		if dsn == "" {
			dsn = lookup(environ, envStoreDSN)
		}
		if dsn == "" {
			return queues{}, fmt.Errorf("backend %s: set %s to a PostgreSQL database in which the experiment may make and drop tables", broker, envSQLDSN)
		}
		return queues{map[string]string{"pubsub.backend": broker, "pubsub.sql.dsn": dsn, "pubsub.sql.prefix": name},
			func(ctx context.Context) error { return removeSQL(ctx, dsn, name) }}, nil
	default:
		return queues{}, fmt.Errorf("backend: must be one of %s, %s, %s, is %q", BrokerGoChannel, BrokerAMQP, BrokerSQL, broker)
	}
}

// brokerServer is the broker with the name and version of its server, which must be there.
func brokerServer(ctx context.Context, broker string, environ []string) (server string, err error) {
	queues, err := newQueues(broker, environ)
	if err != nil {
		return "", err
	}
	switch broker {
	case BrokerAMQP:
		connection, err := dialAMQP(queues.settings["pubsub.amqp.url"])
		if err != nil {
			return "", fmt.Errorf("ask the broker for its version: %w", err)
		}
		server = fmt.Sprintf("%s (%v %v)", broker, connection.Properties["product"], connection.Properties["version"])
		return server, connection.Close()
	case BrokerSQL:
		db, err := sql.Open("pgx", queues.settings["pubsub.sql.dsn"])
		if err != nil {
			return "", fmt.Errorf("ask the broker for its version: %w", err)
		}
		defer func() { err = errors.Join(err, db.Close()) }()
		var version string
		if err := db.QueryRowContext(ctx, "SHOW server_version").Scan(&version); err != nil {
			return "", fmt.Errorf("ask the broker for its version: %w", err)
		}
		return fmt.Sprintf("%s (PostgreSQL %s)", broker, version), nil
	default:
		return broker, nil
	}
}

func dialAMQP(url string) (*amqp.Connection, error) {
	return amqp.DialConfig(url, amqp.Config{Dial: amqp.DefaultDial(5 * time.Second)})
}

func lookup(environ []string, name string) string {
	value := ""
	for _, line := range environ {
		if rest, ok := strings.CutPrefix(line, name+"="); ok {
			value = rest
		}
	}
	return value
}

// removeAMQP deletes the exchanges and queues of a gateway that has ended. Those that are not there are no error.
func removeAMQP(url, prefix string) (err error) {
	connection, err := dialAMQP(url)
	if err != nil {
		return fmt.Errorf("remove the queues of %s: %w", prefix, err)
	}
	defer func() { err = errors.Join(err, connection.Close()) }()
	channel, err := connection.Channel()
	if err != nil {
		return fmt.Errorf("remove the queues of %s: %w", prefix, err)
	}
	for topic, group := range map[string]string{"orders.submitted": "dispatch", "orders.outcome": "intake", "orders.poison": "poison"} {
		exchange := prefix + "." + topic
		if _, err := channel.QueueDelete(exchange+":"+group, false, false, false); err != nil {
			return fmt.Errorf("remove the queue of %s: %w", exchange, err)
		}
		if err := channel.ExchangeDelete(exchange, false, false); err != nil {
			return fmt.Errorf("remove the exchange %s: %w", exchange, err)
		}
	}
	return nil
}

// removeSQL drops the tables of a gateway that has ended.
func removeSQL(ctx context.Context, dsn, prefix string) (err error) {
	db, err := sql.Open("pgx", dsn)
	if err != nil {
		return fmt.Errorf("remove the tables of %s: %w", prefix, err)
	}
	defer func() { err = errors.Join(err, db.Close()) }()
	rows, err := db.QueryContext(ctx, `SELECT tablename FROM pg_tables WHERE schemaname = current_schema() AND starts_with(tablename, $1)`, prefix+"_")
	if err != nil {
		return fmt.Errorf("find the tables of %s: %w", prefix, err)
	}
	defer rows.Close()
	var tables []string
	for rows.Next() {
		var table string
		if err := rows.Scan(&table); err != nil {
			return fmt.Errorf("find the tables of %s: %w", prefix, err)
		}
		tables = append(tables, pgx.Identifier{table}.Sanitize())
	}
	if err := rows.Err(); err != nil {
		return fmt.Errorf("find the tables of %s: %w", prefix, err)
	}
	if len(tables) == 0 {
		return nil
	}
	if _, err := db.ExecContext(ctx, "DROP TABLE "+strings.Join(tables, ", ")); err != nil {
		return fmt.Errorf("drop the tables of %s: %w", prefix, err)
	}
	return nil
}
