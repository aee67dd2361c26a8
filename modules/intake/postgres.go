package intake

import (
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"sluice/modules/contract"
	"sluice/platform/database"
)

//go:embed migrations/postgres/*.sql
var postgresMigrations embed.FS

// postgresFlushers is how many groups are written at the same time: while one
// waits for the server's disk, others are sent and computed.
const postgresFlushers = 4

// postgresSettings keep the plans what they are meant to be, whatever the
// statistics say: those of a table that fills up are always late, and a plan is
// kept as long as its connection. Every statement here looks rows up, or walks
// along an index in order and stops soon. To read the whole table, or to collect
// and sort all that is due, is never right.
var postgresSettings = map[string]string{
	"enable_seqscan":    "off",
	"enable_bitmapscan": "off",
	"plan_cache_mode":   "force_generic_plan",
}

// postgresStore keeps orders in a PostgreSQL database, which any number of
// processes share. PostgreSQL 13 or newer.
type postgresStore struct {
	db      *database.Postgres
	counted *postgresCounts
	news    *postgresNews
}

// openPostgresStore opens the database, waiting for its server until ctx ends.
func openPostgresStore(ctx context.Context, dsn string, logger *slog.Logger) (*postgresStore, error) {
	migrations, err := fs.Sub(postgresMigrations, "migrations/postgres")
	if err != nil {
		return nil, fmt.Errorf("read migrations: %w", err)
	}
	db, err := database.OpenPostgres(ctx, database.PostgresConfig{DSN: dsn, Migrations: migrations, Settings: postgresSettings, Logger: logger})
	if err != nil {
		return nil, err
	}
	s := &postgresStore{db: db}
	if s.counted, err = countPostgres(ctx, db, logger); err != nil {
		return nil, errors.Join(err, db.Close())
	}
	s.news = newPostgresNews(ctx, db, logger)
	return s, nil
}

func (s *postgresStore) close() error {
	s.news.close()
	s.counted.close()
	return s.db.Close()
}

func (s *postgresStore) flushers() int { return postgresFlushers }

const (
	postgresColumns = `id, owner, number, exact_number, released, idempotency_key, status, attempts, attempt_base, direct,
		accepted_at, updated_at, finished_at, publish_at, trace_parent, trace_state,
		backend_status, backend_type, backend_body, problem, history, hash, size, content_type`
	postgresSelect = `SELECT ` + postgresColumns + ` FROM orders `

	postgresGet       = postgresSelect + `WHERE id = $1`
	postgresDue       = `SELECT id, size FROM orders WHERE publish_at <= $1 AND id <> ALL($2::uuid[]) ORDER BY publish_at, id LIMIT $3`
	postgresDueLocked = postgresDue + ` FOR UPDATE SKIP LOCKED`
	postgresBodies    = `SELECT ` + postgresColumns + `, body FROM orders WHERE id = ANY($1::uuid[]) AND publish_at <= $2`
	postgresClaim     = `UPDATE orders SET publish_at = $2 WHERE id = ANY($1::uuid[]) RETURNING ` + postgresColumns + `, body`
	// A claim or its renewal that is lost in a crash of the server was of no use
	// any more: it is not worth waiting for the disk. What is committed after it
	// and does wait takes it along.
	postgresHasty   = `SET LOCAL synchronous_commit = off`
	postgresNextDue = `SELECT publish_at FROM orders WHERE publish_at > $1 ORDER BY publish_at, id LIMIT 1`

	// Rows are locked in the order of their ids, here and wherever somebody
	// waits for a lock: then nobody waits for one who waits for him.
	postgresRenew = `UPDATE orders SET publish_at = $4 FROM (
			SELECT o.id AS claimed FROM unnest($1::uuid[], $2::int[], $3::bool[]) AS m (id, attempts, dead)
			JOIN orders o ON o.id = m.id AND o.attempts = m.attempts AND (o.status = 'dead') = m.dead AND o.publish_at IS NOT NULL
			ORDER BY o.id FOR UPDATE OF o) mine
		WHERE id = claimed`

	postgresOldestPublished = `SELECT published_at FROM orders WHERE finished_at IS NULL AND publish_at IS NULL ORDER BY published_at, id LIMIT 1`
	postgresRepublish       = `WITH silent AS MATERIALIZED (
			SELECT id FROM orders WHERE finished_at IS NULL AND publish_at IS NULL AND published_at < $1
			ORDER BY published_at, id LIMIT $3 FOR UPDATE SKIP LOCKED)
		UPDATE orders SET publish_at = $2 FROM silent WHERE orders.id = silent.id`

	postgresOldestWaiting = `SELECT min(accepted_at) FROM (
			(SELECT accepted_at FROM orders WHERE finished_at IS NULL AND status = 'accepted' ORDER BY id LIMIT 1) UNION ALL
			(SELECT accepted_at FROM orders WHERE finished_at IS NULL AND status = 'retrying' ORDER BY id LIMIT 1)) AS oldest`

	// What finished long ago was accepted even earlier, so the ids do for an
	// index.
	postgresPurge = `WITH old AS MATERIALIZED (
			SELECT id FROM orders WHERE id < $1 AND finished_at < $2 ORDER BY id LIMIT $3 FOR UPDATE SKIP LOCKED)
		DELETE FROM orders USING old WHERE orders.id = old.id RETURNING status`

	postgresSample = `SELECT id FROM (SELECT id, row_number() OVER (ORDER BY id) AS rank FROM orders WHERE status = 'accepted' AND finished_at IS NULL) AS waiting
		WHERE rank % $1::int = 0 ORDER BY rank`

	postgresCarrier    = `SELECT name FROM carrier`
	postgresSetCarrier = `INSERT INTO carrier (one, name) VALUES (1, $1) ON CONFLICT (one) DO UPDATE SET name = excluded.name`
)

func (s *postgresStore) holds(ctx context.Context, o *order) (held bool, err error) {
	number, _ := numberColumns(o.Number)
	err = s.db.Read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, postgresHolds, o.Owner, number, textOrNull(o.IdempotencyKey)).Scan(&held)
	})
	if err != nil {
		return false, fmt.Errorf("look for the holder of a number: %w", err)
	}
	return held, nil
}

func (s *postgresStore) get(ctx context.Context, id uuid.UUID) (o *order, err error) {
	err = s.db.Read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		o, err = scanPostgresOrder(conn.QueryRow(ctx, postgresGet, [16]byte(id)))
		return err
	})
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		return nil, errNotFound
	case err != nil:
		return nil, fmt.Errorf("read order %s: %w", id, err)
	}
	return o, nil
}

func (s *postgresStore) list(ctx context.Context, q query) (found page, err error) {
	statement, args := postgresList(q)
	err = s.db.Read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		orders, err := collectPostgres(conn.Query(ctx, statement, args...))
		found = page{}
		for _, o := range orders {
			if !found.take(o, q.limit) {
				break
			}
		}
		return err
	})
	if err != nil {
		return page{}, postgresListError(err)
	}
	return found, nil
}

func (s *postgresStore) floor(ctx context.Context, q query, n int) (floor uuid.UUID, err error) {
	statement, args := postgresFloor(q, n)
	err = s.db.Read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, statement, args...).Scan((*[16]byte)(&floor))
	})
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return uuid.Nil, postgresListError(err)
	}
	return floor, nil
}

// postgresCanceled is the condition query_canceled: the time of the statement
// was over.
const postgresCanceled = "57014"

func postgresListError(err error) error {
	if refusal, ok := errors.AsType[*pgconn.PgError](err); ok && refusal.Code == postgresCanceled {
		err = errors.Join(errTooSlow, err)
	}
	return fmt.Errorf("list orders: %w", err)
}

// postgresList builds the statement for a page. The server sends all that is
// asked for, used or not; so the statement ends, as the page does, with the order
// that does not fit any more: the first one with a full page before the one in
// front of it.
func postgresList(q query) (statement string, args []any) {
	q.number, _ = indexable(q.number)
	newest, args := q.pageStatement(postgresColumns)
	return numbered(fmt.Sprintf(`SELECT %[1]s FROM (
			SELECT %[1]s, sum(coalesce(octet_length(backend_body), 0) + coalesce(octet_length(problem), 0) + coalesce(octet_length(history), 0))
				OVER (ORDER BY id DESC ROWS BETWEEN UNBOUNDED PRECEDING AND 2 PRECEDING) AS ahead
			FROM (%[2]s) AS newest) AS weighed
		WHERE coalesce(ahead, 0) < %[3]d ORDER BY id DESC`, postgresColumns, newest, pageBytes)), args
}

func postgresFloor(q query, n int) (statement string, args []any) {
	statement, args = q.floorStatement(n)
	return numbered(statement), args
}

// numbered names the parameters ? of a statement as PostgreSQL does: $1, $2.
func numbered(statement string) string {
	parts := strings.Split(statement, "?")
	for i := range parts[1:] {
		parts[i] += fmt.Sprintf("$%d", i+1)
	}
	return strings.Join(parts, "")
}

// claim locks the longest due orders that nobody else is claiming, chooses, and
// puts the chosen ones off. With a zero until it only reads.
func (s *postgresStore) claim(ctx context.Context, now, until time.Time, limit, size int, skip func(uuid.UUID) bool) (found []*order, err error) {
	due := duePostgres{now: now, limit: limit, size: size, skip: skip}
	if until.IsZero() {
		err = s.db.Read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
			found, err = due.read(ctx, conn)
			return err
		})
	} else {
		err = s.db.Write(ctx, func(ctx context.Context, conn *pgx.Conn) error {
			found, err = due.claim(ctx, conn, until)
			return err
		})
	}
	if err != nil {
		return nil, fmt.Errorf("claim due orders: %w", err)
	}
	return found, nil
}

// duePostgres is what a claim asks for.
type duePostgres struct {
	now         time.Time
	limit, size int
	skip        func(uuid.UUID) bool
}

func (d duePostgres) read(ctx context.Context, conn *pgx.Conn) ([]*order, error) {
	ids, err := d.choose(ctx, conn, postgresDue)
	if err != nil || len(ids) == 0 {
		return nil, err
	}
	rows, err := conn.Query(ctx, postgresBodies, ids, d.now)
	return collectInOrder(rows, err, ids)
}

func (d duePostgres) claim(ctx context.Context, conn *pgx.Conn, until time.Time) (found []*order, err error) {
	err = pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
		ids, err := d.choose(ctx, conn, postgresDueLocked)
		if err != nil || len(ids) == 0 {
			return err
		}
		if _, err := tx.Exec(ctx, postgresHasty); err != nil {
			return err
		}
		rows, err := tx.Query(ctx, postgresClaim, ids, until)
		found, err = collectInOrder(rows, err, ids)
		return err
	})
	return found, err
}

// choose returns ids, longest due first. The order that reaches the limit of
// size is the last one.
func (d duePostgres) choose(ctx context.Context, conn *pgx.Conn, statement string) ([][16]byte, error) {
	chosen, seen := [][16]byte{}, [][16]byte{}
	for total := 0; ; {
		asked := d.limit - len(chosen)
		rows, err := conn.Query(ctx, statement, d.now, seen, asked)
		if err != nil {
			return nil, err
		}
		var id [16]byte
		var size int
		tag, err := pgx.ForEachRow(rows, []any{&id, &size}, func() error {
			seen = append(seen, id)
			if total < d.size && !d.skip(id) {
				chosen = append(chosen, id)
				total += size
			}
			return nil
		})
		// Again only if there is more and some of these were to be skipped.
		if err != nil || int(tag.RowsAffected()) < asked || len(chosen) == d.limit || total >= d.size {
			return chosen, err
		}
	}
}

func (s *postgresStore) renew(ctx context.Context, claimed []mark, until time.Time) error {
	if len(claimed) == 0 {
		return nil
	}
	marks := markColumns{}
	for _, m := range claimed {
		marks.add(m, until)
	}
	err := s.db.Write(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, postgresHasty); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, postgresRenew, marks.id, marks.attempts, marks.dead, until)
			return err
		})
	})
	if err != nil {
		return fmt.Errorf("renew claims: %w", err)
	}
	return nil
}

func (s *postgresStore) nextDue(ctx context.Context, now time.Time) (time.Time, error) {
	return s.time(ctx, postgresNextDue, now)
}

func (s *postgresStore) oldestWaiting(ctx context.Context) (time.Time, error) {
	return s.time(ctx, postgresOldestWaiting)
}

func (s *postgresStore) oldestPublished(ctx context.Context) (time.Time, error) {
	return s.time(ctx, postgresOldestPublished)
}

// time reads one time, zero where the statement finds none.
func (s *postgresStore) time(ctx context.Context, statement string, args ...any) (time.Time, error) {
	var at *time.Time
	err := s.db.Read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, statement, args...).Scan(&at)
	})
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return time.Time{}, fmt.Errorf("read time: %w", err)
	}
	return utc(at), nil
}

// recover has nothing that is certain: other processes may be busy with direct
// orders. Each becomes due by itself when its call must have ended.
func (s *postgresStore) recover(context.Context, time.Time) (int, error) { return 0, nil }

// republish passes over orders that somebody is changing: they are not silent.
func (s *postgresStore) republish(ctx context.Context, before, now time.Time, limit int) (int, error) {
	n, err := s.exec(ctx, postgresRepublish, before, now, limit)
	if err != nil {
		return 0, fmt.Errorf("make published orders due again: %w", err)
	}
	return n, nil
}

func (s *postgresStore) carrier(ctx context.Context) (name string, err error) {
	err = s.db.Read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		return conn.QueryRow(ctx, postgresCarrier).Scan(&name)
	})
	if err != nil && !errors.Is(err, pgx.ErrNoRows) {
		return "", fmt.Errorf("read which broker has the published orders: %w", err)
	}
	return name, nil
}

func (s *postgresStore) setCarrier(ctx context.Context, name string) error {
	if _, err := s.exec(ctx, postgresSetCarrier, name); err != nil {
		return fmt.Errorf("note which broker has the published orders: %w", err)
	}
	return nil
}

// exec runs a statement that may run twice, and returns how many rows it
// changed.
func (s *postgresStore) exec(ctx context.Context, statement string, args ...any) (changed int, err error) {
	err = s.db.Write(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		tag, err := conn.Exec(ctx, statement, args...)
		changed = int(tag.RowsAffected())
		return err
	})
	return changed, err
}

func (s *postgresStore) counts() map[contract.Status]int64 { return s.counted.now() }

func (s *postgresStore) sample(ctx context.Context, n int) (ids []uuid.UUID, err error) {
	err = s.db.Read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		rows, err := conn.Query(ctx, postgresSample, n)
		if err != nil {
			return err
		}
		ids, err = pgx.CollectRows(rows, pgx.RowTo[uuid.UUID])
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("sample the waiting orders: %w", err)
	}
	return ids, nil
}

// purge leaves to other processes what they are about to delete.
func (s *postgresStore) purge(ctx context.Context, finishedBefore time.Time, limit int) (deleted int, err error) {
	err = s.db.Write(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		var txid uint64
		delta := map[contract.Status]int64{}
		err := pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			rows, err := tx.Query(ctx, postgresPurge, [16]byte(idAt(finishedBefore)), finishedBefore, limit)
			if err != nil {
				return err
			}
			var status contract.Status
			tag, err := pgx.ForEachRow(rows, []any{&status}, func() error { delta[status]--; return nil })
			if deleted = int(tag.RowsAffected()); err != nil || deleted == 0 {
				return err
			}
			delta[statusPurged] = int64(deleted)
			statement, args := countBy(delta)
			return tx.QueryRow(ctx, statement, args...).Scan(&txid)
		})
		if err == nil {
			s.counted.add(txid, delta)
		}
		return err
	})
	if err != nil {
		return 0, fmt.Errorf("purge orders: %w", err)
	}
	return deleted, nil
}

// ping commits a change of a row, so that it fails on a standby, a full disk, or
// a database that is read only.
func (s *postgresStore) ping(ctx context.Context) error {
	if _, err := s.exec(ctx, postgresCount, []string{""}, []int64{0}); err != nil {
		return fmt.Errorf("write to the database: %w", err)
	}
	return nil
}

// collectInOrder reads orders with their bodies, in the order of the ids.
// Those that are not there any more are left out.
func collectInOrder(rows pgx.Rows, err error, ids [][16]byte) ([]*order, error) {
	if err != nil {
		return nil, err
	}
	byID := make(map[uuid.UUID]*order, len(ids))
	defer rows.Close()
	for rows.Next() {
		var body []byte
		o, err := scanPostgresOrder(rows, &body)
		if err != nil {
			return nil, err
		}
		o.Body = body
		byID[o.ID] = o
	}
	var found []*order
	for _, id := range ids {
		if o := byID[id]; o != nil {
			found = append(found, o)
		}
	}
	return found, rows.Err()
}

func collectPostgres(rows pgx.Rows, err error) ([]*order, error) {
	if err != nil {
		return nil, err
	}
	return pgx.CollectRows(rows, func(row pgx.CollectableRow) (*order, error) { return scanPostgresOrder(row) })
}

// scanPostgresOrder reads postgresColumns, and the columns after them into more.
func scanPostgresOrder(row scanner, more ...any) (*order, error) {
	var (
		o                    order
		number, key          *string
		exact, hash, history []byte
		released             [16]byte
		accepted, updated    time.Time
		finished, publish    *time.Time
	)
	dest := []any{(*[16]byte)(&o.ID), &o.Owner, &number, &exact, &released, &key, &o.Status, &o.Attempts, &o.AttemptBase, &o.Direct,
		&accepted, &updated, &finished, &publish, &o.TraceParent, &o.TraceState,
		&o.BackendStatus, &o.BackendType, &o.BackendBody, &o.Problem, &history, &hash, &o.Size, &o.ContentType}
	if err := row.Scan(append(dest, more...)...); err != nil {
		return nil, err
	}
	copy(o.Hash[:], hash)
	o.NumberReleased = released != [16]byte{}
	if number != nil {
		o.Number = *number
	}
	if exact != nil {
		o.Number = string(exact)
	}
	if key != nil {
		o.IdempotencyKey = *key
	}
	o.AcceptedAt, o.UpdatedAt = accepted.UTC(), updated.UTC()
	o.FinishedAt, o.PublishAt = utc(finished), utc(publish)
	var err error
	o.historySize = len(history)
	o.History, err = decodeHistory(o.ID, history)
	return &o, err
}

// utc returns the time, or the zero time for NULL.
func utc(at *time.Time) time.Time {
	if at == nil {
		return time.Time{}
	}
	return at.UTC()
}

// null returns NULL for the zero time.
func null(at time.Time) *time.Time {
	if at.IsZero() {
		return nil
	}
	return &at
}

const (
	// indexableLength is well below what an entry of an index can hold.
	indexableLength = 512
	digestPrefix    = "sha256:"
)

// indexable returns what stands for a number in the indexed column: the number
// itself or, where that is too long for an index or is no text that PostgreSQL
// can hold, its digest. Then exact is the number. One such order would
// otherwise fail, and with it all that share its transaction.
func indexable(number string) (column string, exact []byte) {
	if len(number) <= indexableLength && number == plain(number) && !strings.HasPrefix(number, digestPrefix) {
		return number, nil
	}
	digest := sha256.Sum256([]byte(number))
	return digestPrefix + hex.EncodeToString(digest[:]), []byte(number)
}

// plain replaces what a text of PostgreSQL cannot hold: bytes that are not
// UTF-8, and NUL. Headers can have them.
func plain(text string) string {
	if utf8.ValidString(text) && !strings.Contains(text, "\x00") {
		return text
	}
	return strings.ReplaceAll(strings.ToValidUTF8(text, "\uFFFD"), "\x00", "\uFFFD")
}
