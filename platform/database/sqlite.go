// Package database opens databases and migrates them.
//
// It knows nothing of what is stored. Stores (modules/intake) bring their own
// migrations and statements; what they share is here: how a SQLite file is
// opened so that a commit is durable and a second process is refused, and how a
// PostgreSQL is waited for, and tried again when it was away.
package database

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/gofrs/flock"
	"github.com/pressly/goose/v3"
	_ "modernc.org/sqlite" // registers the driver "sqlite"
)

// SQLite is an open database file. Its file belongs to this process alone.
type SQLite struct {
	// Write is one connection: SQLite has one writer at a time.
	Write *sql.DB
	// Read is a few connections that cannot write. In WAL mode they neither
	// wait for the writer nor hold it up.
	Read *sql.DB

	path string
	lock *flock.Flock
}

const (
	readConnections = 4
	// busyTimeout is how long a statement waits for a lock. Within one process
	// only a checkpoint can hold one.
	busyTimeout = 5 * time.Second
	// checkpointPages is how far the log grows before it is copied into the
	// database file, in pages of 4 KiB. The default of 1000 copies too often
	// for a store that writes all the time.
	checkpointPages = 4000
)

// OpenSQLite opens or creates the database file at path, which may carry
// driver parameters after a "?", takes the lock beside it (path + ".lock")
// and applies the migrations. Commits are durable when they return: WAL mode
// with synchronous=FULL (https://www.sqlite.org/pragma.html#pragma_synchronous).
//
// Errors are one line and name the file: another process has it open, its
// directory cannot be written, it is damaged or not a database at all.
func OpenSQLite(ctx context.Context, path string, migrations fs.FS) (*SQLite, error) {
	file, params, _ := strings.Cut(strings.TrimPrefix(path, "file:"), "?")
	if err := os.MkdirAll(filepath.Dir(file), 0o750); err != nil {
		return nil, fmt.Errorf("open database %s: %w", file, err)
	}
	lock := flock.New(file + ".lock")
	held, err := lock.TryLock()
	if err != nil {
		return nil, fmt.Errorf("open database %s: lock: %w", file, err)
	}
	if !held {
		return nil, fmt.Errorf("open database %s: another process has it open; stop that one, or give this one a file of its own (store.dsn)", file)
	}
	db := &SQLite{path: file, lock: lock}
	if err := db.open(ctx, file, params, migrations); err != nil {
		return nil, errors.Join(fmt.Errorf("open database %s: %w", file, explain(err)), db.Close())
	}
	return db, nil
}

func (db *SQLite) open(ctx context.Context, file, params string, migrations fs.FS) error {
	var err error
	if db.Write, err = sql.Open("sqlite", dsn(file, params, "journal_mode(WAL)", "synchronous(FULL)",
		fmt.Sprintf("wal_autocheckpoint(%d)", checkpointPages), "journal_size_limit(67108864)")); err != nil {
		return err
	}
	db.Write.SetMaxOpenConns(1)
	if err := db.Write.PingContext(ctx); err != nil {
		return err
	}
	if err := migrate(ctx, db.Write, migrations); err != nil {
		return err
	}
	if db.Read, err = sql.Open("sqlite", dsn(file, params, "query_only(true)")); err != nil {
		return err
	}
	db.Read.SetMaxOpenConns(readConnections)
	db.Read.SetMaxIdleConns(readConnections)
	return db.Read.PingContext(ctx)
}

// dsn builds the driver's connection string (modernc.org/sqlite, Driver.Open).
func dsn(file, params string, pragmas ...string) string {
	q := url.Values{"_txlock": {"immediate"}}
	q["_pragma"] = append([]string{fmt.Sprintf("busy_timeout(%d)", busyTimeout.Milliseconds())}, pragmas...)
	s := "file:" + (&url.URL{Path: file}).EscapedPath() + "?" + q.Encode()
	if params != "" {
		s += "&" + params
	}
	return s
}

// migrate brings the schema up to date.
func migrate(ctx context.Context, db *sql.DB, migrations fs.FS) error {
	provider, err := goose.NewProvider(goose.DialectSQLite3, db, migrations)
	if err != nil {
		return fmt.Errorf("read migrations: %w", err)
	}
	if _, err := provider.Up(ctx); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	return nil
}

// explain adds what to do to the errors of a damaged file.
func explain(err error) error {
	text := err.Error()
	if strings.Contains(text, "file is not a database") || strings.Contains(text, "malformed") {
		return fmt.Errorf("the file is damaged or is no SQLite database; restore it from a backup, or move it away to begin with an empty one: %w", err)
	}
	return err
}

// Close closes the connections and gives up the lock. It copies the log into
// the database file, so that the file alone is complete.
func (db *SQLite) Close() error {
	var errs []error
	if db.Read != nil {
		errs = append(errs, db.Read.Close())
	}
	if db.Write != nil {
		errs = append(errs, db.Write.Close())
	}
	// The lock file stays: deleting it would race with a process that has it
	// open and is about to lock it.
	errs = append(errs, db.lock.Unlock())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("close database %s: %w", db.path, err)
	}
	return nil
}
