package rivals

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	amqp091 "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"
)

// The addresses that are tried where the environment names no other, the same
// as those of Sluice's own tests.
const (
	defaultAMQP     = "amqp://guest:guest@127.0.0.1:5672/"
	defaultPostgres = "postgres://postgres@127.0.0.1:5432/postgres?sslmode=disable"
)

// dialTimeout bounds what a service may take to answer.
const dialTimeout = 10 * time.Second

// rabbitMQ returns the address of a RabbitMQ and a connection to clean up with.
func rabbitMQ(tb testing.TB) (string, *amqp091.Connection) {
	tb.Helper()
	address := either("SLUICE_TEST_AMQP_URL", defaultAMQP)
	conn, err := amqp091.DialConfig(address, amqp091.Config{Dial: amqp091.DefaultDial(dialTimeout)})
	if err != nil {
		missing(tb, "RabbitMQ", "SLUICE_TEST_AMQP_URL", err)
	}
	return address, conn
}

// postgreSQL creates an empty database, which is dropped at the end of the
// benchmark, and returns its DSN.
func postgreSQL(tb testing.TB) string {
	tb.Helper()
	address := either("SLUICE_TEST_POSTGRES_DSN", defaultPostgres)
	u, err := url.Parse(address)
	require.NoError(tb, err, "SLUICE_TEST_POSTGRES_DSN must be a postgres:// URL")
	ctx, cancel := context.WithTimeout(tb.Context(), dialTimeout)
	defer cancel()
	server, err := pgx.Connect(ctx, address)
	if err != nil {
		missing(tb, "PostgreSQL", "SLUICE_TEST_POSTGRES_DSN", err)
	}
	database := name()
	_, err = server.Exec(ctx, `CREATE DATABASE `+database)
	require.NoError(tb, err)
	tb.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), stuckFor)
		defer cancel()
		_, err := server.Exec(ctx, `DROP DATABASE `+database+` WITH (FORCE)`)
		require.NoError(tb, err)
		require.NoError(tb, server.Close(ctx))
	})
	u.Path = "/" + database
	return u.String()
}

// missing skips the benchmark. Go shows why a benchmark was skipped only with -v,
// and a list of numbers with gaps would look complete.
func missing(tb testing.TB, service, variable string, err error) {
	tb.Helper()
	fmt.Printf("%s: skipped, %s is not reachable (%s)\n", tb.Name(), service, variable)
	tb.Skip(err)
}

// name is unique, and fit for a database, a queue and a table.
func name() string {
	return "sluice_rivals_" + strings.ReplaceAll(uuid.NewString(), "-", "")[:16]
}

func either(variable, otherwise string) string {
	if value := os.Getenv(variable); value != "" {
		return value
	}
	return otherwise
}
