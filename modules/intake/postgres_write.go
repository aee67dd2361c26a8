package intake

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sluice/modules/contract"
	"sluice/platform/database"
)

const (
	// Whatever is unique and taken, by orders that are stored or that another
	// transaction is about to commit, is left out.
	postgresInsert = `INSERT INTO orders (id, owner, number, exact_number, released, idempotency_key, status, attempts, attempt_base, direct,
			accepted_at, updated_at, finished_at, publish_at, trace_parent, trace_state, hash, size, content_type, body)
		SELECT * FROM unnest($1::uuid[], $2::text[], $3::text[], $4::bytea[], $5::uuid[], $6::text[], $7::text[], $8::int[], $9::int[], $10::bool[],
			$11::timestamptz[], $12::timestamptz[], $13::timestamptz[], $14::timestamptz[], $15::text[], $16::text[], $17::bytea[], $18::int[], $19::text[], $20::bytea[])
		ON CONFLICT DO NOTHING RETURNING id`

	// The holder of the key goes before that of the number.
	postgresHolders = `SELECT ` + postgresColumns + `, n FROM unnest($1::text[], $2::text[], $3::text[]) WITH ORDINALITY AS r (r_owner, r_number, r_key, n)
		JOIN orders ON id = COALESCE(
			(SELECT k.id FROM orders k WHERE k.idempotency_key = r_key AND k.owner = r_owner),
			(SELECT h.id FROM orders h WHERE h.number = r_number AND h.owner = r_owner AND h.released = '00000000-0000-0000-0000-000000000000'))`

	postgresHolds = `SELECT EXISTS (SELECT 1 FROM orders WHERE idempotency_key = $3::text AND owner = $1::text)
		OR EXISTS (SELECT 1 FROM orders WHERE number = $2::text AND owner = $1::text AND released = '00000000-0000-0000-0000-000000000000')`

	postgresLock = `SELECT id FROM orders WHERE id = ANY($1::uuid[]) ORDER BY id FOR UPDATE`
	postgresLoad = postgresSelect + `WHERE id = ANY($1::uuid[]) ORDER BY id FOR UPDATE`

	postgresMark = `UPDATE orders SET publish_at = NULL, published_at = marked_at FROM (
			SELECT o.id AS marked, m.at AS marked_at FROM unnest($1::uuid[], $2::int[], $3::bool[], $4::timestamptz[]) AS m (id, attempts, dead, at)
			JOIN orders o ON o.id = m.id AND o.attempts = m.attempts AND (o.status = 'dead') = m.dead
			ORDER BY o.id FOR UPDATE OF o) marks
		WHERE id = marked`

	postgresUpdate = `UPDATE orders SET released = v.released, status = v.status, attempts = v.attempts, attempt_base = v.attempt_base, direct = v.direct,
			updated_at = v.updated_at, finished_at = v.finished_at, publish_at = v.publish_at,
			backend_status = v.backend_status, backend_type = v.backend_type, backend_body = v.backend_body, problem = v.problem, history = v.history
		FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::int[], $5::int[], $6::bool[], $7::timestamptz[], $8::timestamptz[], $9::timestamptz[],
			$10::int[], $11::text[], $12::bytea[], $13::bytea[], $14::bytea[])
			AS v (id, released, status, attempts, attempt_base, direct, updated_at, finished_at, publish_at,
			backend_status, backend_type, backend_body, problem, history)
		WHERE orders.id = v.id`

	postgresDelete = `DELETE FROM orders WHERE id = ANY($1::uuid[])`

	// Without waiting for whoever has locked the order: they may be waiting for
	// what this transaction has locked.
	postgresBind = `UPDATE orders SET idempotency_key = $2 WHERE id = (
			SELECT id FROM orders WHERE id = $1 AND idempotency_key IS NULL FOR UPDATE SKIP LOCKED)`

	// Known before the commit, whose answer can get lost.
	postgresXID = `SELECT pg_current_xact_id()::text::bigint`
)

// write needs two round trips, whatever the changes: one that inserts, marks
// and locks what is to be updated, and one that updates and commits. Only where
// insertions meet orders that are there already it needs more.
//
// If the connection is lost during the commit of an insertion, the server is
// asked whether it happened, for as long as uncertainFor. If nobody can tell even
// then, the error is database.ErrUncertain; a client that repeats its order finds
// it, or makes it.
func (s *postgresStore) write(ctx context.Context, changes []*change) error {
	for {
		w, err := s.try(ctx, changes)
		if errors.Is(err, database.ErrUncertain) {
			committed, unknown := s.fate(ctx, w.xid, changes)
			switch {
			case unknown != nil:
				return fmt.Errorf("%w; and then: %w", err, unknown)
			case !committed:
				continue
			}
			err = nil
		}
		if err != nil {
			return err
		}
		s.counted.add(w.xid, w.delta)
		s.news.tell(w.touched())
		return nil
	}
}

// try is write, but leaves a commit uncertain. It returns the last transaction.
func (s *postgresStore) try(ctx context.Context, changes []*change) (w *postgresWrite, err error) {
	err = s.db.Write(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		w = newPostgresWrite(conn, changes)
		if err := w.begin(ctx); err != nil {
			return err
		}
		if err := w.resolve(ctx); err != nil {
			return fmt.Errorf("look for the holder of a number: %w", err)
		}
		w.update()
		return w.commit(ctx)
	})
	return w, err
}

const (
	// uncertainFor is how long the server is asked what became of a commit. A
	// quick restart takes no longer, and whoever comes next waits for it as well
	// before they are told that there is no storage.
	uncertainFor   = 2 * time.Second
	uncertainPause = 50 * time.Millisecond

	// NULL is a transaction that the server has forgotten; one that it has not
	// heard of is an error.
	postgresFate   = `SELECT COALESCE(pg_xact_status($1::text::xid8), 'forgotten')`
	postgresExists = `SELECT EXISTS (SELECT 1 FROM orders WHERE id = $1)`
)

// fate asks what became of a transaction whose commit got no answer, until the
// server tells: the commit may still be under way.
//
// A server that crashed, or that took over, can give the number of a transaction
// that it lost to another one. So it says when the transaction has ended, and an
// order that was inserted in it says how. Without insertions nobody can tell.
func (s *postgresStore) fate(ctx context.Context, xid uint64, changes []*change) (committed bool, err error) {
	i := slices.IndexFunc(changes, func(c *change) bool { return c.insert != nil && c.changed })
	if i < 0 {
		return false, errors.New("it has inserted nothing by which it could be told")
	}
	witness := [16]byte(changes[i].insert.ID)
	ctx, cancel := context.WithTimeout(ctx, uncertainFor)
	defer cancel()
	for {
		var status string
		var there bool
		err := s.db.Read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
			if err := conn.QueryRow(ctx, postgresFate, strconv.FormatUint(xid, 10)).Scan(&status); err != nil {
				return err
			}
			return conn.QueryRow(ctx, postgresExists, witness).Scan(&there) // as it is after that
		})
		switch {
		case err == nil && (status == "committed" || status == "aborted"):
			return there, nil
		case ctx.Err() != nil && err != nil:
			return false, fmt.Errorf("ask what became of transaction %d: %w", xid, err)
		case ctx.Err() != nil:
			return false, fmt.Errorf("transaction %d is %s", xid, status)
		}
		wait(ctx, uncertainPause, nil)
	}
}

// postgresWrite is one try at a transaction.
type postgresWrite struct {
	conn    *pgx.Conn
	xid     uint64
	missing []*change // insertions that have not happened, sorted by owner and number
	marks   markColumns
	updates []*change
	rows    map[uuid.UUID]*order // locked orders, as they are to be
	dirty   map[uuid.UUID]bool   // orders that differ from what is stored
	removed [][16]byte
	delta   map[contract.Status]int64 // change of the counts
}

func newPostgresWrite(conn *pgx.Conn, changes []*change) *postgresWrite {
	w := &postgresWrite{conn: conn, rows: map[uuid.UUID]*order{}, dirty: map[uuid.UUID]bool{}, delta: map[contract.Status]int64{}}
	for _, c := range changes {
		c.found, c.changed = nil, false
		switch {
		case c.insert != nil:
			w.missing = append(w.missing, c)
		case c.update != nil:
			w.updates = append(w.updates, c)
		}
		for _, m := range c.marks {
			w.marks.add(m, c.publishedAt)
		}
	}
	// Of two transactions that insert the same numbers, one waits for the
	// other, at the first of them; in different orders, each would wait for the
	// other. Equal numbers keep their order: the first one is inserted.
	slices.SortStableFunc(w.missing, func(a, b *change) int {
		return cmp.Or(cmp.Compare(a.insert.Owner, b.insert.Owner), cmp.Compare(a.insert.Number, b.insert.Number),
			cmp.Compare(a.insert.IdempotencyKey, b.insert.IdempotencyKey))
	})
	return w
}

// begin sends everything that can be said without an answer, at once.
func (w *postgresWrite) begin(ctx context.Context) error {
	b := &pgx.Batch{}
	b.Queue("BEGIN")
	b.Queue(postgresXID).QueryRow(func(row pgx.Row) error { return row.Scan(&w.xid) })
	if len(w.missing) > 0 {
		w.queueInsert(b)
	}
	if len(w.marks.id) > 0 {
		if len(w.updates) > 0 {
			// Both lock rows: all of them first, in one order.
			b.Queue(postgresLock, append(updateIDs(w.updates), w.marks.id...))
		}
		b.Queue(postgresMark, w.marks.id, w.marks.attempts, w.marks.dead, w.marks.at)
	}
	if len(w.updates) > 0 {
		b.Queue(postgresLoad, updateIDs(w.updates)).Query(w.loaded)
	}
	return w.conn.SendBatch(ctx, b).Close()
}

// queueInsert inserts what is missing. When the batch is done, missing is what
// was not inserted.
func (w *postgresWrite) queueInsert(b *pgx.Batch) {
	b.Queue(postgresInsert, insertColumns(w.missing)...).Query(func(rows pgx.Rows) error {
		inserted, err := pgx.CollectRows(rows, pgx.RowTo[[16]byte])
		if err != nil {
			return fmt.Errorf("insert %d orders: %w", len(w.missing), err)
		}
		done := make(map[[16]byte]bool, len(inserted))
		for _, id := range inserted {
			done[id] = true
		}
		w.missing = slices.DeleteFunc(w.missing, func(c *change) bool {
			if c.changed = done[c.insert.ID]; c.changed {
				recount(w.delta, nil, c.insert)
			}
			return c.changed
		})
		return nil
	})
}

// loaded takes locked orders over. One that was locked before stays as it has
// become.
func (w *postgresWrite) loaded(rows pgx.Rows) error {
	orders, err := collectPostgres(rows, nil)
	if err != nil {
		return fmt.Errorf("read %d orders to update: %w", len(w.updates), err)
	}
	for _, o := range orders {
		if w.rows[o.ID] == nil {
			w.rows[o.ID] = o
		}
	}
	return nil
}

// resolveTries bounds how often a number may change hands while it is looked
// for.
const resolveTries = 10

// resolve finds the orders because of which others were not inserted. The
// insertion has waited for transactions that were about to take the same number,
// and this is another statement, so it sees what they committed. If they did
// not, or if the holder was rejected or removed meanwhile, there is none: then
// the insertion is tried again.
func (w *postgresWrite) resolve(ctx context.Context) error {
	for range resolveTries {
		if len(w.missing) == 0 {
			return nil
		}
		if err := w.find(ctx); err != nil {
			return err
		}
		if err := w.adopt(ctx); err != nil {
			return err
		}
		if err := w.bind(ctx); err != nil {
			return err
		}
		w.missing = slices.DeleteFunc(w.missing, func(c *change) bool { return c.found != nil })
		if len(w.missing) > 0 {
			b := &pgx.Batch{}
			w.queueInsert(b)
			if err := w.conn.SendBatch(ctx, b).Close(); err != nil {
				return err
			}
		}
	}
	if len(w.missing) == 0 {
		return nil
	}
	o := w.missing[0].insert
	return fmt.Errorf("order %s was not inserted, and nothing holds its number %q or key", o.ID, o.Number)
}

// find looks for the holders of what is missing.
func (w *postgresWrite) find(ctx context.Context) error {
	var owners []string
	var numbers, keys []*string
	for _, c := range w.missing {
		number, _ := numberColumns(c.insert.Number)
		owners = append(owners, c.insert.Owner)
		numbers = append(numbers, number)
		keys = append(keys, textOrNull(c.insert.IdempotencyKey))
	}
	rows, err := w.conn.Query(ctx, postgresHolders, owners, numbers, keys)
	if err != nil {
		return err
	}
	defer rows.Close()
	for rows.Next() {
		o, n, err := scanHolder(rows)
		if err != nil {
			return err
		}
		w.missing[n-1].found = o
	}
	return rows.Err()
}

// adopt locks the holders that are to be adopted, and looks at them again: what
// is no holder any more is not found.
func (w *postgresWrite) adopt(ctx context.Context) error {
	var direct [][16]byte
	for _, c := range w.missing {
		if c.found != nil && c.found.Direct && c.found.Hash == c.insert.Hash {
			direct = append(direct, c.found.ID)
		}
	}
	if len(direct) == 0 {
		return nil
	}
	rows, err := w.conn.Query(ctx, postgresLoad, direct)
	if err != nil {
		return err
	}
	if err := w.loaded(rows); err != nil {
		return err
	}
	for _, c := range w.missing {
		if c.found == nil || !slices.Contains(direct, [16]byte(c.found.ID)) {
			continue
		}
		o := w.rows[c.found.ID]
		if c.found = nil; o == nil || !o.holds(c.insert) {
			continue
		}
		if o.adopt(c.insert) == save {
			w.delta[statusDirect]--
			w.dirty[o.ID] = true
		}
		found := *o
		c.found = &found
	}
	return nil
}

// bind gives keys to the holders that take them, but for those that are locked at
// the moment: they get theirs from another repetition. Of two orders that are to get
// the same key, the second then finds the first. Where another transaction was
// quicker, the key is not unique, and this one is tried again from the start.
func (w *postgresWrite) bind(ctx context.Context) error {
	b, taken := &pgx.Batch{}, map[ownedKey]uuid.UUID{}
	for _, c := range w.missing {
		if c.found == nil || !c.found.takesKey(c.insert) {
			continue
		}
		key := ownedKey{c.insert.Owner, c.insert.IdempotencyKey}
		holder, ok := taken[key]
		if ok && holder != c.found.ID {
			c.found = nil
			continue
		}
		taken[key] = c.found.ID
		c.found.IdempotencyKey = c.insert.IdempotencyKey
		b.Queue(postgresBind, [16]byte(c.found.ID), c.insert.IdempotencyKey)
	}
	if b.Len() == 0 {
		return nil
	}
	return w.conn.SendBatch(ctx, b).Close()
}

// holds reports whether the order has the number or the key that other wants.
func (o *order) holds(other *order) bool {
	return other.Number != "" && o.Number == other.Number && !o.NumberReleased ||
		other.IdempotencyKey != "" && o.IdempotencyKey == other.IdempotencyKey
}

// update lets each change its order. The same order can be there more than
// once: the next change sees what the last one made of it.
func (w *postgresWrite) update() {
	for _, c := range w.updates {
		switch c.perform(w.rows[c.id], w.delta) {
		case leave:
		case save:
			w.dirty[c.id] = true
		case remove:
			w.removed = append(w.removed, c.id)
			delete(w.dirty, c.id)
			delete(w.rows, c.id)
		}
	}
}

// commit writes what was updated, counts and commits, in one round trip.
func (w *postgresWrite) commit(ctx context.Context) error {
	b, answered := &pgx.Batch{}, 0
	done := func(pgconn.CommandTag) error { answered++; return nil }
	if len(w.dirty) > 0 {
		columns, err := w.updateColumns()
		if err != nil {
			return err
		}
		b.Queue(postgresUpdate, columns...).Exec(done)
	}
	if len(w.removed) > 0 {
		b.Queue(postgresDelete, w.removed).Exec(done)
	}
	maps.DeleteFunc(w.delta, func(_ contract.Status, n int64) bool { return n == 0 })
	if len(w.delta) > 0 {
		statement, args := countBy(w.delta)
		b.Queue(statement, args...).Exec(done)
	}
	before := b.Len()
	b.Queue("COMMIT")
	err := w.conn.SendBatch(ctx, b).Close()
	return w.doubt(err, answered == before)
}

// touched returns the orders that were there before and have been changed.
func (w *postgresWrite) touched() [][16]byte {
	ids := make([][16]byte, 0, len(w.dirty)+len(w.removed))
	for id := range w.dirty {
		ids = append(ids, id)
	}
	return append(ids, w.removed...)
}

// doubt says of an error whether the commit may have happened all the same: not
// if the server is there to tell, nor if it ended the connection before it came
// to the commit, nor if nothing was sent.
func (w *postgresWrite) doubt(err error, reached bool) error {
	_, told := errors.AsType[*pgconn.PgError](err)
	if err == nil || !w.conn.IsClosed() || (told && !reached) || pgconn.SafeToRetry(err) {
		return err
	}
	return fmt.Errorf("%w: %w", database.ErrUncertain, err)
}

// scanHolder reads a row of postgresHolders.
func scanHolder(row scanner) (o *order, n int, err error) {
	o, err = scanPostgresOrder(row, &n)
	return o, n, err
}

func updateIDs(updates []*change) [][16]byte {
	all := make([][16]byte, 0, len(updates))
	for _, c := range updates {
		all = append(all, c.id)
	}
	return all
}

// markColumns are marks, column by column, as unnest takes them.
type markColumns struct {
	id       [][16]byte
	attempts []int32
	dead     []bool
	at       []*time.Time
}

func (c *markColumns) add(m mark, at time.Time) {
	c.id = append(c.id, m.id)
	c.attempts = append(c.attempts, int32(m.attempts))
	c.dead = append(c.dead, m.dead)
	c.at = append(c.at, null(at))
}

// insertColumns are the arguments of postgresInsert.
func insertColumns(changes []*change) []any {
	n := len(changes)
	var (
		id, released                            = make([][16]byte, n), make([][16]byte, n)
		owner, status, parent, state, mediaType = make([]string, n), make([]string, n), make([]string, n), make([]string, n), make([]string, n)
		number, key                             = make([]*string, n), make([]*string, n)
		exact, hash, body                       = make([][]byte, n), make([][]byte, n), make([][]byte, n)
		attempts, base, size                    = make([]int32, n), make([]int32, n), make([]int32, n)
		direct                                  = make([]bool, n)
		accepted, updated                       = make([]time.Time, n), make([]time.Time, n)
		finished, publish                       = make([]*time.Time, n), make([]*time.Time, n)
	)
	for i, c := range changes {
		o := c.insert
		id[i], released[i], owner[i], status[i] = o.ID, releasedID(o), o.Owner, string(o.Status)
		number[i], exact[i] = numberColumns(o.Number)
		key[i] = textOrNull(o.IdempotencyKey)
		attempts[i], base[i], direct[i] = int32(o.Attempts), int32(o.AttemptBase), o.Direct
		accepted[i], updated[i], finished[i], publish[i] = o.AcceptedAt, o.UpdatedAt, null(o.FinishedAt), null(o.PublishAt)
		parent[i], state[i], mediaType[i] = plain(o.TraceParent), plain(o.TraceState), plain(o.ContentType)
		hash[i], size[i], body[i] = o.Hash[:], int32(len(o.Body)), o.Body
	}
	return []any{id, owner, number, exact, released, key, status, attempts, base, direct,
		accepted, updated, finished, publish, parent, state, hash, size, mediaType, body}
}

// updateColumns are the arguments of postgresUpdate.
func (w *postgresWrite) updateColumns() ([]any, error) {
	var (
		id, released              [][16]byte
		status, mediaType         []string
		attempts, base, answer    []int32
		direct                    []bool
		updated                   []time.Time
		finished, publish         []*time.Time
		answerBody, problem, past [][]byte
	)
	for key := range w.dirty {
		o := w.rows[key]
		history, err := encodeHistory(o.History)
		if err != nil {
			return nil, fmt.Errorf("write history of order %s: %w", o.ID, err)
		}
		id, released, status = append(id, o.ID), append(released, releasedID(o)), append(status, string(o.Status))
		attempts, base, direct = append(attempts, int32(o.Attempts)), append(base, int32(o.AttemptBase)), append(direct, o.Direct)
		updated, finished, publish = append(updated, o.UpdatedAt), append(finished, null(o.FinishedAt)), append(publish, null(o.PublishAt))
		answer, mediaType = append(answer, int32(o.BackendStatus)), append(mediaType, plain(o.BackendType))
		answerBody, problem, past = append(answerBody, o.BackendBody), append(problem, o.Problem), append(past, history)
	}
	return []any{id, released, status, attempts, base, direct, updated, finished, publish, answer, mediaType, answerBody, problem, past}, nil
}

// releasedID is part of the unique index over numbers: equal (zero) for those
// who hold theirs, different for those who do not.
func releasedID(o *order) [16]byte {
	if o.NumberReleased {
		return o.ID
	}
	return [16]byte{}
}

// numberColumns returns NULL for an order without a number.
func numberColumns(number string) (column *string, exact []byte) {
	if number == "" {
		return nil, nil
	}
	text, exact := indexable(number)
	return &text, exact
}

func textOrNull(text string) *string {
	if text == "" {
		return nil
	}
	return &text
}
