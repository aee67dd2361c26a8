package intake

import (
	"context"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"

	"sluice/modules/contract"
	"sluice/platform/database"
)

const (
	// postgresCount changes the counts of the shard that belongs to this server
	// process, and tells the transaction. Two processes alive at the same time
	// can have one shard, and then wait for each other's commit, and no more
	// than that: nothing else is locked after it, and equal statuses are locked
	// in one order.
	postgresCount = `INSERT INTO order_counts (status, shard, n)
		SELECT c.status, pg_backend_pid() % 128, c.n FROM unnest($1::text[], $2::bigint[]) AS c (status, n)
		ON CONFLICT (status, shard) DO UPDATE SET n = order_counts.n + excluded.n
		RETURNING pg_current_xact_id()::text::bigint`

	// One statement has one snapshot: the sums are those of exactly the
	// transactions that it shows.
	postgresCounted = `SELECT pg_current_snapshot()::text, COALESCE(array_agg(status), '{}'), COALESCE(array_agg(sum), '{}')
		FROM (SELECT status, sum(n)::bigint AS sum FROM order_counts GROUP BY status HAVING sum(n) <> 0) AS sums`

	countEvery = time.Second
	// countForget is how long a transaction of this process may be missing from
	// what the database shows. It can be for good: a standby took over that had
	// not got it.
	countForget = time.Minute
)

// countBy returns the statement that adds to the counts, and its arguments.
func countBy(delta map[contract.Status]int64) (statement string, args []any) {
	var statuses []string
	var numbers []int64
	for _, status := range slices.Sorted(maps.Keys(delta)) {
		statuses, numbers = append(statuses, string(status)), append(numbers, delta[status])
	}
	return postgresCount, []any{statuses, numbers}
}

// postgresCounts are the orders of all processes by status, to be read without
// I/O: what the database said last, at most about a second ago, and what this
// process has committed since. Which of its transactions those are the snapshot
// says that came with the counts, so that none is counted twice or left out.
type postgresCounts struct {
	db     *database.Postgres
	logger *slog.Logger
	stop   context.CancelFunc
	done   chan struct{}

	mu     sync.RWMutex
	count  map[contract.Status]int64
	shown  txSnapshot
	recent []txDelta // own transactions that shown does not show
}

// txDelta is what a transaction changed in the counts.
type txDelta struct {
	txid  uint64
	delta map[contract.Status]int64
	at    time.Time
}

// countPostgres reads the counts, and again every second until close.
func countPostgres(ctx context.Context, db *database.Postgres, logger *slog.Logger) (*postgresCounts, error) {
	c := &postgresCounts{db: db, logger: logger, done: make(chan struct{})}
	if err := c.refresh(ctx); err != nil {
		return nil, err
	}
	// It serves the store until that is closed, whatever becomes of the context
	// that it was opened with.
	ctx, c.stop = context.WithCancel(context.WithoutCancel(ctx))
	go c.run(ctx)
	return c, nil
}

func (c *postgresCounts) close() {
	c.stop()
	<-c.done
}

func (c *postgresCounts) run(ctx context.Context) {
	defer close(c.done)
	for {
		wait(ctx, countEvery, nil)
		if ctx.Err() != nil {
			return
		}
		if err := c.refresh(ctx); err != nil && ctx.Err() == nil {
			// Who writes or checks the store's health tells it louder.
			c.logger.Debug("the counts of orders are out of date", "error", err)
		}
	}
}

func (c *postgresCounts) refresh(ctx context.Context) error {
	var snapshot string
	var statuses []string
	var numbers []int64
	err := c.db.Read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, postgresCounted).Scan(&snapshot, &statuses, &numbers)
	})
	if err != nil {
		return fmt.Errorf("count orders: %w", err)
	}
	shown, err := parseSnapshot(snapshot)
	if err != nil {
		return fmt.Errorf("count orders: %w", err)
	}
	stored := make(map[contract.Status]int64, len(statuses))
	for i, status := range statuses {
		stored[contract.Status(status)] = numbers[i]
	}
	c.replace(shown, stored)
	return nil
}

func (c *postgresCounts) replace(shown txSnapshot, stored map[contract.Status]int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.shown, c.count = shown, stored
	c.recent = slices.DeleteFunc(c.recent, func(d txDelta) bool {
		return shown.shows(d.txid) || time.Since(d.at) > countForget
	})
	for _, d := range c.recent {
		addCounts(c.count, d.delta)
	}
}

// add takes a committed transaction over.
func (c *postgresCounts) add(txid uint64, delta map[contract.Status]int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(delta) == 0 || c.shown.shows(txid) {
		return
	}
	c.recent = append(c.recent, txDelta{txid, delta, time.Now()})
	addCounts(c.count, delta)
}

func (c *postgresCounts) now() map[contract.Status]int64 {
	c.mu.RLock()
	defer c.mu.RUnlock()
	return maps.Clone(c.count)
}

func addCounts(to, delta map[contract.Status]int64) {
	for status, n := range delta {
		to[status] += n
	}
}

// txSnapshot says which transactions a statement saw: those before next that
// were not running.
type txSnapshot struct {
	next    uint64
	running []uint64
}

func (s txSnapshot) shows(txid uint64) bool {
	return txid < s.next && !slices.Contains(s.running, txid)
}

// parseSnapshot reads a pg_snapshot, "xmin:xmax:xip,xip…"
// (https://www.postgresql.org/docs/current/functions-info.html#FUNCTIONS-PG-SNAPSHOT-PARTS).
func parseSnapshot(text string) (txSnapshot, error) {
	parts := strings.Split(text, ":")
	if len(parts) != 3 {
		return txSnapshot{}, fmt.Errorf("%q is no snapshot", text)
	}
	next, err := strconv.ParseUint(parts[1], 10, 64)
	if err != nil {
		return txSnapshot{}, fmt.Errorf("%q is no snapshot: %w", text, err)
	}
	s := txSnapshot{next: next}
	for field := range strings.SplitSeq(parts[2], ",") {
		if field == "" {
			continue
		}
		txid, err := strconv.ParseUint(field, 10, 64)
		if err != nil {
			return txSnapshot{}, fmt.Errorf("%q is no snapshot: %w", text, err)
		}
		s.running = append(s.running, txid)
	}
	return s, nil
}
