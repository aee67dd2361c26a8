package pubsub_test

import (
	"fmt"
	"sync/atomic"
	"testing"

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

func TestSuiteOnSQL(t *testing.T) {
	config := sqlConfigs(t)
	suite(t, func(t *testing.T) *pubsub.PubSub {
		t.Helper()
		return open(t, config(), nil)
	})
}
