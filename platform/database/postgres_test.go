package database_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
	"sluice/platform/database"
)

// postgresMigrations fail if they are applied twice, and take a moment.
var postgresMigrations = fstest.MapFS{"00001_t.sql": {Data: []byte("-- +goose Up\nSELECT pg_sleep(0.1);\nCREATE TABLE t (v int);\n-- +goose Down\nDROP TABLE t;\n")}}

func openPostgres(ctx context.Context, dsn string, log io.Writer) (*database.Postgres, error) {
	return database.OpenPostgres(ctx, database.PostgresConfig{DSN: dsn, Migrations: postgresMigrations, Logger: slog.New(slog.NewTextHandler(log, nil))})
}

func TestPostgresIsMigratedOnceByRacingProcesses(t *testing.T) {
	dsn := services.Postgres(t)
	var processes sync.WaitGroup
	for range 4 {
		processes.Go(func() {
			db, err := openPostgres(context.Background(), dsn, io.Discard)
			if err != nil {
				t.Error(err)
				return
			}
			if err := db.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	processes.Wait()
	db, err := openPostgres(t.Context(), dsn, io.Discard)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	require.NoError(t, db.Read(t.Context(), func(ctx context.Context, conn *pgx.Conn) error {
		_, err := conn.Exec(ctx, `SELECT v FROM t`)
		return err
	}))
}

func TestPostgresConnectionsHaveLimitsThatTheDSNCanChange(t *testing.T) {
	dsn := services.Postgres(t)
	setting := func(dsn, name string, read bool) (value string) {
		db, err := openPostgres(t.Context(), dsn, io.Discard)
		require.NoError(t, err)
		defer func() { require.NoError(t, db.Close()) }()
		ask := db.Write
		if read {
			ask = db.Read
		}
		require.NoError(t, ask(t.Context(), func(ctx context.Context, conn *pgx.Conn) error {
			return conn.QueryRow(ctx, `SELECT current_setting($1)`, name).Scan(&value)
		}))
		return value
	}
	require.Equal(t, "5s", setting(dsn, "statement_timeout", true))
	require.Equal(t, "10s", setting(dsn, "statement_timeout", false))
	require.Equal(t, "sluice", setting(dsn, "application_name", false))
	require.Equal(t, "5s", setting(dsn+"&statement_timeout=5000", "statement_timeout", false))
}

func TestPostgresErrorsAreOneLineThatSaysWhatToDo(t *testing.T) {
	dsn := services.Postgres(t)
	changed := func(change func(*url.URL)) string {
		u, err := url.Parse(dsn)
		require.NoError(t, err)
		u.User = url.UserPassword(u.User.Username(), "hunter2")
		change(u)
		return u.String()
	}
	for name, test := range map[string]struct{ dsn, want string }{
		"unknown database": {changed(func(u *url.URL) { u.Path = "/no_such_database" }), `there is no database "no_such_database"; create it`},
		"unknown user":     {changed(func(u *url.URL) { u.User = url.UserPassword("no_such_user", "hunter2") }), `the server refuses user "no_such_user"`},
		"no URL":           {"host=localhost password=hunter2", "is not a URL such as postgres://"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := openPostgres(t.Context(), test.dsn, io.Discard)
			require.ErrorContains(t, err, "open database")
			require.ErrorContains(t, err, test.want)
			require.NotContains(t, err.Error(), "hunter2")
			require.NotContains(t, err.Error(), "\n")
		})
	}
}

func TestPostgresThatDoesNotAnswerIsWaitedForUntilTheContextEnds(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	address := listener.Addr().String()
	require.NoError(t, listener.Close()) // nobody is there any more
	ctx, cancel := context.WithTimeout(t.Context(), 700*time.Millisecond)
	defer cancel()
	var log lockedLog
	_, err = openPostgres(ctx, "postgres://sluice:hunter2@"+address+"/orders", &log)
	require.ErrorContains(t, err, "open database "+address+"/orders: the server is not reachable; start it, or correct the host and port in store.dsn")
	require.NotContains(t, err.Error()+log.String(), "hunter2")
	require.NotContains(t, err.Error(), "\n")
	require.Equal(t, 1, strings.Count(log.String(), "\n"), log.String())
}

func TestPostgresIsOpenedWhenItComesUp(t *testing.T) {
	u, err := url.Parse(services.Postgres(t))
	require.NoError(t, err)
	server := u.Host
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	u.Host = listener.Addr().String()

	var log lockedLog
	opened := make(chan error, 1)
	go func() {
		db, err := openPostgres(t.Context(), u.String(), &log)
		if err == nil {
			err = db.Close()
		}
		opened <- err
	}()
	var up atomic.Bool
	var links sync.WaitGroup
	defer links.Wait()
	defer func() { _ = listener.Close() }()
	links.Go(func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			if !up.Load() {
				_ = client.Close()
				continue
			}
			links.Go(func() { link(client, server) })
		}
	})
	require.Eventually(t, func() bool { return strings.Contains(log.String(), "does not answer") }, 20*time.Second, time.Millisecond)
	up.Store(true)
	require.NoError(t, <-opened)
	lines := strings.Split(strings.TrimSpace(log.String()), "\n")
	require.Len(t, lines, 2)
	require.Contains(t, lines[1], "PostgreSQL answers")
}

// link connects a client with the server until one of them goes.
func link(client net.Conn, server string) {
	defer func() { _ = client.Close() }()
	conn, err := net.Dial("tcp", server)
	if err != nil {
		return
	}
	defer func() { _ = conn.Close() }()
	go func() {
		_, _ = io.Copy(conn, client)
		_ = conn.Close()
	}()
	_, _ = io.Copy(client, conn)
}

func TestPostgresTriesAgainWhatMayPass(t *testing.T) {
	db, err := openPostgres(t.Context(), services.Postgres(t), io.Discard)
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	for name, test := range map[string]struct {
		fail  func(*pgx.Conn) error
		tries int
	}{
		"deadlock":        {func(*pgx.Conn) error { return &pgconn.PgError{Code: "40P01"} }, 3},
		"lost connection": {func(c *pgx.Conn) error { return fmt.Errorf("lost: %w", c.Close(context.Background())) }, 3},
		"fault":           {func(*pgx.Conn) error { return &pgconn.PgError{Code: "22P02"} }, 1},
		"uncertain commit": {func(c *pgx.Conn) error {
			return fmt.Errorf("%w: %w", database.ErrUncertain, c.Close(context.Background()))
		}, 1},
	} {
		t.Run(name, func(t *testing.T) {
			tries := 0
			err := db.Write(t.Context(), func(ctx context.Context, conn *pgx.Conn) error {
				if tries++; tries == 3 {
					return nil
				}
				if _, err := conn.Exec(ctx, `BEGIN`); err != nil {
					return err
				}
				return test.fail(conn)
			})
			require.Equal(t, test.tries, tries)
			require.Equal(t, test.tries == 3, err == nil)
			require.NoError(t, db.Write(t.Context(), func(_ context.Context, conn *pgx.Conn) error {
				require.Equal(t, byte('I'), conn.PgConn().TxStatus(), "a transaction was left open")
				return nil
			}))
		})
	}
}

// lockedLog is a log that is written and read at the same time.
type lockedLog struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lockedLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(p)
}

func (l *lockedLog) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}
