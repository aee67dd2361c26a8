package pubsub

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/url"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	librarysql "github.com/ThreeDotsLabs/watermill-sql/v3/pkg/sql"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
)

// BackendSQL is PostgreSQL: messages outlive the process, any number of
// processes share the work of a consumer group, and there is no other server to
// run than the one that the orders may be in already.
const BackendSQL = "sql"

// SQLConfig holds the settings of the backend "sql".
type SQLConfig struct {
	// DSN is the database's address, postgres://user:password@host:5432/name.
	// No pooler may stand in between: sessions are kept, with their settings.
	// Default: empty, which package config replaces by store.dsn where that is
	// such an address.
	DSN string `koanf:"dsn"`
	// Prefix begins the names of all tables: lower-case letters, digits and
	// underscores, at most 40 of them. Default: sluice.
	Prefix string `koanf:"prefix"`
	// Timeout bounds a publish, from the call to the commit. Default: 10s.
	Timeout time.Duration `koanf:"timeout"`
}

func defaultSQLConfig() SQLConfig {
	return SQLConfig{Prefix: "sluice", Timeout: 10 * time.Second}
}

// prefixPattern is what needs no quotes in SQL and leaves room in the 63 bytes
// of a name.
var prefixPattern = regexp.MustCompile(`^[a-z_][a-z0-9_]{0,39}$`)

// validate returns every fault at once, or nil. Errors do not repeat the DSN,
// which may hold a password.
func (c SQLConfig) validate() error {
	var faults []error
	if fault := dsnFault(c.DSN); fault != "" {
		faults = append(faults, errors.New("pubsub.sql.dsn: "+fault))
	}
	if !prefixPattern.MatchString(c.Prefix) {
		faults = append(faults, fmt.Errorf("pubsub.sql.prefix: must be 1 to 40 characters of a-z, 0-9 and _, and begin with no digit, is %q", c.Prefix))
	}
	if c.Timeout <= 0 || c.Timeout > longestPublish {
		faults = append(faults, fmt.Errorf("pubsub.sql.timeout: must be above 0s and at most 10s, is %s", c.Timeout))
	}
	return errors.Join(faults...)
}

func dsnFault(dsn string) string {
	if dsn == "" {
		return "must be an address such as postgres://user:password@host:5432/database; it can stay empty where store.dsn is one"
	}
	if !IsPostgres(dsn) {
		return "must be an address such as postgres://user:password@host:5432/database"
	}
	if _, err := url.Parse(dsn); err != nil {
		return "is not a well-formed URL; special characters in a password are written as %XX"
	}
	if _, err := pgx.ParseConfig(dsn); err != nil {
		return fmt.Sprintf("cannot be used: %v", errors.Unwrap(err)) // the outer error shows the address
	}
	return ""
}

// IsPostgres reports whether a DSN is the address of a PostgreSQL database.
func IsPostgres(dsn string) bool {
	return strings.HasPrefix(dsn, "postgres://") || strings.HasPrefix(dsn, "postgresql://")
}

// What takes how long. Leases are the database's business and end by its clock
// (see sql_schema.go); these are this process's patience.
const (
	declareTimeout   = 10 * time.Second // of making tables, which waits for others who do
	claimTimeout     = 10 * time.Second // of one claim, after which its connection is given up
	lastClaimTimeout = 2 * time.Second  // of the one that is under way when the subscription ends
	settleTimeout    = 4 * time.Second  // of one statement for messages that are held: with heartbeatEvery, less than a lease
	healthTimeout    = 2 * time.Second  // or half of the configured timeout, if that is less
	flushTimeout     = 4 * time.Second  // for what is still to be written when the broker is closed
	retryEvery       = 500 * time.Millisecond
)

// sqlBroker is Watermill's SQL publisher and subscriber over tables of its own
// (sql_schema.go), one for each consumer group of a topic. Messages are claimed
// by lease, so that any number of them is in flight at a time, and deleted when
// they are acked.
type sqlBroker struct {
	db       *sql.DB
	names    sqlNames
	connect  *pgx.ConnConfig // for the connection that listens
	timeout  time.Duration   // of a Publish
	instance string          // tells our own notifications from those of others
	logger   *slog.Logger
	closing  <-chan struct{} // the PubSub's

	publisher *librarysql.Publisher
	outage    sqlOutage
	dirty     chan struct{} // holds an element when there is something in notify

	// life ends when the broker closes. It is the context of the goroutines,
	// which belong to nobody's call.
	life       context.Context
	end        context.CancelFunc
	goroutines sync.WaitGroup // all but the forwarders
	forwarders sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	groups  map[sqlGroup]sqlQueue // those that this process has declared
	topics  map[string]*sqlTopic  // those that it has published to
	sources map[*sqlSource]struct{}
	notify  map[sqlQueue]struct{} // queues whose consumers elsewhere are to be told
}

// openSQL connects, waiting for a database that is away until ctx ends, and
// makes the tables of the topology.
func openSQL(ctx context.Context, cfg SQLConfig, topology Topology, closing <-chan struct{}, logger *slog.Logger) (*sqlBroker, error) {
	connect, err := sqlConnConfig(cfg)
	if err != nil {
		return nil, err
	}
	life, end := context.WithCancel(context.WithoutCancel(ctx))
	b := &sqlBroker{
		db:       openPool(connect),
		names:    sqlNames{prefix: cfg.Prefix},
		connect:  connect,
		timeout:  cfg.Timeout,
		instance: uuid.NewString(),
		logger:   logger.With("host", connect.Host, "database", connect.Database),
		closing:  closing,
		dirty:    make(chan struct{}, 1),
		life:     life,
		end:      end,
		groups:   make(map[sqlGroup]sqlQueue),
		topics:   make(map[string]*sqlTopic),
		sources:  make(map[*sqlSource]struct{}),
		notify:   make(map[sqlQueue]struct{}),
	}
	b.outage.logger, b.outage.closing = b.logger, closing
	if b.publisher, err = librarysql.NewPublisher(sqlWriter{b.db, life, cfg.Timeout}, librarysql.PublisherConfig{SchemaAdapter: sqlInserts{b.names}}, nil); err != nil {
		return nil, errors.Join(err, b.close())
	}
	if err := b.prepare(ctx, topology); err != nil {
		return nil, errors.Join(err, b.close())
	}
	b.goroutines.Go(func() { b.listen(life) })
	b.goroutines.Go(func() { b.tell(life) })
	return b, nil
}

// place names what has the messages: PubSub.Place.
func (b *sqlBroker) place() string {
	return fmt.Sprintf("%s %s %s", BackendSQL, b.connect.Database, b.names.prefix)
}

// prepare waits for the database and makes the tables.
func (b *sqlBroker) prepare(ctx context.Context, topology Topology) error {
	if err := b.awaitDatabase(ctx); err != nil {
		return err
	}
	if err := migrate(ctx, b.db, b.names); err != nil {
		return err
	}
	var groups []sqlGroup
	for _, topic := range slices.Sorted(maps.Keys(topology)) { // so that queues have the same numbers everywhere
		for _, name := range topology[topic] {
			groups = append(groups, sqlGroup{topic: topic, name: name})
		}
	}
	return b.declare(ctx, groups...)
}

// declare makes the tables of the groups, and those that are missing although
// they were made before.
func (b *sqlBroker) declare(ctx context.Context, groups ...sqlGroup) error {
	queues, err := declare(ctx, b.db, b.names, groups)
	if err != nil {
		return err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	maps.Copy(b.groups, queues)
	return nil
}

// repair makes again what somebody has dropped while we were at work: empty
// tables for all groups. The messages in them are gone.
func (b *sqlBroker) repair(ctx context.Context) error {
	b.mu.Lock()
	groups := make([]sqlGroup, 0, len(b.groups))
	for group := range b.groups {
		groups = append(groups, group)
	}
	b.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, declareTimeout)
	defer cancel()
	b.logger.Warn("tables of the broker are missing and are made again; the messages in them are gone")
	if err := migrate(ctx, b.db, b.names); err != nil {
		return err
	}
	return b.declare(ctx, groups...)
}

// queue returns the table of a group. The database is asked only for a group
// that is new to this process.
func (b *sqlBroker) queue(ctx context.Context, group sqlGroup) (sqlQueue, error) {
	for range 2 {
		b.mu.Lock()
		queue, ok := b.groups[group]
		b.mu.Unlock()
		if ok {
			return queue, nil
		}
		ctx, cancel := context.WithTimeout(ctx, declareTimeout)
		err := b.declare(ctx, group)
		cancel()
		if err != nil {
			return 0, err
		}
	}
	return 0, errors.New("the group's table was dropped as soon as it was made")
}

func (b *sqlBroker) subscribe(ctx context.Context, d demand) (<-chan *message.Message, source, error) {
	if isClosed(b.closing) {
		return nil, nil, ErrClosed
	}
	group := sqlGroup{topic: d.topic, name: d.group}
	if _, err := b.queue(ctx, group); err != nil {
		return nil, nil, err
	}
	s := newSQLSource(b, group, d.maxInFlight)
	library, err := librarysql.NewSubscriber(s.claims, librarysql.SubscriberConfig{
		SchemaAdapter: s.claims, OffsetsAdapter: s.claims, BackoffManager: s.claims, AckDeadline: new(neverLate),
	}, nil)
	if err != nil {
		return nil, nil, err
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return nil, nil, ErrClosed
	}
	b.sources[s] = struct{}{}
	b.forwarders.Go(func() { s.forward(ctx, library) })
	b.goroutines.Go(func() { s.keep(b.life) })
	return s.out, s, nil
}

func (b *sqlBroker) remove(s *sqlSource) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.sources, s)
}

// health asks the database, and not a copy of it that cannot be written.
func (b *sqlBroker) health(ctx context.Context) error {
	if isClosed(b.closing) {
		return ErrClosed
	}
	ctx, cancel := context.WithTimeout(ctx, min(healthTimeout, b.timeout/2))
	defer cancel()
	var readOnly bool
	if err := b.db.QueryRowContext(ctx, `SELECT pg_is_in_recovery()`).Scan(&readOnly); err != nil {
		return fmt.Errorf("ask the database at %s: %w", b.connect.Host, oneLine(err))
	}
	if readOnly {
		return fmt.Errorf("the database at %s is a read-only standby", b.connect.Host)
	}
	return nil
}

// close writes what was acked, and gives back what was not, before it leaves.
func (b *sqlBroker) close() error {
	b.mu.Lock()
	b.closed = true
	topics := maps.Clone(b.topics) // which get no more
	b.mu.Unlock()
	b.forwarders.Wait() // no source gets anything from here on
	b.end()
	for _, t := range topics {
		t.batches.Close()
	}
	b.goroutines.Wait()
	if err := b.db.Close(); err != nil {
		return fmt.Errorf("close the connections to %s: %w", b.connect.Host, err)
	}
	return nil
}
