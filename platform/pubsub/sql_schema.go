package pubsub

import (
	"context"
	"database/sql"
	"fmt"
	"hash/fnv"
	"strconv"
	"time"

	"github.com/pressly/goose/v3"
)

// lease is how long a claimed message is its holder's, by the database's clock.
// The holder extends it every heartbeatEvery; when it is dead the message is
// due again after lease.
const (
	lease          = 10 * time.Second
	heartbeatEvery = 3 * time.Second
)

// sqlGroup is a consumer group of a topic.
type sqlGroup struct{ topic, name string }

// sqlQueue is the number of a group's table.
type sqlQueue int64

// sqlNames makes the names of everything in the database.
type sqlNames struct{ prefix string }

func (n sqlNames) groups() string     { return n.prefix + "_groups" }
func (n sqlNames) migrations() string { return n.prefix + "_broker_migrations" }
func (n sqlNames) queue(queue sqlQueue) string {
	return n.prefix + "_queue_" + strconv.FormatInt(int64(queue), 10)
}
func (n sqlNames) channel() string { return n.prefix + "_wake" }

// lock is the number of the advisory lock under which tables are made.
func (n sqlNames) lock() int64 {
	h := fnv.New64a()
	h.Write([]byte("sluice broker " + n.prefix)) // never an error
	return int64(h.Sum64())                      // any 64 bits do
}

// migrate brings the table of groups up to date. Processes that start at the
// same time wait for each other.
func migrate(ctx context.Context, db *sql.DB, names sqlNames) error {
	provider, err := goose.NewProvider(goose.DialectPostgres, db, nil,
		goose.WithTableName(names.migrations()),
		goose.WithSessionLocker(advisoryLock(names.lock())),
		goose.WithDisableGlobalRegistry(true),
		goose.WithGoMigrations(
			goose.NewGoMigration(1, &goose.GoFunc{RunTx: func(ctx context.Context, tx *sql.Tx) error {
				_, err := tx.ExecContext(ctx, groupsTable(names))
				return err
			}}, nil),
		))
	if err != nil {
		return fmt.Errorf("read the broker's migrations: %w", err)
	}
	if _, err := provider.Up(ctx); err != nil {
		return fmt.Errorf("migrate the broker's tables: %w", oneLine(err))
	}
	return nil
}

// advisoryLock is goose's SessionLocker. Its own polls every few seconds; the
// server can wake who waits.
type advisoryLock int64

func (l advisoryLock) SessionLock(ctx context.Context, conn *sql.Conn) error {
	_, err := conn.ExecContext(ctx, `SELECT pg_advisory_lock($1)`, int64(l))
	return err
}

func (l advisoryLock) SessionUnlock(ctx context.Context, conn *sql.Conn) error {
	_, err := conn.ExecContext(ctx, `SELECT pg_advisory_unlock($1)`, int64(l))
	return err
}

// groupsTable lists the groups of every topic, so that publishers find those
// that were first subscribed by other processes.
func groupsTable(names sqlNames) string {
	return `CREATE TABLE IF NOT EXISTS ` + names.groups() + ` (
		id             bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
		topic          text NOT NULL,
		consumer_group text NOT NULL,
		UNIQUE (topic, consumer_group))`
}

// queueTable is the queue of a group.
//
// There is no index but that of the key: a claim and a heartbeat change no
// column of an index, so that PostgreSQL can update in place, within the page
// (HOT). Half of each page is left free for that, since every message is
// claimed once. Vacuum follows the deletes at full speed, and does not wait for
// a share of the table. Ids and metadata can hold any bytes, and one message
// that the database refused would fail all that are published with it.
func queueTable(names sqlNames, queue sqlQueue) string {
	return `CREATE TABLE IF NOT EXISTS ` + names.queue(queue) + ` (
		id          bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
		lease_until timestamptz NOT NULL DEFAULT '-infinity',
		attempt     integer NOT NULL DEFAULT 0,
		uuid        bytea NOT NULL,
		metadata    bytea NOT NULL,
		payload     bytea NOT NULL
	) WITH (fillfactor = 50,
		autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000, autovacuum_vacuum_cost_delay = 0,
		toast.autovacuum_vacuum_scale_factor = 0, toast.autovacuum_vacuum_threshold = 2000, toast.autovacuum_vacuum_cost_delay = 0);
	ALTER TABLE ` + names.queue(queue) + ` ALTER payload SET STORAGE EXTERNAL`
}

// declare registers groups and makes the tables that are missing, in one
// transaction and under the lock. It returns the queues of the groups.
func declare(ctx context.Context, db *sql.DB, names sqlNames, groups []sqlGroup) (map[sqlGroup]sqlQueue, error) {
	tx, err := db.BeginTx(ctx, nil)
	if err != nil {
		return nil, fmt.Errorf("declare consumer groups: %w", oneLine(err))
	}
	defer func() { _ = tx.Rollback() }() // does nothing after the commit
	queues, err := declareIn(ctx, tx, names, groups)
	if err == nil {
		err = tx.Commit()
	}
	if err != nil {
		return nil, fmt.Errorf("declare consumer groups: %w", oneLine(err))
	}
	return queues, nil
}

func declareIn(ctx context.Context, tx *sql.Tx, names sqlNames, groups []sqlGroup) (map[sqlGroup]sqlQueue, error) {
	if _, err := tx.ExecContext(ctx, `SELECT pg_advisory_xact_lock($1)`, names.lock()); err != nil {
		return nil, err
	}
	// The migration made it, unless somebody has dropped it since.
	if _, err := tx.ExecContext(ctx, groupsTable(names)); err != nil {
		return nil, fmt.Errorf("make table %s: %w", names.groups(), err)
	}
	queues := make(map[sqlGroup]sqlQueue)
	for _, group := range groups {
		queue, err := register(ctx, tx, names, group)
		if err != nil {
			return nil, err
		}
		queues[group] = queue
	}
	missing, err := missingTables(ctx, tx, names)
	if err != nil {
		return nil, err
	}
	for _, queue := range missing {
		if _, err := tx.ExecContext(ctx, queueTable(names, queue)); err != nil {
			return nil, fmt.Errorf("make table %s: %w", names.queue(queue), err)
		}
	}
	return queues, nil
}

func register(ctx context.Context, tx *sql.Tx, names sqlNames, group sqlGroup) (sqlQueue, error) {
	if _, err := tx.ExecContext(ctx, `INSERT INTO `+names.groups()+` (topic, consumer_group)
		SELECT $1, $2 WHERE NOT EXISTS (SELECT FROM `+names.groups()+` WHERE topic = $1 AND consumer_group = $2)`,
		group.topic, group.name); err != nil {
		return 0, fmt.Errorf("register group %s of topic %s: %w", group.name, group.topic, err)
	}
	var queue sqlQueue
	err := tx.QueryRowContext(ctx, `SELECT id FROM `+names.groups()+` WHERE topic = $1 AND consumer_group = $2`,
		group.topic, group.name).Scan(&queue)
	return queue, err
}

// missingTables lists the registered queues that have no table: new ones, and
// those that somebody dropped.
func missingTables(ctx context.Context, tx *sql.Tx, names sqlNames) ([]sqlQueue, error) {
	rows, err := tx.QueryContext(ctx, `SELECT id FROM `+names.groups()+` WHERE to_regclass($1 || id) IS NULL`, names.prefix+"_queue_")
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var missing []sqlQueue
	for rows.Next() {
		var queue sqlQueue
		if err := rows.Scan(&queue); err != nil {
			return nil, err
		}
		missing = append(missing, queue)
	}
	return missing, rows.Err()
}
