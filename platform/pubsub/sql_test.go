package pubsub_test

import (
	"context"
	"database/sql"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
	"sluice/platform/pubsub"
)

// sqlConfigs returns a function that configures a broker of its own with each
// call. They share a database, but no table.
func sqlConfigs(tb testing.TB) func() pubsub.Config {
	tb.Helper()
	dsn := services.Postgres(tb)
	var n atomic.Int64
	return func() pubsub.Config {
		cfg := pubsub.DefaultConfig()
		cfg.Backend = pubsub.BackendSQL
		cfg.SQL.DSN = dsn
		cfg.SQL.Prefix = fmt.Sprintf("broker%d", n.Add(1))
		return cfg
	}
}

// sqlConfig is a database with nothing in it.
func sqlConfig(tb testing.TB) pubsub.Config {
	tb.Helper()
	return sqlConfigs(tb)()
}

// onSQL runs a statement past the broker.
func onSQL(t testing.TB, cfg pubsub.Config, statement string, args ...any) {
	t.Helper()
	db := sqlDB(t, cfg)
	_, err := db.ExecContext(t.Context(), statement, args...)
	require.NoError(t, err)
	require.NoError(t, db.Close())
}

// askSQL returns the one number that a query gives.
func askSQL(t testing.TB, cfg pubsub.Config, query string, args ...any) int {
	t.Helper()
	db := sqlDB(t, cfg)
	var n int
	require.NoError(t, db.QueryRowContext(t.Context(), query, args...).Scan(&n))
	require.NoError(t, db.Close())
	return n
}

// sqlDB opens a database that the caller closes, or else the end of the test.
func sqlDB(t testing.TB, cfg pubsub.Config) *sql.DB {
	t.Helper()
	db, err := sql.Open("pgx", cfg.SQL.DSN)
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, db.Close()) })
	return db
}

// sqlTable is the table of a group's messages.
func sqlTable(t testing.TB, cfg pubsub.Config, topic, group string) string {
	t.Helper()
	return fmt.Sprintf("%s_queue_%d", cfg.SQL.Prefix,
		askSQL(t, cfg, `SELECT id FROM `+cfg.SQL.Prefix+`_groups WHERE topic = $1 AND consumer_group = $2`, topic, group))
}

// sqlWaiting is the number of messages that are due.
func sqlWaiting(t *testing.T, cfg pubsub.Config, topic, group string) int {
	t.Helper()
	return askSQL(t, cfg, `SELECT count(*) FROM `+sqlTable(t, cfg, topic, group)+` WHERE lease_until <= clock_timestamp()`)
}

// sqlBroker is PostgreSQL in the table of durable brokers.
func sqlBroker() durableBroker {
	return durableBroker{
		name:   pubsub.BackendSQL,
		config: func(t *testing.T) pubsub.Config { t.Helper(); return sqlConfig(t) },
		upstream: func(cfg pubsub.Config) string {
			u, _ := url.Parse(cfg.SQL.DSN) // it has been opened
			return u.Host
		},
		through: func(cfg pubsub.Config, proxy *services.Proxy) pubsub.Config {
			cfg.SQL.DSN = proxy.Rewrite(cfg.SQL.DSN)
			return cfg
		},
		impatient: func(cfg pubsub.Config, timeout time.Duration) pubsub.Config {
			cfg.SQL.Timeout = timeout
			return cfg
		},
		waiting: sqlWaiting,
		purge: func(t *testing.T, cfg pubsub.Config, topic, group string) {
			t.Helper()
			onSQL(t, cfg, `TRUNCATE `+sqlTable(t, cfg, topic, group))
		},
		remove: func(t *testing.T, cfg pubsub.Config, topic, group string) {
			t.Helper()
			onSQL(t, cfg, `DROP TABLE `+sqlTable(t, cfg, topic, group))
		},
	}
}

func TestSuiteOnSQL(t *testing.T) {
	config := sqlConfigs(t)
	suite(t, func(t *testing.T) *pubsub.PubSub {
		t.Helper()
		return open(t, config(), nil)
	})
}

var sqlTopology = pubsub.Topology{"topic": {"g"}}

func TestSQLConfig(t *testing.T) {
	t.Run("is refused with all faults at once, and without the password", func(t *testing.T) {
		cfg := pubsub.DefaultConfig()
		cfg.Backend = pubsub.BackendSQL
		cfg.SQL = pubsub.SQLConfig{Prefix: "1st", Timeout: -time.Second}
		for dsn, fault := range map[string]string{
			"":                                   "must be an address such as",
			"mysql://u:hunter2@h/d":              "must be an address such as",
			"host=h password=hunter2":            "must be an address such as",
			"postgres://u:hunter2%zz@h/d":        "is not a well-formed URL",
			"postgres://u:hunter2@h/d?sslmode=x": "cannot be used: sslmode is invalid",
		} {
			cfg.SQL.DSN = dsn
			err := cfg.Validate()
			require.ErrorContains(t, err, "pubsub.sql.dsn: "+fault)
			require.ErrorContains(t, err, `pubsub.sql.prefix: must be 1 to 40 characters of a-z, 0-9 and _, and begin with no digit, is "1st"`)
			require.ErrorContains(t, err, "pubsub.sql.timeout: must be above 0s and at most 10s, is -1s")
			require.NotContains(t, err.Error(), "hunter2")
			require.Len(t, strings.Split(err.Error(), "\n"), 3)
		}
	})

	t.Run("a database that refuses us is not waited for", func(t *testing.T) {
		cfg := sqlConfig(t)
		u, err := url.Parse(cfg.SQL.DSN)
		require.NoError(t, err)
		u.Path = "/no_such_database"
		cfg.SQL.DSN = u.String()
		_, err = pubsub.Open(t.Context(), cfg, nil, slog.New(slog.DiscardHandler))
		require.ErrorContains(t, err, "pubsub.sql.dsn")
		require.ErrorContains(t, err, "no_such_database")
	})
}

// Any bytes may come: one message that the database refused would fail all
// those that are published with it.
func TestSQLTakesAnyBytes(t *testing.T) {
	p := open(t, sqlConfig(t), sqlTopology)
	out := subscribe(t, p.Subscriber("g", 1), "topic")
	sent := message.NewMessage("\x00\xff", []byte{0})
	sent.Metadata = message.Metadata{"\x00": "\xff\xfe", "": "empty key", "ü": strings.Repeat("long ", 1000)}
	require.NoError(t, p.Publisher().Publish("topic", sent))
	got := receive(t, out)
	require.True(t, sent.Equals(got), "%v", got)
	got.Ack()
}

// Trap: above 21,845 messages, the stock schema has more parameters than a
// statement can.
func TestSQLPublishesAnyNumberOfMessagesAtOnce(t *testing.T) {
	cfg := sqlConfig(t)
	p := open(t, cfg, sqlTopology)
	publishMany(t, p, "topic", 30_000)
	require.Equal(t, 30_000, sqlWaiting(t, cfg, "topic", "g"))
}

// Trap: of the stock schema, a nacked message holds up all others of its group.
func TestSQLNackHoldsUpNobody(t *testing.T) {
	p := open(t, sqlConfig(t), sqlTopology)
	out := subscribe(t, p.Subscriber("g", 2), "topic")
	publishMany(t, p, "topic", 100)
	nacked := receive(t, out)
	nacked.Nack()
	for acked := 0; acked < 100; acked++ {
		msg := receive(t, out)
		require.Equal(t, msg.UUID == nacked.UUID, pubsub.Redelivered(msg))
		msg.Ack()
	}
}

// A publisher knows the groups of a topic from before; it must not miss one
// that another process declares.
func TestSQLGroupsOfOtherProcesses(t *testing.T) {
	cfg := sqlConfig(t)
	publisher := open(t, cfg, sqlTopology)
	require.ErrorIs(t, publisher.Publisher().Publish("unknown", newMessage("1", "")), pubsub.ErrNoSubscriber)
	publishMany(t, publisher, "topic", 1)

	billing := open(t, cfg, nil)
	late, unknown := subscribe(t, billing.Subscriber("billing", 1), "topic"), subscribe(t, billing.Subscriber("g", 1), "unknown")
	require.NoError(t, publisher.Publisher().Publish("topic", newMessage("later", "")))
	require.Equal(t, "later", receiveAcked(t, late))
	require.NoError(t, publisher.Publisher().Publish("unknown", newMessage("known", "")))
	require.Equal(t, "known", receiveAcked(t, unknown))
	require.Equal(t, 2, sqlWaiting(t, cfg, "topic", "g"), "each group has its own copy")
}

func TestSQLReplicasMayStartAtTheSameTime(t *testing.T) {
	cfg := sqlConfig(t)
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			p, err := pubsub.Open(t.Context(), cfg, pubsub.Topology{"topic": {"g", "h"}, "other": {"g"}}, slog.New(slog.DiscardHandler))
			if err != nil {
				t.Error(err)
				return
			}
			if err := p.Close(); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	require.Equal(t, 3, askSQL(t, cfg, `SELECT count(*) FROM `+cfg.SQL.Prefix+`_groups`))
}

// Trap: the poll of the library is once a second.
func TestSQLWakesOtherProcesses(t *testing.T) {
	cfg := sqlConfig(t)
	publisher, consumer := open(t, cfg, sqlTopology), open(t, cfg, sqlTopology)
	out := subscribe(t, consumer.Subscriber("g", 1), "topic")
	publishMany(t, publisher, "topic", 1)
	receiveAcked(t, out) // it listens, or will have polled
	const rounds = 20    // each would take most of a second
	began := time.Now()
	for range rounds {
		publishMany(t, publisher, "topic", 1)
		receiveAcked(t, out)
	}
	require.Less(t, time.Since(began), rounds*time.Second/4)
}

func TestSQLFewConnections(t *testing.T) {
	cfg := sqlConfig(t)
	p := open(t, cfg, sqlTopology)
	out := subscribe(t, p.Subscriber("g", 500), "topic")
	var publishers sync.WaitGroup
	for range 64 {
		publishers.Go(func() {
			for range 20 {
				if err := p.Publisher().Publish("topic", newMessage("1", "")); err != nil {
					t.Error(err)
				}
			}
		})
	}
	for i := range 64 * 20 {
		receiveAcked(t, out)
		if i%40 == 0 {
			require.LessOrEqual(t, sqlSessions(t, cfg), 8)
		}
	}
	publishers.Wait()
}

func sqlSessions(t *testing.T, cfg pubsub.Config) int {
	t.Helper()
	return askSQL(t, cfg, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sluice ' || $1`, cfg.SQL.Prefix)
}

// Trap: the stock schema gives out nothing that is newer than the oldest open
// transaction of the whole server.
func TestSQLUnrelatedTransactionsDelayNothing(t *testing.T) {
	cfg := sqlConfig(t)
	p := open(t, cfg, sqlTopology)
	out := subscribe(t, p.Subscriber("g", 8), "topic")
	holdTransaction(t, cfg)
	publishMany(t, p, "topic", 200)
	for range 200 {
		receiveAcked(t, out)
	}
	require.Eventually(t, func() bool {
		return askSQL(t, cfg, `SELECT count(*) FROM `+sqlTable(t, cfg, "topic", "g")) == 0
	}, patience, 10*time.Millisecond)
}

// holdTransaction leaves a transaction open that has read and written.
func holdTransaction(t *testing.T, cfg pubsub.Config) {
	t.Helper()
	tx, err := sqlDB(t, cfg).BeginTx(t.Context(), &sql.TxOptions{Isolation: sql.LevelRepeatableRead})
	require.NoError(t, err)
	_, err = tx.ExecContext(t.Context(), `CREATE TABLE unrelated AS SELECT 1`)
	require.NoError(t, err)
	t.Cleanup(func() { _ = tx.Rollback() }) // its context ended before
}

// While such a transaction is open, deleted rows cannot be removed. Claims must
// not step over all of them, each time.
func TestSQLClaimsDoNotReadWhatIsDeleted(t *testing.T) {
	const dead = 20_000
	cfg := sqlConfig(t)
	p := open(t, cfg, sqlTopology)
	sub := p.Subscriber("g", 500)
	out := subscribe(t, sub, "topic")
	holdTransaction(t, cfg)
	publishMany(t, p, "topic", dead)
	for range dead {
		receiveAcked(t, out)
	}
	table := sqlTable(t, cfg, "topic", "g")
	require.Eventually(t, func() bool { return askSQL(t, cfg, `SELECT count(*) FROM `+table) == 0 }, patience, 10*time.Millisecond)
	require.NoError(t, p.Close()) // its sessions tell their counts when they end
	reads := func() int {
		require.Eventually(t, func() bool { return sqlSessions(t, cfg) == 0 }, patience, 10*time.Millisecond)
		return askSQL(t, cfg, `SELECT idx_tup_read FROM pg_stat_user_indexes WHERE relname = $1`, table)
	}
	before := reads()

	p = open(t, cfg, sqlTopology)
	out = subscribe(t, p.Subscriber("g", 1), "topic")
	rounds := 0
	for began := time.Now(); time.Since(began) < 3*time.Second; rounds++ {
		publishMany(t, p, "topic", 1)
		receiveAcked(t, out)
	}
	require.NoError(t, p.Close())
	perRound := (reads() - before) / rounds
	t.Logf("%d index entries read for each of %d messages, with %d that are dead", perRound, rounds, dead)
	require.Less(t, perRound, dead/2, "there is a sweep now and then, and at the start")
}

// What a crash leaves behind is due when its lease ends, and its holder, if it
// is alive after all, has no say any more.
func TestSQLFence(t *testing.T) {
	cfg := sqlConfig(t)
	first, second := open(t, cfg, sqlTopology), open(t, cfg, sqlTopology)
	out := subscribe(t, first.Subscriber("g", 2), "topic")
	publishMany(t, first, "topic", 2)
	acked, nacked := receive(t, out), receive(t, out)
	table := sqlTable(t, cfg, "topic", "g")
	again := subscribe(t, second.Subscriber("g", 2), "topic")
	require.Eventually(t, func() bool { // the heartbeat may come in between
		onSQL(t, cfg, `UPDATE `+table+` SET lease_until = now() WHERE attempt = 1`)
		return askSQL(t, cfg, `SELECT count(*) FROM `+table+` WHERE attempt = 2`) == 2
	}, patience, 100*time.Millisecond)
	taken := []*message.Message{receive(t, again), receive(t, again)}
	for _, msg := range taken {
		require.True(t, pubsub.Redelivered(msg))
	}
	acked.Ack()
	nacked.Nack()
	require.NoError(t, first.Close()) // by now it has written what it had to
	require.Equal(t, 2, askSQL(t, cfg, `SELECT count(*) FROM `+table+` WHERE attempt = 2 AND lease_until > now()`))
	for _, msg := range taken {
		msg.Ack()
	}
	require.NoError(t, second.Close())
	require.Zero(t, askSQL(t, cfg, `SELECT count(*) FROM `+table))
}

// A handler may take longer than a lease.
func TestSQLLeasesAreExtended(t *testing.T) {
	t.Parallel() // it waits for heartbeats
	cfg := sqlConfig(t)
	first, second := open(t, cfg, sqlTopology), open(t, cfg, sqlTopology)
	out := subscribe(t, first.Subscriber("g", 1), "topic")
	publishMany(t, first, "topic", 1)
	held := receive(t, out)
	other := subscribe(t, second.Subscriber("g", 1), "topic")
	table := sqlTable(t, cfg, "topic", "g")
	began := askSQL(t, cfg, `SELECT extract(epoch FROM lease_until)::bigint FROM `+table)
	require.Eventually(t, func() bool {
		return askSQL(t, cfg, `SELECT extract(epoch FROM lease_until)::bigint FROM `+table) >= began+5
	}, patience, 100*time.Millisecond)
	requireNothing(t, other)
	held.Ack()
	require.NoError(t, first.Close())
	require.Zero(t, askSQL(t, cfg, `SELECT count(*) FROM `+table))
}

// An outage that lasts longer than a lease: what is with a handler is not taken
// for somebody else's afterwards, and the log has two lines.
func TestSQLOutage(t *testing.T) {
	t.Parallel() // it waits for a lease to end
	cfg := sqlConfig(t)
	table := func() string { return sqlTable(t, cfg, "topic", "g") }
	log := new(logBuffer)
	p, err := pubsub.Open(t.Context(), cfg, sqlTopology, slog.New(slog.NewTextHandler(log, nil)))
	require.NoError(t, err)
	out := subscribe(t, p.Subscriber("g", 4), "topic")
	publishMany(t, p, "topic", 2)
	held, acked := receive(t, out), receive(t, out)

	admit := refuseSessions(t, cfg)
	acked.Ack()
	require.Error(t, p.Publisher().Publish("topic", newMessage("lost", "")))
	require.Error(t, p.Health(t.Context()))
	requireNotReceived(t, out, time.After(11*time.Second))
	admit()

	require.Eventually(t, func() bool { return p.Publisher().Publish("topic", newMessage("again", "")) == nil }, patience, 10*time.Millisecond)
	require.Equal(t, "again", receiveAcked(t, out))
	require.Eventually(t, func() bool {
		return askSQL(t, cfg, `SELECT count(*) FROM `+table()) == 1
	}, patience, 10*time.Millisecond)
	require.Zero(t, sqlWaiting(t, cfg, "topic", "g"), "the lease is extended")
	held.Ack()
	require.Eventually(t, func() bool { return strings.Contains(log.String(), "works again") }, patience, time.Millisecond)
	require.NoError(t, p.Close())
	require.Zero(t, askSQL(t, cfg, `SELECT count(*) FROM `+table()))
	require.Equal(t, 2, strings.Count(log.String(), "\n"), log.String())
}

// refuseSessions ends all sessions and refuses new ones, until the function that
// it returns is called.
func refuseSessions(t *testing.T, cfg pubsub.Config) (admit func()) {
	t.Helper()
	u, err := url.Parse(cfg.SQL.DSN)
	require.NoError(t, err)
	database := strings.TrimPrefix(u.Path, "/")
	u.Path = "/postgres"
	server := cfg
	server.SQL.DSN = u.String()
	onSQL(t, server, `ALTER DATABASE `+database+` ALLOW_CONNECTIONS false`)
	onSQL(t, server, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = $1`, database)
	return func() { onSQL(t, server, `ALTER DATABASE `+database+` ALLOW_CONNECTIONS true`) }
}

func requireNotReceived(t *testing.T, out <-chan *message.Message, end <-chan time.Time) {
	t.Helper()
	select {
	case msg := <-out:
		require.FailNow(t, "a message was handed out", "%v", msg)
	case <-end:
	}
}

// What was claimed and not handed out was not delivered.
func TestSQLDrainGivesBackWhatNobodyGot(t *testing.T) {
	cfg := sqlConfig(t)
	first, second := open(t, cfg, sqlTopology), open(t, cfg, sqlTopology)
	publishMany(t, first, "topic", 50)
	sub := first.Subscriber("g", 20)
	out := subscribe(t, sub, "topic")
	held := receive(t, out)
	table := sqlTable(t, cfg, "topic", "g")
	require.Eventually(t, func() bool {
		return askSQL(t, cfg, `SELECT count(*) FROM `+table+` WHERE attempt = 1`) == 20
	}, patience, time.Millisecond)
	drained := drain(sub)
	require.Eventually(t, func() bool { return sqlWaiting(t, cfg, "topic", "g") == 49 }, patience, time.Millisecond)
	require.Equal(t, 49, askSQL(t, cfg, `SELECT count(*) FROM `+table+` WHERE attempt = 0`))

	other := subscribe(t, second.Subscriber("g", 49), "topic")
	for range 49 {
		msg := receive(t, other)
		require.False(t, pubsub.Redelivered(msg))
		msg.Ack()
	}
	held.Ack()
	require.NoError(t, receiveError(t, drained))
}

// A busy process does not keep messages that an idle one could have.
func TestSQLClaimsNoMoreThanThereIsRoomFor(t *testing.T) {
	cfg := sqlConfig(t)
	busy, idle := open(t, cfg, sqlTopology), open(t, cfg, sqlTopology)
	out := subscribe(t, busy.Subscriber("g", 1), "topic")
	publishMany(t, busy, "topic", 2)
	held := receive(t, out)
	other := subscribe(t, idle.Subscriber("g", 1), "topic")
	receiveAcked(t, other)
	held.Ack()
}

// Messages leave nothing behind.
func TestSQLTablesDoNotGrow(t *testing.T) {
	const messages, round = 100_000, 10_000
	cfg := sqlConfig(t)
	p := open(t, cfg, sqlTopology)
	sub := p.Subscriber("g", 500)
	out := subscribe(t, sub, "topic")
	table := sqlTable(t, cfg, "topic", "g")
	size := func() int { return askSQL(t, cfg, `SELECT pg_total_relation_size($1::regclass)`, table) }
	empty, largest := size(), 0
	for range messages / round {
		publishMany(t, p, "topic", round)
		for range round {
			receiveAcked(t, out)
		}
		largest = max(largest, size())
	}
	requireIdle(t, sub)
	// The queue is tidied while others publish to it: nothing may be lost.
	sent, received := 0, 0
	require.Eventually(t, func() bool {
		publishMany(t, p, "topic", 3)
		sent += 3
		for range 3 {
			receiveAcked(t, out)
			received++
		}
		return size() <= 2*empty+64<<10 // and what these took
	}, patience, 10*time.Millisecond)
	require.Equal(t, sent, received)
	t.Logf("empty %d, at most %d, in the end %d bytes", empty, largest, size())
	require.Greater(t, largest, 4<<20, "there was something to tidy")
}

func TestSQLSurvivesTheEndOfItsSessions(t *testing.T) {
	const messages = 2000
	cfg := sqlConfig(t)
	p := open(t, cfg, sqlTopology)
	out := subscribe(t, p.Subscriber("g", 32), "topic")
	ctx, cancel := context.WithCancel(t.Context())
	var ended sync.WaitGroup
	db := sqlDB(t, cfg)
	ended.Go(func() {
		for range 5 {
			_, _ = db.ExecContext(ctx, `SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'sluice ' || $1`, cfg.SQL.Prefix)
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	ids := make(chan string, messages)
	ended.Go(func() {
		for range messages / 10 {
			id := uuid.NewString()
			for p.Publisher().Publish("topic", newMessage(id, "")) != nil && ctx.Err() == nil {
			}
			ids <- id
		}
		close(ids)
	})
	seen := make(map[string]bool)
	for id := range ids {
		for !seen[id] {
			seen[receiveAcked(t, out)] = true
		}
	}
	cancel()
	ended.Wait()
}
