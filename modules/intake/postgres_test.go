package intake

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/jackc/pgx/v5"
	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
	"sluice/modules/contract"
)

func postgresUnderTest() storeUnderTest {
	dsns := map[store]string{}
	openAt := func(t *testing.T, dsn string) store {
		s := openPostgres(t, dsn)
		dsns[s] = dsn
		return s
	}
	return storeUnderTest{
		name: "postgres", shared: true,
		open: func(t *testing.T) store { return openAt(t, services.Postgres(t)) },
		reopen: func(t *testing.T, s store) store {
			require.NoError(t, s.close())
			return openAt(t, dsns[s])
		},
	}
}

// openPostgres opens a store; who calls it closes it.
func openPostgres(t testing.TB, dsn string) *postgresStore {
	t.Helper()
	s, err := openPostgresStore(t.Context(), dsn, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	return s
}

// openTwice opens a database as two processes would.
func openTwice(t testing.TB) (one, two *postgresStore, dsn string) {
	t.Helper()
	dsn = services.Postgres(t)
	one, two = openPostgres(t, dsn), openPostgres(t, dsn)
	t.Cleanup(func() { require.NoError(t, errors.Join(one.close(), two.close())) })
	return one, two, dsn
}

// askPostgres reads one value past the store.
func askPostgres[T any](t testing.TB, dsn, statement string, args ...any) (value T) {
	t.Helper()
	conn, err := pgx.Connect(t.Context(), dsn)
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close(context.Background())) }()
	require.NoError(t, conn.QueryRow(t.Context(), statement, args...).Scan(&value))
	return value
}

// requireTrueCounts compares what the stores say with what there is.
func requireTrueCounts(t *testing.T, dsn string, stores ...*postgresStore) {
	t.Helper()
	var statuses []string
	var numbers []int64
	conn, err := pgx.Connect(t.Context(), dsn)
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close(context.Background())) }()
	require.NoError(t, conn.QueryRow(t.Context(), `SELECT COALESCE(array_agg(status), '{}'), COALESCE(array_agg(n), '{}')
		FROM (SELECT status, count(*) AS n FROM orders GROUP BY status UNION ALL SELECT 'direct', count(*) FROM orders WHERE direct HAVING count(*) > 0) AS c`).Scan(&statuses, &numbers))
	want := map[contract.Status]int64{}
	for i, status := range statuses {
		want[contract.Status(status)] = numbers[i]
	}
	for _, s := range stores {
		require.Eventually(t, func() bool { return maps.Equal(want, stored(s)) }, 20*time.Second, 10*time.Millisecond,
			"want %v, have %v", want, s.counts())
	}
}

// stored returns the counts of the orders that are there.
func stored(s store) map[contract.Status]int64 {
	counts := nonZero(s.counts())
	delete(counts, statusPurged)
	delete(counts, statusDirectFinal)
	return counts
}

func TestPostgresGivesADueOrderToOneOfManyProcesses(t *testing.T) {
	one, two, _ := openTwice(t)
	const n = 300
	var changes []*change
	for range n {
		changes = append(changes, &change{insert: testOrder("")})
	}
	writeAll(t, one, changes...)
	at := now()
	until := at.Add(time.Minute)
	var mu sync.Mutex
	claimed := map[uuid.UUID]int{}
	var claimers sync.WaitGroup
	for _, s := range []*postgresStore{one, two, one, two} {
		claimers.Go(func() {
			for {
				found, err := s.claim(context.Background(), at, until, 7, 1<<20, skipNone)
				if err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for i, o := range found {
					claimed[o.ID]++
					if i > 0 && o.AcceptedAt.Before(found[i-1].AcceptedAt) {
						t.Error("not in the order of due times")
					}
				}
				done := len(claimed) == n
				mu.Unlock()
				if done {
					return
				}
			}
		})
	}
	claimers.Wait()
	for id, times := range claimed {
		require.Equal(t, 1, times, id)
	}
	next, err := one.nextDue(t.Context(), at)
	require.NoError(t, err)
	require.Equal(t, until, next, "claimed until then")
	require.Len(t, dueIDs(t, two, until), 100, "and then due again")
}

func TestPostgresClaimsWhatIsNotToBeSkippedWithinItsLimits(t *testing.T) {
	one, two, _ := openTwice(t)
	var all []uuid.UUID
	for range 6 {
		o := testOrder("")
		o.Body = make([]byte, 100)
		insertOrders(t, one, o)
		all = append(all, o.ID)
	}
	at := now()
	until := at.Add(time.Minute)
	skip := func(id uuid.UUID) bool { return id == all[0] || id == all[1] || id == all[3] }
	found, err := one.claim(t.Context(), at, until, 2, 1<<20, skip)
	require.NoError(t, err)
	require.Equal(t, []uuid.UUID{all[2], all[4]}, ids(found))
	require.Equal(t, []uuid.UUID{all[0], all[1], all[3], all[5]}, dueIDs(t, two, at), "what was skipped is not put off")
	found, err = two.claim(t.Context(), at, until, 10, 150, skipNone)
	require.NoError(t, err)
	require.Equal(t, []uuid.UUID{all[0], all[1]}, ids(found), "the one that reaches the size is the last")
}

func TestPostgresRenewsClaimsOfTheSameAttemptOnly(t *testing.T) {
	one, two, _ := openTwice(t)
	var marks []mark
	kept, next, saved, published, dead := testOrder("A"), testOrder("B"), testOrder("C"), testOrder("D"), testOrder("E")
	for _, o := range []*order{kept, next, saved, published, dead} {
		insertOrders(t, one, o)
		marks = append(marks, mark{id: o.ID})
	}
	at := now()
	until := at.Add(time.Minute)
	found, err := one.claim(t.Context(), at, until, 10, 1<<20, skipNone)
	require.NoError(t, err)
	require.Len(t, found, 5)
	retry := at.Add(time.Hour)
	update(t, two, next.ID, func(o *order) verdict {
		o.Status, o.Attempts, o.PublishAt = contract.StatusRetrying, 1, retry
		return save
	})
	update(t, two, saved.ID, finishAs(contract.StatusSaved))
	update(t, two, dead.ID, func(o *order) verdict {
		o.Status, o.FinishedAt, o.PublishAt = contract.StatusDead, at, retry
		return save
	})
	writeAll(t, two, &change{marks: []mark{{id: published.ID}}, publishedAt: at})
	later := until.Add(time.Minute)
	require.NoError(t, one.renew(t.Context(), marks, later))
	for id, want := range map[uuid.UUID]time.Time{kept.ID: later, next.ID: retry, saved.ID: {}, published.ID: {}, dead.ID: retry} {
		o, err := two.get(t.Context(), id)
		require.NoError(t, err)
		require.Equal(t, want, o.PublishAt, o.Number)
	}
	require.NoError(t, one.renew(t.Context(), marks, at))
	require.Equal(t, []uuid.UUID{kept.ID}, dueIDs(t, two, at), "given back")
}

func TestPostgresLeavesDirectOrdersToThoseWhoAreBusyWithThem(t *testing.T) {
	one, two, _ := openTwice(t)
	direct := testOrder("A")
	direct.Direct, direct.PublishAt = true, now().Add(time.Minute)
	insertOrders(t, one, direct)
	n, err := two.recover(t.Context(), now())
	require.NoError(t, err)
	require.Zero(t, n)
	require.Empty(t, dueIDs(t, two, now()))
	require.Equal(t, []uuid.UUID{direct.ID}, dueIDs(t, two, direct.PublishAt), "it becomes due by itself")
}

// Of equal requests at the same time one makes the order, and the others find
// it, in whatever order and groups they arrive; and nobody waits for one who
// waits for him.
func TestPostgresMakesOneOrderOfEqualRequestsToManyProcesses(t *testing.T) {
	dsn := services.Postgres(t)
	one, two := openPostgres(t, dsn), openPostgres(t, dsn)
	const numbers, clients = 200, 8
	var mu sync.Mutex
	made, told := map[string]uuid.UUID{}, map[string]map[uuid.UUID]bool{}
	var requests sync.WaitGroup
	for client := range clients {
		s := []*postgresStore{one, two}[client%2]
		requests.Go(func() {
			order := rand.Perm(numbers)
			for group := range slices.Chunk(order, 1+30*client) {
				var changes []*change
				for _, i := range group {
					o := testOrder(fmt.Sprint(i))
					o.IdempotencyKey = fmt.Sprint("key ", i)
					changes = append(changes, &change{insert: o})
				}
				if err := s.write(context.Background(), changes); err != nil {
					t.Error(err)
					return
				}
				mu.Lock()
				for _, c := range changes {
					number := c.insert.Number
					if told[number] == nil {
						told[number] = map[uuid.UUID]bool{}
					}
					if !c.changed {
						told[number][c.found.ID] = true
						continue
					}
					if _, twice := made[number]; twice {
						t.Error("made twice: ", number)
					}
					made[number] = c.insert.ID
				}
				mu.Unlock()
			}
		})
	}
	requests.Wait()
	require.Len(t, made, numbers)
	for number, id := range made {
		require.Equal(t, map[uuid.UUID]bool{id: true}, told[number])
	}
	requireTrueCounts(t, dsn, one, two)
	// Servers report what they saw at the latest when they end.
	require.NoError(t, errors.Join(one.close(), two.close()))
	soon(t, func() bool {
		return askPostgres[int64](t, dsn, `SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'sluice'`) == 0
	})
	require.Zero(t, askPostgres[int64](t, dsn, `SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()`))
}

// Numbers change hands while others ask for them: no error, nobody is told of an
// order that never held the number or the key, and the counts stay true.
func TestPostgresUnderMixedLoad(t *testing.T) {
	one, two, dsn := openTwice(t)
	three := openPostgres(t, dsn)
	var mu sync.Mutex
	var known []uuid.UUID
	var load sync.WaitGroup
	stop := time.Now().Add(3 * time.Second)
	for worker := range 12 {
		s := []*postgresStore{one, two, three}[worker%3]
		load.Go(func() {
			for time.Now().Before(stop) {
				mu.Lock()
				changes := mixedChanges(known)
				mu.Unlock()
				if err := s.write(context.Background(), changes); err != nil {
					t.Error(err)
					return
				}
				for _, c := range changes {
					if c.insert == nil {
						continue
					}
					if c.changed == (c.found != nil) || (c.found != nil && c.found.Number != c.insert.Number && c.found.IdempotencyKey != c.insert.IdempotencyKey) {
						t.Errorf("order %q %q found %+v", c.insert.Number, c.insert.IdempotencyKey, c.found)
					}
					mu.Lock()
					known = append(known, c.insert.ID)
					mu.Unlock()
				}
				if _, err := s.claim(context.Background(), now(), now().Add(time.Millisecond), 20, 1<<20, skipNone); err != nil {
					t.Error(err)
				}
				if rand.N(20) == 0 {
					_, err := s.republish(context.Background(), now(), now(), 50)
					_, err2 := s.purge(context.Background(), now(), 10)
					if err := errors.Join(err, err2); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	load.Wait()
	t.Log("orders tried", len(known), "deadlocks", askPostgres[int64](t, dsn, `SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()`))
	requireTrueCounts(t, dsn, one, two, three)
	require.NoError(t, three.close())
	three = openPostgres(t, dsn)
	requireTrueCounts(t, dsn, three)
	require.NoError(t, three.close())
}

// mixedChanges are a few dozen changes of a few numbers, keys and orders.
func mixedChanges(known []uuid.UUID) []*change {
	var changes []*change
	for range 1 + rand.N(12) {
		o := testOrder(fmt.Sprint(rand.N(30)))
		o.Hash = [32]byte{}
		o.Direct = rand.N(3) == 0
		if rand.N(2) == 0 {
			o.IdempotencyKey = fmt.Sprint(rand.N(30))
		}
		changes = append(changes, &change{insert: o})
	}
	for range rand.N(12) * min(1, len(known)) {
		id := known[len(known)-1-rand.N(min(len(known), 60))]
		changes = append(changes, &change{marks: []mark{{id: id}}, publishedAt: now()}, &change{id: id, update: func(o *order) verdict {
			switch rand.N(4) {
			case 0:
				return remove
			case 1:
				o.Direct, o.NumberReleased = false, true
				return finishAs(contract.StatusRejected)(o)
			case 2:
				return leave
			default:
				o.Direct, o.Status, o.PublishAt = false, contract.StatusRetrying, now()
				return save
			}
		}})
	}
	rand.Shuffle(len(changes), func(i, j int) { changes[i], changes[j] = changes[j], changes[i] })
	return changes
}

// The holder of a number can vanish between the insertion that met it and the
// look at it.
func TestPostgresInsertsWhenTheHolderHasGivenItsNumberUp(t *testing.T) {
	one, two, dsn := openTwice(t)
	for name, give := range map[string]func(*order) verdict{
		"removed":  func(*order) verdict { return remove },
		"rejected": func(o *order) verdict { o.NumberReleased = true; return finishAs(contract.StatusRejected)(o) },
	} {
		t.Run(name, func(t *testing.T) {
			holder, repeat := testOrder(name), testOrder(name)
			holder.Direct, repeat.Hash = true, holder.Hash
			insertOrders(t, one, holder)
			// The holder is locked by a transaction that gives the number up,
			// while the repeat waits to adopt it.
			locked := make(chan struct{})
			var done sync.WaitGroup
			c := &change{insert: repeat}
			done.Go(func() {
				<-locked
				if err := two.write(context.Background(), []*change{c}); err != nil {
					t.Error(err)
				}
			})
			var once sync.Once
			update(t, one, holder.ID, func(o *order) verdict {
				once.Do(func() {
					close(locked)
					soon(t, func() bool {
						return askPostgres[bool](t, dsn, `SELECT EXISTS (SELECT FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock')`)
					})
				})
				return give(o)
			})
			done.Wait()
			require.True(t, c.changed, "found %+v", c.found)
		})
	}
}

func TestPostgresShowsOtherProcessesCountsSoon(t *testing.T) {
	one, two, dsn := openTwice(t)
	a, b := testOrder("A"), testOrder("B")
	insertOrders(t, one, a)
	insertOrders(t, two, b)
	update(t, two, a.ID, finishAs(contract.StatusSaved))
	requireTrueCounts(t, dsn, one, two)
}

func TestPostgresCountsEveryTransactionOnce(t *testing.T) {
	accepted := func(n int64) map[contract.Status]int64 { return map[contract.Status]int64{contract.StatusAccepted: n} }
	c := &postgresCounts{}
	snapshot := func(text string) txSnapshot {
		s, err := parseSnapshot(text)
		require.NoError(t, err)
		return s
	}
	c.replace(snapshot("10:10:"), accepted(5))
	c.add(9, accepted(1)) // shown already, and told late
	require.Equal(t, accepted(5), c.now())
	c.add(10, accepted(1))
	c.add(12, accepted(2))
	require.Equal(t, accepted(8), c.now())
	c.replace(snapshot("10:13:10,11"), accepted(7)) // 10 was still running there
	require.Equal(t, accepted(8), c.now())
	c.add(11, accepted(4))
	require.Equal(t, accepted(12), c.now())
	c.replace(snapshot("13:13:"), accepted(12))
	require.Equal(t, accepted(12), c.now())
	require.Empty(t, c.recent)
	for _, text := range []string{"", "1:2", "1:x:", "1:2:x"} {
		_, err := parseSnapshot(text)
		require.ErrorContains(t, err, "is no snapshot")
	}
}

func TestPostgresPurgesInSeveralProcesses(t *testing.T) {
	one, two, dsn := openTwice(t)
	var changes []*change
	for range 500 {
		o := testOrder("")
		o.Status, o.FinishedAt, o.PublishAt = contract.StatusSaved, o.AcceptedAt, time.Time{}
		changes = append(changes, &change{insert: o})
	}
	writeAll(t, one, changes...)
	var total atomic.Int64
	var purgers sync.WaitGroup
	for _, s := range []*postgresStore{one, two} {
		purgers.Go(func() {
			for total.Load() < 500 {
				n, err := s.purge(context.Background(), now(), 20)
				if err != nil {
					t.Error(err)
					return
				}
				total.Add(int64(n))
			}
		})
	}
	purgers.Wait()
	require.Equal(t, int64(500), total.Load())
	requireTrueCounts(t, dsn, one, two)
}

// What one client sends must not fail the transaction that others share.
func TestPostgresTakesTextsThatItCannotHold(t *testing.T) {
	one, _, _ := openTwice(t)
	long := strings.Repeat("9", 1<<16)
	for _, number := range []string{long, long + "1", "a\x00b", "sha256:x", "\u00e4\U0001F375", strings.Repeat("x", indexableLength)} {
		o := testOrder(number)
		o.ContentType, o.TraceState = "application/json; x=\"\xff\"", "a=\xfe"
		insertOrders(t, one, o)
		repeat := &change{insert: testOrder(number)}
		writeAll(t, one, repeat)
		require.Equal(t, o.ID, repeat.found.ID)
		require.Equal(t, number, repeat.found.Number)
		found, err := one.list(t.Context(), query{number: number, limit: 10})
		require.NoError(t, err)
		require.Equal(t, []uuid.UUID{o.ID}, ids(found.orders))
		update(t, one, o.ID, func(o *order) verdict {
			o.BackendType, o.BackendBody, o.Problem = "text/\xff\x00", []byte("\x00\xff"), []byte("\x00\xff")
			o.History = append(o.History, attempt{Error: "\x00\xff"})
			return finishAs(contract.StatusSaved)(o)
		})
	}
}
