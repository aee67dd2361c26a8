package pubsub_test

import (
	"database/sql"
	"fmt"
	"net/url"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
	"sluice/platform/pubsub"
)

// sqlConfigs returns a function that configures a broker of its own with each
// call. They share a database, but no table.
func sqlConfigs(tb testing.TB) func() pubsub.Config {
	tb.Helper()
	dsn := services.Postgres(tb)
	var n atomic.Int64
	return func() pubsub.Config {
		cfg := pubsub.DefaultConfig()
		cfg.Backend = pubsub.BackendSQL
		cfg.SQL.DSN = dsn
		cfg.SQL.Prefix = fmt.Sprintf("broker%d", n.Add(1))
		return cfg
	}
}

// sqlConfig is a database with nothing in it.
func sqlConfig(tb testing.TB) pubsub.Config {
	tb.Helper()
	return sqlConfigs(tb)()
}

// onSQL runs a statement past the broker.
func onSQL(t *testing.T, cfg pubsub.Config, statement string, args ...any) {
	t.Helper()
	_, err := sqlDB(t, cfg).ExecContext(t.Context(), statement, args...)
	require.NoError(t, err)
}

// askSQL returns the one number that a query gives.
func askSQL(t *testing.T, cfg pubsub.Config, query string, args ...any) int {
	t.Helper()
	var n int
	require.NoError(t, sqlDB(t, cfg).QueryRowContext(t.Context(), query, args...).Scan(&n))
	return n
}

func sqlDB(t *testing.T, cfg pubsub.Config) *sql.DB {
	t.Helper()
	db, err := sql.Open("pgx", cfg.SQL.DSN)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	return db
}

// sqlTable is the table of a group's messages.
func sqlTable(t *testing.T, cfg pubsub.Config, topic, group string) string {
	t.Helper()
	return fmt.Sprintf("%s_queue_%d", cfg.SQL.Prefix,
		askSQL(t, cfg, `SELECT id FROM `+cfg.SQL.Prefix+`_groups WHERE topic = $1 AND consumer_group = $2`, topic, group))
}

// sqlWaiting is the number of messages that are due.
func sqlWaiting(t *testing.T, cfg pubsub.Config, topic, group string) int {
	t.Helper()
	return askSQL(t, cfg, `SELECT count(*) FROM `+sqlTable(t, cfg, topic, group)+` WHERE lease_until <= clock_timestamp()`)
}

func sqlUpstream(cfg pubsub.Config) string {
	u, err := url.Parse(cfg.SQL.DSN)
	if err != nil {
		return ""
	}
	return u.Host
}

func TestSuiteOnSQL(t *testing.T) {
	config := sqlConfigs(t)
	suite(t, func(t *testing.T) *pubsub.PubSub {
		t.Helper()
		return open(t, config(), nil)
	})
}
