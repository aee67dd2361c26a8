package intake

import (
	"context"
	"encoding/json"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
	"sluice/modules/contract"
)

// heldStore is a store whose lists wait to be let go.
type heldStore struct {
	store
	began chan struct{}
	free  chan struct{}
	err   error
}

func (s *heldStore) list(ctx context.Context, q query) (page, error) {
	s.began <- struct{}{}
	select {
	case <-s.free:
		return page{}, s.err
	case <-ctx.Done():
		return page{}, ctx.Err()
	}
}

// getOrders asks for a list as a client does.
func getOrders(ctx context.Context, m *Module, target string) *httptest.ResponseRecorder {
	answer := httptest.NewRecorder()
	mux := http.NewServeMux()
	m.Routes(mux)
	mux.ServeHTTP(answer, httptest.NewRequestWithContext(ctx, http.MethodGet, target, nil))
	return answer
}

func TestFewListsAreReadAtOnce(t *testing.T) {
	s := &heldStore{store: newMemoryStore(), began: make(chan struct{}, 100), free: make(chan struct{})}
	ctx, cancel := context.WithCancel(t.Context())
	m, wait := startModule(ctx, t, s, Bus{Publisher: &topicLog{}})
	defer wait()
	defer cancel()

	var asking sync.WaitGroup
	for range maxLists {
		asking.Go(func() { require.Equal(t, http.StatusOK, getOrders(ctx, m, "/orders").Code) })
		<-s.began
	}
	leaving, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	require.Equal(t, http.StatusServiceUnavailable, getOrders(leaving, m, "/orders").Code, "a client that leaves waits no longer")
	require.Empty(t, s.began, "it was not its turn")

	o := testOrder("A-1")
	insertOrders(t, s, o)
	require.Equal(t, http.StatusOK, getOrders(ctx, m, "/orders/"+o.ID.String()).Code, "single orders have no turn to wait for")
	close(s.free)
	asking.Wait()
	require.Equal(t, http.StatusOK, getOrders(ctx, m, "/orders").Code)
}

func TestListThatTakesTooLongSaysSo(t *testing.T) {
	s := &heldStore{store: newMemoryStore(), began: make(chan struct{}, 1), free: make(chan struct{}), err: errTooSlow}
	close(s.free)
	ctx, cancel := context.WithCancel(t.Context())
	m, wait := startModule(ctx, t, s, Bus{Publisher: &topicLog{}})
	defer wait()
	defer cancel()
	answer := getOrders(ctx, m, "/orders")
	require.Equal(t, http.StatusServiceUnavailable, answer.Code)
	require.NotEmpty(t, answer.Header().Get("Retry-After"))
	require.Contains(t, answer.Body.String(), `"/problems/storage-unavailable"`)
	require.Contains(t, answer.Body.String(), "took too long")
}

func TestQueryThatCannotBeReadIsRefused(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	m, wait := startModule(ctx, t, newMemoryStore(), Bus{Publisher: &topicLog{}})
	defer wait()
	defer cancel()
	for target, says := range map[string]string{
		"/orders?status=saved;limit=1":         "semicolon",
		"/orders?orderNumber=%zz":              "%zz",
		"/orders?status=saved&status=rejected": "status: must not be given more than once",
		"/orders?limit=1&limit=1":              "limit: must not be given more than once",
	} {
		answer := getOrders(ctx, m, target)
		require.Equal(t, http.StatusBadRequest, answer.Code, target)
		require.Contains(t, answer.Body.String(), `"/problems/invalid-query"`, target)
		var problem struct{ Detail string }
		require.NoError(t, json.Unmarshal(answer.Body.Bytes(), &problem))
		require.Contains(t, problem.Detail, says, target)
	}
	for _, target := range []string{"/orders", "/orders?", "/orders?status=saved&limit=1&orderNumber=a%3Bb", "/orders?status="} {
		require.Equal(t, http.StatusOK, getOrders(ctx, m, target).Code, target)
	}
}

// Each list goes along an index in the order of the ids: it neither looks at the
// whole table nor sorts.
func TestSQLiteListsReadNoMoreThanTheyNeed(t *testing.T) {
	s, err := openSQLiteStore(t.Context(), filepath.Join(t.TempDir(), "orders.db"), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	defer func() { require.NoError(t, s.close()) }()
	for _, p := range []struct {
		index string
		q     query
	}{
		{"orders_id", query{}},
		{"orders_id", query{status: contract.StatusSaved}},
		{"orders_owner", query{owner: "me"}},
		{"orders_owner", query{owner: "me", status: contract.StatusSaved}},
		{"orders_waiting", query{status: contract.StatusAccepted}},
		{"orders_waiting", query{owner: "me", status: contract.StatusRetrying}},
		{"orders_failed", query{status: contract.StatusDead}},
		{"orders_failed", query{owner: "me", status: contract.StatusRejected}},
	} {
		for _, before := range []uuid.UUID{{}, uuid.Max} {
			p.q.before = before
			for _, floor := range []uuid.UUID{{}, {1}} {
				p.q.floor = floor
				statement, args := p.q.pageStatement(orderColumns)
				plan := explainSQLite(t, s, statement, args)
				require.Contains(t, plan, "INDEX "+p.index+" ", "%+v", p.q)
				require.NotContains(t, plan, "TEMP B-TREE", "%+v", p.q)
			}
		}
		statement, args := p.q.floorStatement(listReach)
		plan := explainSQLite(t, s, statement, args)
		require.Contains(t, plan, "INDEX "+p.index+" ", "the floor of %+v", p.q)
		require.NotContains(t, plan, "TEMP B-TREE", "the floor of %+v", p.q)
	}
	for _, q := range []query{{number: "N-1"}, {owner: "me", number: "N-1", status: contract.StatusAccepted, before: uuid.Max}} {
		statement, args := q.pageStatement(orderColumns)
		require.Contains(t, explainSQLite(t, s, statement, args), "INDEX orders_number ", "%+v", q)
	}
}

func explainSQLite(t *testing.T, s *sqliteStore, statement string, args []any) (plan string) {
	t.Helper()
	rows, err := s.db.Read.QueryContext(t.Context(), "EXPLAIN QUERY PLAN "+statement, args...)
	require.NoError(t, err)
	defer rows.Close()
	for rows.Next() {
		var id, parent, unused int
		var detail string
		require.NoError(t, rows.Scan(&id, &parent, &unused, &detail))
		plan += detail + "\n"
	}
	require.NoError(t, rows.Err())
	return plan
}

// The server of the database ends a list, and its connection stays.
func TestPostgresListEndsInTime(t *testing.T) {
	dsn := services.Postgres(t)
	limited, err := url.Parse(dsn)
	require.NoError(t, err)
	values := limited.Query()
	values.Set("statement_timeout", "1000")
	limited.RawQuery = values.Encode()
	s := openPostgres(t, limited.String())
	defer func() { require.NoError(t, s.close()) }()
	conn, err := pgx.Connect(t.Context(), dsn)
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close(context.Background())) }()
	tx, err := conn.Begin(t.Context())
	require.NoError(t, err)
	_, err = tx.Exec(t.Context(), `LOCK TABLE orders`)
	require.NoError(t, err)
	for _, q := range []query{{limit: 10}, {number: "N-1", limit: 10}} {
		_, err = findPage(t.Context(), s, q, listReach)
		require.ErrorIs(t, err, errTooSlow)
	}
	require.NoError(t, tx.Rollback(t.Context()))
	_, err = findPage(t.Context(), s, query{limit: 10}, listReach)
	require.NoError(t, err)
}

// A time that is over ends a list, and is told apart from other failures.
func TestListEndsInTime(t *testing.T) {
	s, err := openSQLiteStore(t.Context(), filepath.Join(t.TempDir(), "orders.db"), slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	defer func() { require.NoError(t, s.close()) }()
	over, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
	defer cancel()
	_, err = findPage(over, s, query{limit: 10}, listReach)
	require.ErrorIs(t, err, errTooSlow)
	_, err = findPage(over, s, query{number: "N-1", limit: 10}, listReach)
	require.ErrorIs(t, err, errTooSlow)
}
