package intake

import (
	"context"
	"database/sql"
	"embed"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"log/slog"
	"maps"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"

	"sluice/modules/contract"
	"sluice/platform/database"
)

//go:embed migrations/sqlite/*.sql
var sqliteMigrations embed.FS

// sqliteStore keeps orders in one SQLite file, which belongs to this process.
type sqliteStore struct {
	db     *database.SQLite
	logger *slog.Logger

	insertMany *sql.Stmt // manyRows orders in one statement
	insertOne  *sql.Stmt
	updateOne  *sql.Stmt
	firstOne   *sql.Stmt // updateOne, if no attempt has ended before
	release    *sql.Stmt
	markMany   *sql.Stmt
	markOne    *sql.Stmt
	selectMany *sql.Stmt // on the writing connection, inside of a transaction
	selectOne  *sql.Stmt
	readOne    *sql.Stmt
	readDue    *sql.Stmt
	readBodies *sql.Stmt
	readBody   *sql.Stmt
	countBy    *sql.Stmt

	mu    sync.RWMutex
	count map[contract.Status]int64
}

// manyRows is how many orders one statement inserts, marks or reads when there
// are as many: the driver's cost per statement is then shared.
const manyRows = 32

// manyIDs are the placeholders of as many ids.
var manyIDs = strings.Repeat("?,", manyRows-1) + "?"

const (
	orderColumns = `id, owner, number, released, idempotency_key, status, attempts, attempt_base, direct,
		accepted_at, updated_at, finished_at, publish_at, trace_parent, trace_state,
		backend_status, backend_type, backend_body, problem, history, hash, size, content_type`
	insertOrder = `INSERT INTO orders (` + orderColumns + `, body) VALUES `
	insertRow   = `(?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)`
	insertGuard = ` ON CONFLICT DO NOTHING`
	selectOrder = `SELECT ` + orderColumns + ` FROM orders `
	selectDue   = `SELECT id, number, status, attempts, direct, accepted_at, updated_at, publish_at, trace_parent, trace_state,
		backend_status, history, size, content_type, body FROM orders `
	// Without released, which is in an index: to name a column is to write all of
	// its indexes, changed or not.
	updateOrder = `UPDATE orders SET status=?, attempts=?, attempt_base=?, direct=?, updated_at=?, finished_at=?,
		publish_at=?, backend_status=?, backend_type=?, backend_body=?, problem=?, history=? WHERE id=?`
	updateFirst  = updateOrder + ` AND attempts=0 AND status='accepted' AND direct=0`
	releaseOrder = `UPDATE orders SET released=id WHERE id=?`
	sqliteCount  = `INSERT INTO order_counts (status, n) VALUES (?, ?) ON CONFLICT (status) DO UPDATE SET n = n + excluded.n`
	// It says what orders_waiting holds, so that the planner sees that it fits.
	sqliteSample = `SELECT id FROM (SELECT id, row_number() OVER (ORDER BY id) AS rank FROM orders WHERE status='accepted' AND finished_at IS NULL)
		WHERE rank % ? = 0 ORDER BY rank`
	markOrder = `UPDATE orders SET publish_at=NULL, published_at=? WHERE attempts=? AND (status='dead')=? AND id IN `
)

func openSQLiteStore(ctx context.Context, path string, logger *slog.Logger) (*sqliteStore, error) {
	migrations, err := fs.Sub(sqliteMigrations, "migrations/sqlite")
	if err != nil {
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	db, err := database.OpenSQLite(ctx, path, migrations)
	if err != nil {
		return nil, err
	}
	s := &sqliteStore{db: db, logger: logger, count: map[contract.Status]int64{}}
	if err := s.prepare(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("open database %s: %w", path, err), s.close())
	}
	return s, nil
}

// flushers is one: SQLite has one writer at a time.
func (s *sqliteStore) flushers() int { return 1 }

func (s *sqliteStore) prepare(ctx context.Context) error {
	for _, p := range []struct {
		stmt **sql.Stmt
		db   *sql.DB
		text string
	}{
		{&s.insertMany, s.db.Write, insertOrder + strings.Repeat(insertRow+",", manyRows-1) + insertRow + insertGuard},
		{&s.insertOne, s.db.Write, insertOrder + insertRow + insertGuard},
		{&s.updateOne, s.db.Write, updateOrder},
		{&s.firstOne, s.db.Write, updateFirst},
		{&s.release, s.db.Write, releaseOrder},
		{&s.markMany, s.db.Write, markOrder + "(" + manyIDs + ")"},
		{&s.markOne, s.db.Write, markOrder + "(?)"},
		{&s.selectMany, s.db.Write, selectOrder + "WHERE id IN (" + manyIDs + ")"},
		{&s.selectOne, s.db.Write, selectOrder + `WHERE id=?`},
		{&s.countBy, s.db.Write, sqliteCount},
		{&s.readOne, s.db.Read, selectOrder + `WHERE id=?`},
		{&s.readDue, s.db.Read, `SELECT id, size FROM orders WHERE publish_at <= ? ORDER BY publish_at, id`},
		{&s.readBodies, s.db.Read, selectDue + "WHERE id IN (" + manyIDs + ")"},
		{&s.readBody, s.db.Read, selectDue + `WHERE id=?`},
	} {
		var err error
		if *p.stmt, err = p.db.PrepareContext(ctx, p.text); err != nil {
			return err
		}
	}
	rows, err := s.db.Read.QueryContext(ctx, `SELECT status, n FROM order_counts`)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		var status contract.Status
		var n int64
		if err := rows.Scan(&status, &n); err != nil {
			return err
		}
		s.count[status] = n
	}
	return rows.Err()
}

// writeTimeout bounds a transaction. It is long, since a checkpoint on a slow
// disk takes its time, and it ends what would otherwise hang for ever.
const writeTimeout = 30 * time.Second

func (s *sqliteStore) write(ctx context.Context, changes []*change) error {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	tx, err := s.db.Write.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("begin transaction: %w", err)
	}
	w := &sqliteWrite{store: s, tx: tx, statements: map[*sql.Stmt]*sql.Stmt{}, delta: map[contract.Status]int64{}}
	// A statement here ends by itself, and when ctx ends database/sql rolls the
	// transaction back between two of them. Given a context that can end, the
	// driver starts a goroutine for each.
	if err := w.all(context.WithoutCancel(ctx), changes); err != nil {
		return errors.Join(err, rollback(tx))
	}
	if err := tx.Commit(); err != nil {
		return errors.Join(fmt.Errorf("commit transaction: %w", err), rollback(tx))
	}
	s.add(w.delta)
	return nil
}

// rollback ends a transaction that has not ended yet. SQLite ends one by itself
// when the disk is full or cannot be written, and then has none to roll back.
func rollback(tx *sql.Tx) error {
	if err := tx.Rollback(); err != nil && !errors.Is(err, sql.ErrTxDone) && !strings.Contains(err.Error(), "no transaction is active") {
		return fmt.Errorf("roll back transaction: %w", err)
	}
	return nil
}

// add takes committed changes over into the counts that are read without I/O.
func (s *sqliteStore) add(delta map[contract.Status]int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for status, n := range delta {
		s.count[status] += n
	}
}

// sqliteWrite is one transaction.
type sqliteWrite struct {
	store      *sqliteStore
	tx         *sql.Tx
	statements map[*sql.Stmt]*sql.Stmt   // the store's, as the transaction's
	delta      map[contract.Status]int64 // change of the counts
}

// in returns the store's statement as one of the transaction.
func (w *sqliteWrite) in(ctx context.Context, s *sql.Stmt) *sql.Stmt {
	own := w.statements[s]
	if own == nil {
		own = w.tx.StmtContext(ctx, s)
		w.statements[s] = own
	}
	return own
}

func (w *sqliteWrite) all(ctx context.Context, changes []*change) error {
	var inserts, firsts, updates []*change
	marks := map[markedAs][]any{} // ids, by what else their marks say
	for _, c := range changes {
		c.found, c.changed = nil, false
		switch {
		case c.insert != nil:
			inserts = append(inserts, c)
		case c.update != nil && c.first:
			firsts = append(firsts, c)
		case c.update != nil:
			updates = append(updates, c)
		}
		for _, m := range c.marks {
			as := markedAs{m.attempts, m.dead, c.publishedAt}
			marks[as] = append(marks[as], m.id[:])
		}
	}
	for chunk := range chunks(inserts) {
		if err := w.insert(ctx, chunk); err != nil {
			return err
		}
	}
	for as, ids := range marks {
		for chunk := range chunks(ids) {
			if err := w.mark(ctx, as, chunk); err != nil {
				return fmt.Errorf("mark %d orders as published: %w", len(chunk), err)
			}
		}
	}
	for _, c := range firsts {
		done, err := w.first(ctx, c)
		if err != nil {
			return fmt.Errorf("update order %s: %w", c.id, err)
		}
		if !done {
			updates = append(updates, c)
		}
	}
	for chunk := range chunks(updates) {
		if err := w.update(ctx, chunk); err != nil {
			return fmt.Errorf("update %d orders: %w", len(chunk), err)
		}
	}
	for status, n := range w.delta {
		if _, err := w.in(ctx, w.store.countBy).ExecContext(ctx, string(status), n); err != nil {
			return fmt.Errorf("count orders: %w", err)
		}
	}
	return nil
}

// chunks cuts all into pieces of manyRows, and the rest into single ones, since
// there are statements for these two sizes.
func chunks[T any](all []T) iter.Seq[[]T] {
	return func(yield func([]T) bool) {
		for len(all) > 0 {
			n := 1
			if len(all) >= manyRows {
				n = manyRows
			}
			if !yield(all[:n]) {
				return
			}
			all = all[n:]
		}
	}
}

// sized picks the statement for a chunk.
func (w *sqliteWrite) sized(ctx context.Context, n int, one, many *sql.Stmt) *sql.Stmt {
	if n > 1 {
		one = many
	}
	return w.in(ctx, one)
}

// markedAs is what the orders of one statement have in common.
type markedAs struct {
	attempts    int
	dead        bool
	publishedAt time.Time
}

func (w *sqliteWrite) mark(ctx context.Context, as markedAs, ids []any) error {
	_, err := w.sized(ctx, len(ids), w.store.markOne, w.store.markMany).ExecContext(ctx,
		append([]any{micros(as.publishedAt), as.attempts, as.dead}, ids...)...)
	return err
}

// insert adds one or manyRows orders. Those whose number or key is taken are
// left out by the database, and then looked for.
func (w *sqliteWrite) insert(ctx context.Context, changes []*change) error {
	args := make([]any, 0, 24*len(changes))
	for _, c := range changes {
		args = appendOrder(args, c.insert)
	}
	res, err := w.sized(ctx, len(changes), w.store.insertOne, w.store.insertMany).ExecContext(ctx, args...)
	if err != nil {
		return fmt.Errorf("insert %d orders: %w", len(changes), err)
	}
	n, err := res.RowsAffected()
	if err != nil {
		return fmt.Errorf("insert %d orders: %w", len(changes), err)
	}
	for _, c := range changes {
		c.changed = true
	}
	if int(n) < len(changes) {
		if err := w.resolve(ctx, changes); err != nil {
			return fmt.Errorf("look for the holder of a number: %w", err)
		}
	}
	for _, c := range changes {
		if c.changed {
			recount(w.delta, nil, c.insert)
		}
	}
	return nil
}

// resolve finds out which of the orders were not inserted, and because of
// which others.
func (w *sqliteWrite) resolve(ctx context.Context, changes []*change) error {
	for _, c := range changes {
		o := c.insert
		self, err := w.find(ctx, `WHERE id=?`, o.ID[:])
		if err != nil {
			return err
		}
		if self != nil {
			continue
		}
		c.changed = false
		if o.IdempotencyKey != "" {
			if c.found, err = w.find(ctx, `WHERE idempotency_key=? AND owner=?`, o.IdempotencyKey, o.Owner); err != nil {
				return err
			}
		}
		if c.found == nil {
			if c.found, err = w.find(ctx, `WHERE number=? AND owner=? AND released=x''`, o.Number, o.Owner); err != nil {
				return err
			}
		}
		if c.found == nil {
			return fmt.Errorf("order %s was not inserted, and nothing holds its number %q or key", o.ID, o.Number)
		}
		if c.found.adopt(o) == save {
			w.delta[statusDirect]--
			if err := w.put(ctx, c.found); err != nil {
				return err
			}
		}
		if c.found.takesKey(o) {
			c.found.IdempotencyKey = o.IdempotencyKey
			if _, err := w.tx.ExecContext(ctx, `UPDATE orders SET idempotency_key=? WHERE id=?`, o.IdempotencyKey, c.found.ID[:]); err != nil {
				return err
			}
		}
	}
	return nil
}

func (w *sqliteWrite) find(ctx context.Context, where string, args ...any) (*order, error) {
	o, err := scanOrder(w.tx.QueryRowContext(ctx, selectOrder+where, args...))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, nil
	}
	return o, err
}

// update reads the orders of one or manyRows changes, and lets each change its
// order. The same order can be there more than once: the next change sees what
// the last one made of it.
func (w *sqliteWrite) update(ctx context.Context, changes []*change) error {
	orders, err := w.load(ctx, changes)
	if err != nil {
		return err
	}
	for _, c := range changes {
		switch o := orders[c.id]; c.perform(o, w.delta) {
		case leave:
		case save:
			if err := w.put(ctx, o); err != nil {
				return err
			}
		case remove:
			if _, err := w.tx.ExecContext(ctx, `DELETE FROM orders WHERE id=?`, c.id[:]); err != nil {
				return err
			}
			delete(orders, c.id)
		}
	}
	return nil
}

func (w *sqliteWrite) load(ctx context.Context, changes []*change) (map[uuid.UUID]*order, error) {
	ids := make([]any, 0, len(changes))
	for _, c := range changes {
		ids = append(ids, c.id[:])
	}
	rows, err := w.sized(ctx, len(ids), w.store.selectOne, w.store.selectMany).QueryContext(ctx, ids...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	orders := make(map[uuid.UUID]*order, len(changes))
	for rows.Next() {
		o, err := scanOrder(rows)
		if err != nil {
			return nil, err
		}
		orders[o.ID] = o
	}
	return orders, rows.Err()
}

// first updates an order that nobody has read, if it is what it should be then,
// and reports whether it was.
func (w *sqliteWrite) first(ctx context.Context, c *change) (bool, error) {
	o := blank(c.id)
	if c.update(o) != save {
		return false, nil
	}
	changed, err := w.write(ctx, w.store.firstOne, o)
	if err != nil || !changed {
		return false, err
	}
	c.found, c.changed = o, true
	recount(w.delta, blank(c.id), o)
	return true, nil
}

func (w *sqliteWrite) put(ctx context.Context, o *order) error {
	_, err := w.write(ctx, w.store.updateOne, o)
	return err
}

// write runs updateOne or firstOne, and reports whether it changed the order.
func (w *sqliteWrite) write(ctx context.Context, update *sql.Stmt, o *order) (bool, error) {
	history, err := encodeHistory(o.History)
	if err != nil {
		return false, err
	}
	res, err := w.in(ctx, update).ExecContext(ctx,
		string(o.Status), o.Attempts, o.AttemptBase, o.Direct, micros(o.UpdatedAt), micros(o.FinishedAt),
		micros(o.PublishAt), o.BackendStatus, o.BackendType, o.BackendBody, o.Problem, history, o.ID[:])
	if err != nil {
		return false, err
	}
	n, err := res.RowsAffected()
	if err != nil || n == 0 || !o.NumberReleased {
		return n > 0, err
	}
	_, err = w.in(ctx, w.store.release).ExecContext(ctx, o.ID[:])
	return true, err
}

func (s *sqliteStore) holds(ctx context.Context, o *order) (held bool, err error) {
	err = s.db.Read.QueryRowContext(ctx, `SELECT EXISTS (SELECT 1 FROM orders WHERE idempotency_key=?1 AND owner=?3)
		OR EXISTS (SELECT 1 FROM orders WHERE number=?2 AND owner=?3 AND released=x'')`,
		nullable(o.IdempotencyKey), nullable(o.Number), o.Owner).Scan(&held)
	if err != nil {
		return false, fmt.Errorf("look for the holder of a number: %w", err)
	}
	return held, nil
}

func (s *sqliteStore) get(ctx context.Context, id uuid.UUID) (*order, error) {
	o, err := scanOrder(s.readOne.QueryRowContext(ctx, id[:]))
	if errors.Is(err, sql.ErrNoRows) {
		return nil, errNotFound
	}
	if err != nil {
		return nil, fmt.Errorf("read order %s: %w", id, err)
	}
	return o, nil
}

func (s *sqliteStore) list(ctx context.Context, q query) (found page, err error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	statement, args := q.pageStatement(orderColumns)
	rows, err := s.db.Read.QueryContext(ctx, statement, args...)
	if err != nil {
		return page{}, sqliteListError(ctx, err)
	}
	defer rows.Close()
	for rows.Next() {
		o, err := scanOrder(rows)
		if err != nil {
			return page{}, sqliteListError(ctx, err)
		}
		if !found.take(o, q.limit) {
			return found, nil
		}
	}
	if err := rows.Err(); err != nil {
		return page{}, sqliteListError(ctx, err)
	}
	return found, nil
}

func (s *sqliteStore) floor(ctx context.Context, q query, n int) (floor uuid.UUID, err error) {
	ctx, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	statement, args := q.floorStatement(n)
	var id []byte
	if err := s.db.Read.QueryRowContext(ctx, statement, args...).Scan(&id); err != nil && !errors.Is(err, sql.ErrNoRows) {
		return uuid.Nil, sqliteListError(ctx, err)
	}
	copy(floor[:], id)
	return floor, nil
}

func sqliteListError(ctx context.Context, err error) error {
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = errors.Join(errTooSlow, err)
	}
	return fmt.Errorf("list orders: %w", err)
}

// claim first looks through the index of due orders, which is cheap even where
// many are to be skipped, and then reads the chosen ones. Nobody else can claim
// them: the file belongs to this process.
func (s *sqliteStore) claim(ctx context.Context, now, _ time.Time, limit, size int, skip func(uuid.UUID) bool) ([]*order, error) {
	ids, err := s.dueIDs(ctx, now, limit, size, skip)
	if err != nil {
		return nil, fmt.Errorf("look for due orders: %w", err)
	}
	var found []*order
	for chunk := range chunks(ids) {
		orders, err := s.bodies(ctx, chunk)
		if err != nil {
			return nil, fmt.Errorf("read due orders: %w", err)
		}
		for _, id := range chunk {
			// Since the look through the index the order may have changed.
			if o := orders[id]; o != nil && o.due(now) {
				found = append(found, o)
			}
		}
	}
	return found, nil
}

// dueIDs returns the ids, longest due first.
func (s *sqliteStore) dueIDs(ctx context.Context, now time.Time, limit, size int, skip func(uuid.UUID) bool) ([]uuid.UUID, error) {
	rows, err := s.readDue.QueryContext(ctx, now.UnixMicro())
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var ids []uuid.UUID
	var raw sql.RawBytes
	for total, bytes := 0, 0; len(ids) < limit && total < size && rows.Next(); {
		if err := rows.Scan(&raw, &bytes); err != nil {
			return nil, err
		}
		if id := uuid.UUID(raw); !skip(id) {
			ids = append(ids, id)
			total += bytes
		}
	}
	return ids, rows.Err()
}

// bodies reads what is to be published of one or manyRows orders.
func (s *sqliteStore) bodies(ctx context.Context, ids []uuid.UUID) (map[uuid.UUID]*order, error) {
	stmt := s.readBody
	if len(ids) > 1 {
		stmt = s.readBodies
	}
	args := make([]any, 0, len(ids))
	for _, id := range ids {
		args = append(args, id[:])
	}
	// Soon over, and so not worth the goroutines that could end it: see write.
	rows, err := stmt.QueryContext(context.WithoutCancel(ctx), args...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	orders := make(map[uuid.UUID]*order, len(ids))
	for rows.Next() {
		o, err := scanDue(rows)
		if err != nil {
			return nil, err
		}
		orders[o.ID] = o
	}
	return orders, rows.Err()
}

func (s *sqliteStore) nextDue(ctx context.Context, now time.Time) (time.Time, error) {
	return s.time(ctx, `SELECT publish_at FROM orders WHERE publish_at > ? ORDER BY publish_at LIMIT 1`, now.UnixMicro())
}

func (s *sqliteStore) oldestWaiting(ctx context.Context) (time.Time, error) {
	var oldest time.Time
	for _, status := range []contract.Status{contract.StatusAccepted, contract.StatusRetrying} {
		at, err := s.time(ctx, `SELECT accepted_at FROM orders WHERE finished_at IS NULL AND status=? ORDER BY id LIMIT 1`, string(status))
		if err != nil {
			return time.Time{}, err
		}
		if !at.IsZero() && (oldest.IsZero() || at.Before(oldest)) {
			oldest = at
		}
	}
	return oldest, nil
}

// time reads one time, zero where the statement finds none.
func (s *sqliteStore) time(ctx context.Context, statement string, args ...any) (time.Time, error) {
	var at int64
	switch err := s.db.Read.QueryRowContext(ctx, statement, args...).Scan(&at); {
	case errors.Is(err, sql.ErrNoRows):
		return time.Time{}, nil
	case err != nil:
		return time.Time{}, fmt.Errorf("read time: %w", err)
	}
	return time.UnixMicro(at).UTC(), nil
}

// renew has nothing to do: nobody else claims.
func (s *sqliteStore) renew(context.Context, []mark, time.Time) error { return nil }

// recover knows that no direct call is under way: the lock of the file says that
// no other process is, and this one has not begun.
func (s *sqliteStore) recover(ctx context.Context, now time.Time) (int, error) {
	n, err := s.exec(ctx, `UPDATE orders SET publish_at=?1 WHERE finished_at IS NULL AND publish_at > ?1 AND direct=1`, now.UnixMicro())
	if err != nil {
		return 0, fmt.Errorf("recover direct orders: %w", err)
	}
	return n, nil
}

func (s *sqliteStore) oldestPublished(ctx context.Context) (time.Time, error) {
	return s.time(ctx, `SELECT published_at FROM orders WHERE finished_at IS NULL AND publish_at IS NULL ORDER BY published_at LIMIT 1`)
}

func (s *sqliteStore) republish(ctx context.Context, before, now time.Time, limit int) (int, error) {
	n, err := s.exec(ctx, `UPDATE orders SET publish_at=? WHERE id IN (
		SELECT id FROM orders WHERE finished_at IS NULL AND publish_at IS NULL AND published_at < ? ORDER BY published_at LIMIT ?)`,
		now.UnixMicro(), before.UnixMicro(), limit)
	if err != nil {
		return 0, fmt.Errorf("make published orders due again: %w", err)
	}
	return n, nil
}

func (s *sqliteStore) carrier(ctx context.Context) (string, error) {
	var name string
	err := s.db.Read.QueryRowContext(ctx, `SELECT name FROM carrier`).Scan(&name)
	if err != nil && !errors.Is(err, sql.ErrNoRows) {
		return "", fmt.Errorf("read which broker has the published orders: %w", err)
	}
	return name, nil
}

func (s *sqliteStore) setCarrier(ctx context.Context, name string) error {
	if _, err := s.exec(ctx, `INSERT INTO carrier (one, name) VALUES (1, ?) ON CONFLICT (one) DO UPDATE SET name = excluded.name`, name); err != nil {
		return fmt.Errorf("note which broker has the published orders: %w", err)
	}
	return nil
}

// exec runs a statement of its own, outside of the groups, and returns how many
// rows it changed.
func (s *sqliteStore) exec(ctx context.Context, statement string, args ...any) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	res, err := s.db.Write.ExecContext(ctx, statement, args...)
	if err != nil {
		return 0, err
	}
	n, err := res.RowsAffected()
	return int(n), err
}

func (s *sqliteStore) counts() map[contract.Status]int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return maps.Clone(s.count)
}

// purge looks through the orders from the oldest on: what finished long ago
// was accepted even earlier, so it needs no index of its own. It looks on a
// reading connection, since there may be many old orders that are not
// finished, and no new one should have to wait for that.
func (s *sqliteStore) purge(ctx context.Context, finishedBefore time.Time, limit int) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, writeTimeout)
	defer cancel()
	ids, err := s.old(ctx, finishedBefore, limit)
	if err != nil || len(ids) == 0 {
		return 0, err
	}
	tx, err := s.db.Write.BeginTx(ctx, nil)
	if err != nil {
		return 0, fmt.Errorf("purge orders: %w", err)
	}
	delta, err := purgeIn(ctx, tx, finishedBefore, ids)
	if err != nil {
		return 0, errors.Join(fmt.Errorf("purge orders: %w", err), rollback(tx))
	}
	if err := tx.Commit(); err != nil {
		return 0, errors.Join(fmt.Errorf("purge orders: %w", err), rollback(tx))
	}
	s.add(delta)
	return int(delta[statusPurged]), nil
}

func (s *sqliteStore) old(ctx context.Context, finishedBefore time.Time, limit int) ([]any, error) {
	rows, err := s.db.Read.QueryContext(ctx, `SELECT id FROM orders WHERE id < ? AND finished_at < ? ORDER BY id LIMIT ?`,
		idAt(finishedBefore), finishedBefore.UnixMicro(), limit)
	if err != nil {
		return nil, fmt.Errorf("look for old orders: %w", err)
	}
	defer rows.Close()
	var ids []any
	for rows.Next() {
		var id []byte
		if err := rows.Scan(&id); err != nil {
			return nil, fmt.Errorf("look for old orders: %w", err)
		}
		ids = append(ids, id)
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("look for old orders: %w", err)
	}
	return ids, nil
}

// purgeIn deletes those of the orders that are still old: a replay may have
// come in between.
func purgeIn(ctx context.Context, tx *sql.Tx, finishedBefore time.Time, ids []any) (map[contract.Status]int64, error) {
	rows, err := tx.QueryContext(ctx, `DELETE FROM orders WHERE finished_at < ? AND id IN (`+strings.Repeat("?,", len(ids)-1)+`?) RETURNING status`,
		append([]any{finishedBefore.UnixMicro()}, ids...)...)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	delta := map[contract.Status]int64{}
	for rows.Next() {
		var status contract.Status
		if err := rows.Scan(&status); err != nil {
			return nil, err
		}
		delta[status]--
		delta[statusPurged]++
	}
	if err := rows.Err(); err != nil {
		return nil, err
	}
	for status, n := range delta {
		if _, err := tx.ExecContext(ctx, sqliteCount, string(status), n); err != nil {
			return nil, err
		}
	}
	return delta, nil
}

func (s *sqliteStore) sample(ctx context.Context, n int) (ids []uuid.UUID, err error) {
	rows, err := s.db.Read.QueryContext(ctx, sqliteSample, n)
	if err != nil {
		return nil, fmt.Errorf("sample the waiting orders: %w", err)
	}
	defer rows.Close()
	var raw sql.RawBytes
	for rows.Next() {
		if err := rows.Scan(&raw); err != nil {
			return nil, fmt.Errorf("sample the waiting orders: %w", err)
		}
		ids = append(ids, uuid.UUID(raw))
	}
	if err := rows.Err(); err != nil {
		return nil, fmt.Errorf("sample the waiting orders: %w", err)
	}
	return ids, nil
}

// idAt returns the smallest id of an order accepted at that time (RFC 9562,
// section 5.7: the first 48 bits are milliseconds since 1970).
func idAt(at time.Time) []byte {
	ms := uint64(max(0, at.UnixMilli()))
	id := make([]byte, 16)
	for i := range 6 {
		id[i] = byte(ms >> (40 - 8*i))
	}
	return id
}

// ping commits a transaction that takes the space of a few orders and gives it
// back, so that it fails when the disk is full or the file cannot be written.
func (s *sqliteStore) ping(ctx context.Context) error {
	tx, err := s.db.Write.BeginTx(ctx, nil)
	if err != nil {
		return fmt.Errorf("write to the database: begin transaction: %w", err)
	}
	// A row of pingBytes that nobody else ever sees.
	for _, statement := range []string{
		fmt.Sprintf(`INSERT INTO order_counts (status, n) VALUES (hex(zeroblob(%d)), 0)`, pingBytes/2),
		`DELETE FROM order_counts WHERE length(status) > 1000`,
	} {
		if _, err := tx.ExecContext(ctx, statement); err != nil {
			return errors.Join(fmt.Errorf("write to the database: %w", err), rollback(tx))
		}
	}
	if err := tx.Commit(); err != nil {
		return errors.Join(fmt.Errorf("write to the database: commit transaction: %w", err), rollback(tx))
	}
	return nil
}

// pingBytes is what must fit for orders to be stored. An index has the row once
// more.
const pingBytes = 16 << 10

func (s *sqliteStore) close() error {
	var errs []error
	for _, stmt := range []*sql.Stmt{s.insertMany, s.insertOne, s.updateOne, s.firstOne, s.release, s.markMany, s.markOne, s.selectMany, s.selectOne, s.countBy, s.readOne, s.readDue, s.readBodies, s.readBody} {
		if stmt != nil {
			errs = append(errs, stmt.Close())
		}
	}
	return errors.Join(append(errs, s.db.Close())...)
}

func appendOrder(args []any, o *order) []any {
	return append(args, o.ID[:], o.Owner, nullable(o.Number), released(o), nullable(o.IdempotencyKey),
		string(o.Status), o.Attempts, o.AttemptBase, o.Direct,
		micros(o.AcceptedAt), micros(o.UpdatedAt), micros(o.FinishedAt), micros(o.PublishAt), o.TraceParent, o.TraceState,
		o.BackendStatus, o.BackendType, o.BackendBody, o.Problem, nil, o.Hash[:], len(o.Body), o.ContentType, o.Body)
}

// scanner is a *sql.Row or *sql.Rows.
type scanner interface{ Scan(...any) error }

// scanDue reads the columns of selectDue.
func scanDue(row scanner) (*order, error) {
	var (
		o                 order
		id                sql.RawBytes
		history           sql.RawBytes
		number            sql.NullString
		accepted, updated int64
		publish           sql.NullInt64
	)
	if err := row.Scan(&id, &number, &o.Status, &o.Attempts, &o.Direct, &accepted, &updated, &publish, &o.TraceParent, &o.TraceState,
		&o.BackendStatus, &history, &o.Size, &o.ContentType, &o.Body); err != nil {
		return nil, err
	}
	copy(o.ID[:], id)
	o.Number = number.String
	o.AcceptedAt, o.UpdatedAt = time.UnixMicro(accepted).UTC(), time.UnixMicro(updated).UTC()
	if publish.Valid {
		o.PublishAt = time.UnixMicro(publish.Int64).UTC()
	}
	var err error
	o.historySize = len(history)
	o.History, err = decodeHistory(o.ID, history)
	return &o, err
}

// scanOrder reads the columns orderColumns.
func scanOrder(row scanner) (*order, error) {
	var (
		o                           order
		id, released, hash, history []byte
		number, key                 sql.NullString
		accepted, updated           int64
		finished, publish           sql.NullInt64
	)
	if err := row.Scan(&id, &o.Owner, &number, &released, &key, &o.Status, &o.Attempts, &o.AttemptBase, &o.Direct,
		&accepted, &updated, &finished, &publish, &o.TraceParent, &o.TraceState,
		&o.BackendStatus, &o.BackendType, &o.BackendBody, &o.Problem, &history, &hash, &o.Size, &o.ContentType); err != nil {
		return nil, err
	}
	copy(o.ID[:], id)
	copy(o.Hash[:], hash)
	o.Number, o.IdempotencyKey = number.String, key.String
	o.NumberReleased = len(released) > 0
	o.AcceptedAt, o.UpdatedAt = time.UnixMicro(accepted).UTC(), time.UnixMicro(updated).UTC()
	if finished.Valid {
		o.FinishedAt = time.UnixMicro(finished.Int64).UTC()
	}
	if publish.Valid {
		o.PublishAt = time.UnixMicro(publish.Int64).UTC()
	}
	var err error
	o.historySize = len(history)
	o.History, err = decodeHistory(o.ID, history)
	return &o, err
}

func encodeHistory(history []attempt) ([]byte, error) {
	if len(history) == 0 {
		return nil, nil
	}
	return json.Marshal(history)
}

func decodeHistory(id uuid.UUID, text []byte) (history []attempt, err error) {
	if len(text) == 0 {
		return nil, nil
	}
	if err := json.Unmarshal(text, &history); err != nil {
		return nil, fmt.Errorf("read history of order %s: %w", id, err)
	}
	return history, nil
}

// released is part of the unique index over numbers: equal (empty) for those
// who hold theirs, different for those who do not.
func released(o *order) []byte {
	if o.NumberReleased {
		return o.ID[:]
	}
	return []byte{}
}

func micros(t time.Time) any {
	if t.IsZero() {
		return nil
	}
	return t.UnixMicro()
}

func nullable(s string) any {
	if s == "" {
		return nil
	}
	return s
}
