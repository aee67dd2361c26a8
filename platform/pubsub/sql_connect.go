package pubsub

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/stdlib"
)

// poolSize is the number of connections, whatever the concurrency; one more
// listens. A claim, a delete and a heartbeat each take one for a moment.
const poolSize = 7

const connectTimeout = 5 * time.Second

// sqlConnConfig is the DSN with what our sessions need.
func sqlConnConfig(cfg SQLConfig) (*pgx.ConnConfig, error) {
	connect, err := pgx.ParseConfig(cfg.DSN)
	if err != nil {
		return nil, errors.New("pubsub.sql.dsn: " + dsnFault(cfg.DSN))
	}
	if connect.ConnectTimeout == 0 {
		connect.ConnectTimeout = connectTimeout
	}
	for name, value := range map[string]string{
		"application_name": "sluice " + cfg.Prefix,
		// Whatever is lost on the way, the server does not go on for ever, and
		// a frozen process does not keep rows locked.
		"statement_timeout":                   milliseconds(max(cfg.Timeout, declareTimeout)),
		"idle_in_transaction_session_timeout": milliseconds(claimTimeout),
		// A plan that was made while a queue was empty is kept after a million
		// messages have come. Only one is right for both: by the index.
		"enable_seqscan":    "off",
		"enable_bitmapscan": "off",
		"jit":               "off", // it would take such a plan for a costly one
	} {
		if _, set := connect.RuntimeParams[name]; !set {
			connect.RuntimeParams[name] = value
		}
	}
	return connect, nil
}

func milliseconds(d time.Duration) string { return strconv.FormatInt(d.Milliseconds(), 10) }

func openPool(connect *pgx.ConnConfig) *sql.DB {
	db := stdlib.OpenDB(*connect)
	db.SetMaxOpenConns(poolSize)
	db.SetMaxIdleConns(poolSize)
	return db
}

// awaitDatabase returns when the database answers. What waiting does not mend
// is an error at once.
func (b *sqlBroker) awaitDatabase(ctx context.Context) error {
	for {
		attempt, cancel := context.WithTimeout(ctx, 2*connectTimeout)
		err := b.db.PingContext(attempt)
		cancel()
		switch {
		case err == nil:
			b.outage.over(b)
			return nil
		case isRefusal(err):
			return fmt.Errorf("the database refuses us (pubsub.sql.dsn): %w", oneLine(err))
		}
		b.outage.begin(b, err)
		timer := time.NewTimer(retryEvery)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return fmt.Errorf("the database at %s does not answer (pubsub.sql.dsn): %w: %w", b.connect.Host, ctx.Err(), oneLine(err))
		}
	}
}

// isRefusal reports whether the server answered, and will not answer anything
// else the next time.
func isRefusal(err error) bool {
	var answer *pgconn.PgError
	if !errors.As(err, &answer) {
		return false
	}
	switch answer.Code {
	case "28000", "28P01", // wrong user or password, not in pg_hba.conf
		"3D000",                   // no such database
		"42501",                   // no permission to connect
		"42704", "22023", "42602": // a parameter that this server does not know
		return true
	default:
		return false
	}
}

func isUndefinedTable(err error) bool {
	var answer *pgconn.PgError
	return errors.As(err, &answer) && answer.Code == "42P01"
}

// oneLineError is an error of several lines, as the driver has them, on one.
type oneLineError struct{ error }

func oneLine(err error) error { return oneLineError{err} }

func (e oneLineError) Error() string { return strings.Join(strings.Fields(e.error.Error()), " ") }

func (e oneLineError) Unwrap() error { return e.error }

// sqlOutage tells the log once that the database is lost, and once that it is
// back, however many goroutines try again and again in between.
type sqlOutage struct {
	logger  *slog.Logger
	closing <-chan struct{} // after which nothing is to be told

	mu      sync.Mutex
	failing map[any]struct{} // who cannot work
	since   time.Time
}

// begin says that who cannot work. The end of a context is not the database's
// fault.
func (o *sqlOutage) begin(who any, err error) {
	if errors.Is(err, context.Canceled) || isClosed(o.closing) {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.failing) == 0 {
		o.failing = make(map[any]struct{})
		o.since = time.Now()
		o.logger.Warn("the broker's database does not work; trying again until it does", "error", oneLine(err))
	}
	o.failing[who] = struct{}{}
}

// over says that who works again, or is gone.
func (o *sqlOutage) over(who any) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if _, ok := o.failing[who]; !ok {
		return
	}
	delete(o.failing, who)
	if len(o.failing) == 0 && !isClosed(o.closing) {
		o.logger.Info("the broker's database works again", "after", time.Since(o.since).Round(time.Millisecond))
	}
}
