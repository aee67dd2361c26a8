package rivals

import (
	"context"
	"encoding/json"
	"log/slog"
	"testing"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"
	"github.com/riverqueue/river"
	"github.com/riverqueue/river/riverdriver/riverpgxv5"
	"github.com/riverqueue/river/rivermigrate"
	"github.com/stretchr/testify/require"
)

// fetching is how often a River client asks for more jobs. "Throughput is limited
// by this value", says the documentation of Config.FetchCooldown
// (https://pkg.go.dev/github.com/riverqueue/river#Config): a client with n workers
// begins at most n jobs in each.
type fetching struct{ cooldown, poll time.Duration }

var (
	// river100ms are the defaults.
	river100ms = fetching{river.FetchCooldownDefault, river.FetchPollIntervalDefault}
	// river2ms are the settings of River's own benchmark
	// (https://riverqueue.com/docs/benchmarks, cmd/river/riverbench).
	river2ms = fetching{2 * time.Millisecond, 20 * time.Millisecond}
)

// riverConnections is the size of River's pool. pgxpool would open 4; of 4, 8, 16
// and 64, on two cores, 16 was the best or close to it at all that is measured.
const riverConnections = 16

// orderArgs is the job. The order goes in as it is.
type orderArgs struct {
	ID    string          `json:"id"`
	Order json.RawMessage `json:"order"`
}

// Kind names the job.
func (orderArgs) Kind() string { return "order" }

// riverQueue has a database of its own.
type riverQueue struct {
	cfg  river.Config // of the client that works
	pool *pgxpool.Pool
	// inserter only inserts; worker is nil before work.
	inserter, worker *river.Client[pgx.Tx]
}

// openRiver uses one queue, the default one, with that many workers, and leaves
// all but the fetching at its default (https://riverqueue.com/docs).
func openRiver(workers int, f fetching) func(testing.TB) rival {
	return func(tb testing.TB) rival {
		tb.Helper()
		pool := openPool(tb, postgreSQL(tb))
		driver := riverpgxv5.New(pool)
		logger := slog.New(slog.DiscardHandler)
		migrator, err := rivermigrate.New(driver, &rivermigrate.Config{Logger: logger})
		require.NoError(tb, err)
		_, err = migrator.Migrate(tb.Context(), rivermigrate.DirectionUp, nil)
		require.NoError(tb, err)
		inserter, err := river.NewClient(driver, &river.Config{Logger: logger})
		require.NoError(tb, err)
		return &riverQueue{pool: pool, inserter: inserter, cfg: river.Config{
			Logger:            logger,
			FetchCooldown:     f.cooldown,
			FetchPollInterval: f.poll,
			Queues:            map[string]river.QueueConfig{river.QueueDefault: {MaxWorkers: workers}},
		}}
	}
}

func openPool(tb testing.TB, dsn string) *pgxpool.Pool {
	tb.Helper()
	cfg, err := pgxpool.ParseConfig(dsn)
	require.NoError(tb, err)
	cfg.MaxConns = riverConnections
	pool, err := pgxpool.NewWithConfig(tb.Context(), cfg)
	require.NoError(tb, err)
	return pool
}

// put inserts a single order with Insert, and several with InsertMany, which is
// the way for batches unless they are thousands
// (https://riverqueue.com/docs/batch-job-insertion).
func (q *riverQueue) put(ctx context.Context, orders []order) error {
	if len(orders) == 1 {
		_, err := q.inserter.Insert(ctx, orderArgs{orders[0].id, orders[0].body}, nil)
		return err
	}
	jobs := make([]river.InsertManyParams, len(orders))
	for i, o := range orders {
		jobs[i].Args = orderArgs{o.id, o.body}
	}
	_, err := q.inserter.InsertMany(ctx, jobs)
	return err
}

func (q *riverQueue) settle(tb testing.TB) {
	tb.Helper()
	_, err := q.pool.Exec(tb.Context(), `ANALYZE river_job`)
	require.NoError(tb, err)
}

func (q *riverQueue) work(tb testing.TB, s save) {
	tb.Helper()
	q.cfg.Workers = river.NewWorkers()
	river.AddWorker(q.cfg.Workers, river.WorkFunc(func(ctx context.Context, job *river.Job[orderArgs]) error {
		return s(ctx, order{job.Args.ID, job.Args.Order})
	}))
	var err error
	q.worker, err = river.NewClient(riverpgxv5.New(q.pool), &q.cfg)
	require.NoError(tb, err)
	require.NoError(tb, q.worker.Start(tb.Context()))
}

func (q *riverQueue) close(tb testing.TB) {
	tb.Helper()
	if q.worker != nil {
		ctx, cancel := context.WithTimeout(context.Background(), stuckFor)
		defer cancel()
		require.NoError(tb, q.worker.Stop(ctx))
	}
	q.pool.Close()
}
