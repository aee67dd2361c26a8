package intake

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"sluice/modules/contract"
	"sluice/platform/database"
)

// fillPostgres makes a table of a size at which a wrong plan takes seconds:
// nearly all orders are saved, a few hundred each are something else.
const fillPostgres = `
INSERT INTO orders (accepted_at, updated_at, finished_at, publish_at, published_at, attempts, attempt_base, size, id, released, direct, owner, status,
	number, idempotency_key, trace_parent, trace_state, content_type, hash, body)
SELECT at, at, CASE WHEN kind IN ('accepted', 'retrying', 'published') THEN NULL ELSE at END,
	CASE WHEN kind IN ('accepted', 'retrying') THEN at END, CASE WHEN kind = 'published' THEN at END,
	0, 0, 100, (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0') || '7' || lpad(to_hex(i), 19, '0'))::uuid,
	'00000000-0000-0000-0000-000000000000', false, CASE WHEN i % 1000 = 7 THEN 'rare' ELSE '' END,
	CASE kind WHEN 'published' THEN 'accepted' ELSE kind END, 'N-' || i, 'K-' || i, '', '', 'application/json', '\x00', convert_to(repeat('x', 300), 'UTF8')
FROM (SELECT i, timestamptz '2026-01-02 03:04:05Z' + i * interval '1 millisecond' AS at,
	CASE i % 500 WHEN 0 THEN 'accepted' WHEN 100 THEN 'retrying' WHEN 200 THEN 'published' WHEN 300 THEN 'rejected' WHEN 400 THEN 'dead' ELSE 'saved' END AS kind
	FROM generate_series(1, 100000) AS i) AS t`

// postgresPlans are the statements whose cost must not grow with the table, and the
// index that each is to use.
func postgresPlans() []struct{ name, index, statement string } {
	list := func(q query) string {
		q.limit = 50
		if q.number == "" {
			q.before, q.floor = uuid.Max, uuid.UUID{1}
		}
		statement, _ := postgresList(q)
		return statement
	}
	floor := func(q query) string {
		statement, _ := postgresFloor(q, listReach)
		return statement
	}
	return []struct{ name, index, statement string }{
		{"claim", "orders_due", postgresDueLocked},
		{"next due", "orders_due", postgresNextDue},
		{"oldest published", "orders_published", postgresOldestPublished},
		{"republish", "orders_published", postgresRepublish},
		{"oldest waiting", "orders_waiting", postgresOldestWaiting},
		{"sample", "orders_waiting", postgresSample},
		{"changes of those that are waited for", "orders_pkey", postgresChanged},
		{"all that have changed", "orders_pkey", postgresGetAll},
		{"purge", "orders_pkey", postgresPurge},
		{"get", "orders_pkey", postgresGet},
		{"mark", "orders_pkey", postgresMark},
		{"renew", "orders_pkey", postgresRenew},
		{"load", "orders_pkey", postgresLoad},
		{"update", "orders_pkey", postgresUpdate},
		{"holder by number", "orders_number", postgresHolders},
		{"holder by key", "orders_key", postgresHolders},
		{"list", "orders_pkey", list(query{})},
		{"list of an owner", "orders_owner", list(query{owner: "rare"})},
		{"list of an owner's saved", "orders_owner", list(query{owner: "rare", status: contract.StatusSaved})},
		{"list of a number", "orders_number", list(query{number: "N-1"})},
		{"list of a number and a status", "orders_number", list(query{owner: "rare", number: "N-1", status: contract.StatusSaved})},
		{"list of the waiting", "orders_waiting", list(query{status: contract.StatusAccepted})},
		{"list of an owner's waiting", "orders_waiting", list(query{owner: "rare", status: contract.StatusAccepted})},
		{"list of the retried", "orders_waiting", list(query{status: contract.StatusRetrying})},
		{"list of the dead", "orders_failed", list(query{status: contract.StatusDead})},
		{"list of the saved", "orders_pkey", list(query{status: contract.StatusSaved})},
		{"floor", "orders_pkey", floor(query{})},
		{"floor of an owner", "orders_owner", floor(query{owner: "rare"})},
		{"floor of the waiting", "orders_waiting", floor(query{owner: "rare", status: contract.StatusAccepted})},
		{"floor of the dead", "orders_failed", floor(query{owner: "rare", status: contract.StatusDead})},
		{"floor of the saved", "orders_pkey", floor(query{status: contract.StatusSaved})},
	}
}

// The plans are right on a table that the statistics know, and on one that has
// grown since they were gathered.
func TestPostgresReadsNoMoreThanItNeeds(t *testing.T) {
	s, _, dsn := openTwice(t)
	explainAll(t, s, "empty")
	conn, err := pgx.Connect(t.Context(), dsn)
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close(context.Background())) }()
	_, err = conn.Exec(t.Context(), fillPostgres)
	require.NoError(t, err)
	explainAll(t, s, "grown")
	_, err = conn.Exec(t.Context(), `ANALYZE orders`)
	require.NoError(t, err)
	explainAll(t, s, "analysed")

	// What they come to, on warm pages: far from any limit of time.
	began := time.Now()
	due, err := s.claim(t.Context(), now(), now().Add(time.Minute), 300, 1<<20, skipNone)
	require.NoError(t, err)
	require.Len(t, due, 300)
	for _, q := range []query{{}, {owner: "rare"}, {number: "N-77"}, {status: contract.StatusDead},
		{status: contract.StatusSaved}, {owner: "rare", status: contract.StatusSaved}} {
		q.limit = 50
		found, err := s.list(t.Context(), q)
		require.NoError(t, err)
		require.NotEmpty(t, found.orders)
	}
	t.Log("one claim of 300 and six lists:", time.Since(began))
}

func explainAll(t *testing.T, s *postgresStore, state string) {
	t.Helper()
	for _, p := range postgresPlans() {
		plan := explainPostgres(t, s.db, p.statement)
		require.Contains(t, plan, p.index, "%s, %s:\n%s", p.name, state, plan)
		require.NotContains(t, plan, "Seq Scan", "%s, %s:\n%s", p.name, state, plan)
	}
	for _, p := range postgresPlans() {
		if strings.HasPrefix(p.name, "list of the") || strings.HasPrefix(p.name, "floor") {
			require.NotContains(t, explainPostgres(t, s.db, p.statement), "Sort", "%s, %s", p.name, state)
		}
	}
	// A claim stops when it has enough: it never sorts all that is due.
	require.NotContains(t, explainPostgres(t, s.db, postgresDueLocked), "Sort", state)
}

// explainPostgres returns the plan that the store's own connections get,
// whatever the values of the parameters are.
func explainPostgres(t *testing.T, db *database.Postgres, statement string) string {
	t.Helper()
	var parameters []string
	for n := 1; strings.Contains(statement, fmt.Sprintf("$%d", n)); n++ {
		parameters = append(parameters, "NULL")
	}
	// EXPLAIN takes no parameters; EXECUTE of what was prepared does.
	execute := `EXPLAIN EXECUTE asked`
	if len(parameters) > 0 {
		execute += `(` + strings.Join(parameters, ",") + `)`
	}
	var lines []string
	require.NoError(t, db.Write(t.Context(), func(ctx context.Context, conn *pgx.Conn) error {
		if _, err := conn.Exec(ctx, `PREPARE asked AS `+statement, pgx.QueryExecModeSimpleProtocol); err != nil {
			return err
		}
		rows, err := conn.Query(ctx, execute, pgx.QueryExecModeSimpleProtocol)
		if err != nil {
			return err
		}
		if lines, err = pgx.CollectRows(rows, pgx.RowTo[string]); err != nil {
			return err
		}
		_, err = conn.Exec(ctx, `DEALLOCATE asked`, pgx.QueryExecModeSimpleProtocol)
		return err
	}))
	return strings.Join(lines, "\n")
}
