package intake

import (
	"context"
	"encoding/base64"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"

	"sluice/platform/database"
)

// Processes that share the orders tell each other which of them they have
// changed. They do so after the commit, in a transaction of its own for all
// that were changed meanwhile: NOTIFY takes a lock of the whole server until
// its transaction is on disk, and nobody's commit should stand in line for it.
// What gets lost on the way is found by those who wait, who look now and then.

const (
	newsChannel = "sluice_orders"
	// newsIDs is how many ids fit into a payload, which is to be shorter than
	// 8000 bytes.
	newsIDs = 340
	// newsPending bounds what is kept to be told. Beyond it, others are told
	// that they missed something.
	newsPending = 16 * newsIDs
	// newsEvery is the least time between two transactions that tell.
	newsEvery = 5 * time.Millisecond
	// newsCheck is how often a process looks whether there are others.
	newsCheck = time.Second
	// newsPause is the time until something is tried again that failed.
	newsPause = time.Second

	// Who listens holds a lock together with all others who do, so that each
	// can see whether it is alone.
	newsLockClass, newsLock = 0x736c7563, 1 // "sluc"; any numbers will do

	postgresListening = `SELECT pg_advisory_lock_shared($1, $2)`
	postgresOthers    = `SELECT EXISTS (SELECT FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND classid = $1 AND objid = $2
			AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) AND pid <> pg_backend_pid())`
	postgresTell = `SELECT pg_notify($1, payload) FROM unnest($2::text[]) AS payload`

	postgresChanged = `SELECT known.id, orders.id IS NULL FROM unnest($1::uuid[], $2::int[], $3::text[]) AS known (id, attempts, status)
			LEFT JOIN orders ON orders.id = known.id
		WHERE orders.id IS NULL OR orders.attempts <> known.attempts OR orders.status <> known.status`
	postgresGetAll = postgresSelect + `WHERE id = ANY($1::uuid[])`
)

// postgresNews tells other processes which orders this one has changed, and
// hears it from them.
type postgresNews struct {
	db     *database.Postgres
	logger *slog.Logger
	self   string      // begins each payload of this process
	others atomic.Bool // somebody else listens
	stop   context.CancelFunc
	done   chan struct{}
	dirty  chan struct{} // there is something to tell

	mu      sync.Mutex
	pending [][16]byte
	missed  bool // more than pending holds
}

// newPostgresNews starts to tell, until close.
func newPostgresNews(ctx context.Context, db *database.Postgres, logger *slog.Logger) *postgresNews {
	n := &postgresNews{db: db, logger: logger, self: strings.ReplaceAll(uuid.NewString(), "-", ""), done: make(chan struct{}), dirty: make(chan struct{}, 1)}
	// It serves the store until that is closed.
	ctx, n.stop = context.WithCancel(context.WithoutCancel(ctx))
	go n.run(ctx)
	return n
}

// close tells the last news.
func (n *postgresNews) close() {
	n.stop()
	<-n.done
}

// tell notes that these orders have changed. It never blocks.
func (n *postgresNews) tell(ids [][16]byte) {
	if len(ids) == 0 || !n.others.Load() {
		return
	}
	n.mu.Lock()
	if len(n.pending)+len(ids) <= newsPending {
		n.pending = append(n.pending, ids...)
	} else {
		n.missed = true
	}
	n.mu.Unlock()
	select {
	case n.dirty <- struct{}{}:
	default:
	}
}

func (n *postgresNews) run(ctx context.Context) {
	defer close(n.done)
	for {
		select {
		case <-n.dirty:
		case <-ctx.Done():
			n.flush(context.WithoutCancel(ctx))
			return
		}
		pause := newsEvery
		if !n.flush(ctx) {
			pause = newsPause
		}
		wait(ctx, pause, nil)
	}
}

// flush sends what is pending, and reports whether it is told.
func (n *postgresNews) flush(ctx context.Context) bool {
	n.mu.Lock()
	payloads := n.payloads()
	n.pending, n.missed = nil, false
	n.mu.Unlock()
	if len(payloads) == 0 {
		return true
	}
	err := n.db.Write(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		return pgx.BeginFunc(ctx, conn, func(tx pgx.Tx) error {
			if _, err := tx.Exec(ctx, postgresHasty); err != nil {
				return err
			}
			_, err := tx.Exec(ctx, postgresTell, newsChannel, payloads)
			return err
		})
	})
	if err != nil {
		n.logger.Debug("cannot tell other processes which orders have changed; they look for themselves", "error", err)
		n.mu.Lock()
		n.missed = true
		n.mu.Unlock()
		select {
		case n.dirty <- struct{}{}:
		default:
		}
	}
	return err == nil
}

// payloads is called with mu held. A payload without ids says that some were
// missed.
func (n *postgresNews) payloads() []string {
	var all []string
	if n.missed {
		all = append(all, n.self)
	}
	for rest := n.pending; len(rest) > 0; {
		size := min(len(rest), newsIDs)
		text := make([]byte, 0, 16*size)
		for _, id := range rest[:size] {
			text = append(text, id[:]...)
		}
		all = append(all, n.self+base64.RawStdEncoding.EncodeToString(text))
		rest = rest[size:]
	}
	return all
}

// follow hears of changes until ctx ends.
func (n *postgresNews) follow(ctx context.Context, heard func([]uuid.UUID)) {
	for ctx.Err() == nil {
		began := false
		err := n.db.Listen(ctx, database.Listener{
			Channel: newsChannel, Every: newsCheck,
			Heard: func(payload string) { n.heard(payload, heard) },
			Listening: func(ctx context.Context, conn *pgx.Conn) error {
				if err := n.check(ctx, conn, !began); err != nil {
					return err
				}
				if !began {
					began = true
					heard(nil) // for what came before
				}
				return nil
			},
		})
		if ctx.Err() == nil {
			n.logger.Debug("cannot hear which orders other processes change; looking for it now and then", "error", err)
			wait(ctx, newsPause, nil)
		}
	}
	// What this process still commits while it drains is told all the same.
}

// check looks who else listens. The first time it says hello, so that they need
// not look to know.
func (n *postgresNews) check(ctx context.Context, conn *pgx.Conn, first bool) error {
	if first {
		if _, err := conn.Exec(ctx, postgresListening, newsLockClass, newsLock); err != nil {
			return err
		}
		if _, err := conn.Exec(ctx, postgresTell, newsChannel, []string{n.self}); err != nil {
			return err
		}
	}
	var others bool
	if err := conn.QueryRow(ctx, postgresOthers, newsLockClass, newsLock).Scan(&others); err != nil {
		return err
	}
	n.others.Store(others)
	return nil
}

func (n *postgresNews) heard(payload string, heard func([]uuid.UUID)) {
	if len(payload) < len(n.self) || payload[:len(n.self)] == n.self {
		return // our own
	}
	n.others.Store(true)
	text, err := base64.RawStdEncoding.DecodeString(payload[len(n.self):])
	if err != nil {
		return // of a later version, or an operator's
	}
	var ids []uuid.UUID // nil if there are none: then some were missed
	for ; len(text) >= 16; text = text[16:] {
		ids = append(ids, uuid.UUID(text[:16]))
	}
	heard(ids)
}

// follow is of shared.
func (s *postgresStore) follow(ctx context.Context, heard func([]uuid.UUID)) {
	s.news.follow(ctx, heard)
}

// changed is of shared.
func (s *postgresStore) changed(ctx context.Context, known []version) (found []*order, gone []uuid.UUID, err error) {
	ids, attempts, statuses := make([][16]byte, len(known)), make([]int32, len(known)), make([]string, len(known))
	for i, v := range known {
		ids[i], attempts[i], statuses[i] = v.id, int32(v.attempts), string(v.status)
	}
	err = s.db.Read(ctx, func(ctx context.Context, conn *pgx.Conn) error {
		found, gone = nil, nil
		rows, err := conn.Query(ctx, postgresChanged, ids, attempts, statuses)
		if err != nil {
			return err
		}
		var id [16]byte
		var none bool
		var differ [][16]byte
		if _, err := pgx.ForEachRow(rows, []any{&id, &none}, func() error {
			if none {
				gone = append(gone, id)
			} else {
				differ = append(differ, id)
			}
			return nil
		}); err != nil || len(differ) == 0 {
			return err
		}
		found, err = collectPostgres(conn.Query(ctx, postgresGetAll, differ))
		return err
	})
	if err != nil {
		return nil, nil, fmt.Errorf("look for changes of %d orders: %w", len(known), err)
	}
	return found, gone, nil
}
