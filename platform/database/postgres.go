package database

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"net/url"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
	"github.com/pressly/goose/v3"
	"github.com/pressly/goose/v3/lock"
)

// PostgresConfig says which database to open, and for whom.
type PostgresConfig struct {
	// DSN is a URL, postgres://user:password@host:port/database?name=value.
	// Its parameters go before what OpenPostgres would set.
	DSN string
	// Migrations are applied at opening, by one process at a time.
	Migrations fs.FS
	// Settings are parameters of the server (SET name = value) for every
	// connection.
	Settings map[string]string
	// Logger is told when the server has to be waited for.
	Logger *slog.Logger
}

// Postgres is an open PostgreSQL database. It is safe for concurrent use.
type Postgres struct {
	write, read *sql.DB
	listen      *pgx.ConnConfig // of Listen
	place       string          // host:port/database, for errors
}

const (
	// A server that several processes share has 100 connections by default.
	postgresWriteConnections = 8
	postgresReadConnections  = 8
	postgresIdleTime         = 5 * time.Minute

	postgresConnectTimeout = 3 * time.Second
	postgresConnectPause   = 500 * time.Millisecond

	// postgresReadTimeout and postgresWriteTimeout bound one call of Read or
	// Write, and each statement in it. They end what would hang for ever.
	postgresReadTimeout  = 5 * time.Second
	postgresWriteTimeout = 10 * time.Second
	// postgresSilence is how long a connection may say nothing, with something
	// asked of it, until the network counts as cut.
	postgresSilence = 10 * time.Second

	// postgresTries is how often Read and Write call their function at most.
	// After a restart of the server every idle connection can cost one.
	postgresTries = 2 + postgresWriteConnections
	// postgresPause is the mean pause after the first try; it grows with each.
	postgresPause = 2 * time.Millisecond

	// migrationLock is the key of the advisory lock that a migrating process
	// holds. Any number will do, as long as nobody else has it.
	migrationLock = 0x736c75696365 // "sluice"
	// migrationPatience is how many seconds a process waits for another one's
	// migrations.
	migrationPatience = 600
)

// ErrUncertain is in the chain of an error after which nobody knows whether the
// transaction was committed: the connection was lost during the commit.
var ErrUncertain = errors.New("the connection was lost during the commit, which may have happened")

// CheckPostgresDSN reports what is wrong with a DSN, without repeating any of
// it: there may be a password in it.
func CheckPostgresDSN(dsn string) error {
	_, err := parsePostgres(dsn)
	return err
}

// OpenPostgres opens the database and applies the migrations. While the server
// cannot be reached or is starting up, it waits until ctx ends, and tells the
// logger once. Everything else is an error at once: one line that names the
// server and the database, says what to do, and holds no password.
//
// Processes that open the same database at the same time migrate one after the
// other (goose's session lock). A connection pooler in front of the server must
// be in session mode.
func OpenPostgres(ctx context.Context, cfg PostgresConfig) (*Postgres, error) {
	conf, err := parsePostgres(cfg.DSN)
	if err != nil {
		return nil, fmt.Errorf("open database: %w", err)
	}
	db := &Postgres{place: fmt.Sprintf("%s/%s", net.JoinHostPort(conf.Host, fmt.Sprint(conf.Port)), conf.Database)}
	if err := db.open(ctx, conf, cfg); err != nil {
		return nil, errors.Join(fmt.Errorf("open database %s: %w", db.place, explainPostgres(err, conf)), db.Close())
	}
	return db, nil
}

func (db *Postgres) open(ctx context.Context, conf *pgx.ConnConfig, cfg PostgresConfig) error {
	db.write = postgresPool(conf, cfg.Settings, postgresWriteTimeout, postgresWriteConnections)
	db.read = postgresPool(conf, cfg.Settings, postgresReadTimeout, postgresReadConnections)
	db.listen = postgresConnection(conf, cfg.Settings, postgresReadTimeout)
	if err := db.await(ctx, cfg.Logger); err != nil {
		return err
	}
	var encoding string
	if err := db.read.QueryRowContext(ctx, "SHOW server_encoding").Scan(&encoding); err != nil {
		return err
	}
	if encoding != "UTF8" {
		return fmt.Errorf("its encoding is %s, which does not hold every text; create it with ENCODING 'UTF8'", encoding)
	}
	// A migration takes as long as it takes.
	migrating := postgresPool(conf, cfg.Settings, 0, 1)
	return errors.Join(migratePostgres(ctx, migrating, cfg.Migrations), migrating.Close())
}

// postgresPool returns connections whose statements take no longer than limit,
// or as long as they like if it is 0. It does not connect.
func postgresPool(conf *pgx.ConnConfig, settings map[string]string, limit time.Duration, size int) *sql.DB {
	pool := stdlib.OpenDB(*postgresConnection(conf, settings, limit))
	pool.SetMaxOpenConns(size)
	pool.SetMaxIdleConns(size)
	pool.SetConnMaxIdleTime(postgresIdleTime)
	return pool
}

// postgresConnection returns how to connect.
func postgresConnection(conf *pgx.ConnConfig, settings map[string]string, limit time.Duration) *pgx.ConnConfig {
	conf = conf.Copy()
	ours := map[string]string{
		"application_name":  "sluice",
		"statement_timeout": fmt.Sprint(limit.Milliseconds()),
		// What a vanished process had locked is free again after this.
		"idle_in_transaction_session_timeout": fmt.Sprint(postgresWriteTimeout.Milliseconds()),
		// A statement sees what others committed before it began. Stores rely
		// on that, whatever the default of the server is.
		"default_transaction_isolation": "read committed",
	}
	maps.Copy(ours, settings)
	maps.Copy(ours, conf.RuntimeParams) // the DSN has the last word
	conf.RuntimeParams = ours
	conf.DialFunc = postgresDialer().DialContext
	return conf
}

// postgresDialer notices a cut network, with a question under way or without.
func postgresDialer() *net.Dialer {
	return &net.Dialer{
		KeepAliveConfig: net.KeepAliveConfig{Enable: true, Idle: postgresSilence / 2, Interval: postgresSilence / 5, Count: 3},
		Control:         boundSilence(postgresSilence),
	}
}

func parsePostgres(dsn string) (*pgx.ConnConfig, error) {
	u, err := url.Parse(dsn)
	if err != nil || (u.Scheme != "postgres" && u.Scheme != "postgresql") {
		// The parser's own words can have a part of the password in them.
		return nil, errors.New("is not a URL such as postgres://user:password@host:5432/database; in the password, characters such as / ? # @ % must be percent-encoded")
	}
	conf, err := pgx.ParseConfig(dsn)
	if err != nil {
		if cause := errors.Unwrap(err); cause != nil {
			err = cause
		} else {
			err = errors.New("a parameter is not valid")
		}
		return nil, fmt.Errorf("is not understood: %w", err)
	}
	if !u.Query().Has("connect_timeout") {
		conf.ConnectTimeout = postgresConnectTimeout
	}
	return conf, nil
}

// await returns when the server answers, or says what will not get better.
func (db *Postgres) await(ctx context.Context, logger *slog.Logger) error {
	for waiting := false; ; waiting = true {
		err := db.write.PingContext(ctx)
		switch {
		case err == nil && waiting:
			logger.Info("PostgreSQL answers", "database", db.place)
			return nil
		case err == nil || !absent(err):
			return err
		case !waiting:
			logger.Warn("PostgreSQL does not answer; waiting for it", "database", db.place, "error", oneLine(err))
		}
		if pause(ctx, postgresConnectPause); ctx.Err() != nil {
			return err
		}
	}
}

// absent reports whether a server could not be reached, or not yet: one that
// refuses us will do so again.
func absent(err error) bool {
	if refusal, ok := errors.AsType[*pgconn.PgError](err); ok {
		return refusal.Code == cannotConnectNow || refusal.Code == tooManyConnections
	}
	_, network := errors.AsType[net.Error](err)
	return network || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
}

// The conditions that are told apart
// (https://www.postgresql.org/docs/current/errcodes-appendix.html).
const (
	serializationFailure = "40001"
	deadlockDetected     = "40P01"
	uniqueViolation      = "23505"
	adminShutdown        = "57P01"
	crashShutdown        = "57P02"
	cannotConnectNow     = "57P03"
	tooManyConnections   = "53300"
	unknownDatabase      = "3D000"
	wrongPassword        = "28P01"
	notAuthorized        = "28000"
	notPermitted         = "42501"
)

func migratePostgres(ctx context.Context, db *sql.DB, migrations fs.FS) error {
	locker, err := lock.NewPostgresSessionLocker(lock.WithLockID(migrationLock), lock.WithLockTimeout(1, migrationPatience))
	if err != nil {
		return fmt.Errorf("lock migrations: %w", err)
	}
	provider, err := goose.NewProvider(goose.DialectPostgres, db, migrations, goose.WithSessionLocker(locker))
	if err != nil {
		return fmt.Errorf("read migrations: %w", err)
	}
	if _, err := provider.Up(ctx); err != nil {
		return fmt.Errorf("migrate: %w", err)
	}
	return nil
}

// explainPostgres says what to do, in one line.
func explainPostgres(err error, conf *pgx.ConnConfig) error {
	if refusal, ok := errors.AsType[*pgconn.PgError](err); ok {
		switch refusal.Code {
		case unknownDatabase:
			return fmt.Errorf("there is no database %q; create it (CREATE DATABASE), or correct store.dsn", conf.Database)
		case wrongPassword, notAuthorized:
			return fmt.Errorf("the server refuses user %q; correct the user or the password in store.dsn: %s", conf.User, refusal.Message)
		case notPermitted:
			return fmt.Errorf("user %q may not do what is needed; make it the owner of the database: %s", conf.User, refusal.Message)
		}
	}
	if absent(err) {
		return fmt.Errorf("the server is not reachable; start it, or correct the host and port in store.dsn: %w", oneLine(err))
	}
	return oneLine(err)
}

// oneLine shortens the error of a connection, which names every address of the
// host with and without TLS, a line each, to the first that says what happened.
func oneLine(err error) error {
	if failure, ok := errors.AsType[*net.OpError](err); ok {
		return failure
	}
	text := err.Error()
	if !strings.Contains(text, "\n") {
		return err
	}
	return errors.New(strings.Join(strings.Fields(text), " "))
}

// Read calls do with a connection for reading. See Write.
func (db *Postgres) Read(ctx context.Context, do func(context.Context, *pgx.Conn) error) error {
	return run(ctx, db.read, postgresReadTimeout, do)
}

// Write calls do with a connection for writing. It waits for a free connection,
// and for do, until ctx ends, but no longer than 10 seconds (Read: 5).
//
// Where do failed because of a deadlock, because another transaction had just
// taken what is unique, or because its connection was lost, it is called again,
// at most ten times in all. It must therefore not matter if
// it ran once more, even to its end; where that does matter, do has ErrUncertain
// in its error. An unfinished transaction is rolled back. When the server cannot
// be reached, the error comes at once.
func (db *Postgres) Write(ctx context.Context, do func(context.Context, *pgx.Conn) error) error {
	return run(ctx, db.write, postgresWriteTimeout, do)
}

func run(ctx context.Context, pool *sql.DB, limit time.Duration, do func(context.Context, *pgx.Conn) error) error {
	// The server ends a slow statement first, which spares the connection.
	ctx, cancel := context.WithTimeout(ctx, limit+time.Second)
	defer cancel()
	for try := 1; ; try++ {
		repeat, err := runOnce(ctx, pool, do)
		if err == nil || !repeat || try == postgresTries || ctx.Err() != nil {
			return err
		}
		// A random pause, so that two who were in each other's way are not again.
		pause(ctx, rand.N(2*time.Duration(try)*postgresPause))
	}
}

// runOnce calls do, and reports whether it might succeed on a second try.
func runOnce(ctx context.Context, pool *sql.DB, do func(context.Context, *pgx.Conn) error) (repeat bool, err error) {
	conn, err := pool.Conn(ctx)
	if err != nil {
		return false, fmt.Errorf("connect: %w", oneLine(err))
	}
	// Given back, a lost connection, or one with a transaction, is dropped.
	defer func() { _ = conn.Close() }()
	err = conn.Raw(func(driver any) error {
		c := driver.(*stdlib.Conn).Conn()
		err := do(ctx, c)
		if err != nil {
			rollback(ctx, c)
			repeat = !errors.Is(err, ErrUncertain) && (c.IsClosed() || passing(err))
		}
		return err
	})
	return repeat, err
}

// rollback ends a transaction that was left open. If that fails, so will the
// next use of the connection, which is then dropped.
func rollback(ctx context.Context, conn *pgx.Conn) {
	if !conn.IsClosed() && conn.PgConn().TxStatus() != 'I' {
		_, _ = conn.Exec(ctx, "ROLLBACK")
	}
}

// passing reports whether the server refused something that it may accept next
// time.
func passing(err error) bool {
	refusal, ok := errors.AsType[*pgconn.PgError](err)
	if !ok {
		return false
	}
	switch refusal.Code {
	case serializationFailure, deadlockDetected, uniqueViolation, adminShutdown, crashShutdown:
		return true
	default:
		return false
	}
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// Close closes the connections. It waits for what is under way on them.
func (db *Postgres) Close() error {
	if err := errors.Join(db.read.Close(), db.write.Close()); err != nil {
		return fmt.Errorf("close database %s: %w", db.place, err)
	}
	return nil
}
