// Package services finds the RabbitMQ and the PostgreSQL that tests run
// against, and gives each test a part of them that is its own.
//
// Where a service is not reachable, the test is skipped and says which one is
// missing; where CI is set in the environment it fails, because a skip there
// would pass for a success. The shared services are started by `make services`;
// what a test wants to stop, block or kill, it has to itself: OwnRabbitMQ starts
// a broker, and a Proxy stands in the way of a shared one.
package services

import (
	"context"
	"database/sql"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	_ "github.com/jackc/pgx/v5/stdlib" // registers the driver "pgx"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"
)

// The addresses that are tried where the environment names no other.
const (
	defaultAMQP     = "amqp://guest:guest@127.0.0.1:5672/"
	defaultPostgres = "postgres://postgres@127.0.0.1:5432/postgres?sslmode=disable"
)

// setUpTimeout bounds what a service may take to answer, and to make or drop a
// database.
const setUpTimeout = 30 * time.Second

// AMQP returns the URL of a RabbitMQ (SLUICE_TEST_AMQP_URL) and a prefix for
// the names of exchanges and queues that no other test has. Whoever declares
// something under it removes it again.
func AMQP(tb testing.TB) (address, prefix string) {
	tb.Helper()
	address = either("SLUICE_TEST_AMQP_URL", defaultAMQP)
	conn, err := amqp.DialConfig(address, amqp.Config{Dial: amqp.DefaultDial(setUpTimeout)})
	if err != nil {
		missing(tb, "RabbitMQ", "SLUICE_TEST_AMQP_URL", err)
	}
	require.NoError(tb, conn.Close())
	return address, name()
}

// Postgres creates an empty database on a PostgreSQL (SLUICE_TEST_POSTGRES_DSN)
// and returns its DSN. The database is dropped at the end of the test, with
// all connections to it that are left.
func Postgres(tb testing.TB) (dsn string) {
	tb.Helper()
	address := either("SLUICE_TEST_POSTGRES_DSN", defaultPostgres)
	u, err := url.Parse(address)
	require.NoError(tb, err, "SLUICE_TEST_POSTGRES_DSN must be a postgres:// URL")
	server, err := sql.Open("pgx", address)
	require.NoError(tb, err)
	ctx, cancel := context.WithTimeout(context.Background(), setUpTimeout)
	defer cancel()
	if err := server.PingContext(ctx); err != nil {
		_ = server.Close()
		missing(tb, "PostgreSQL", "SLUICE_TEST_POSTGRES_DSN", err)
	}
	database := name()
	_, err = server.ExecContext(ctx, `CREATE DATABASE `+database)
	require.NoError(tb, err)
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), setUpTimeout)
		defer cancel()
		_, err := server.ExecContext(ctx, `DROP DATABASE `+database+` WITH (FORCE)`)
		require.NoError(tb, err)
		require.NoError(tb, server.Close())
	})
	u.Path = "/" + database
	return u.String()
}

// name is unique, and fit for a database and a queue.
func name() string {
	return "sluice_test_" + strings.ReplaceAll(uuid.NewString(), "-", "")[:16]
}

func either(variable, otherwise string) string {
	if value := os.Getenv(variable); value != "" {
		return value
	}
	return otherwise
}

func missing(tb testing.TB, service, variable string, err error) {
	tb.Helper()
	if os.Getenv("CI") != "" {
		require.FailNow(tb, service+" is not reachable, and CI must not skip what needs it", "%s: %v", variable, err)
	}
	tb.Skipf("%s is not reachable (%s); `make services` starts one: %v", service, variable, err)
}
