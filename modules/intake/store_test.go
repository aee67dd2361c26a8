package intake

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"sluice/modules/contract"
)

// storeUnderTest opens stores of one kind. reopen is nil for those that forget.
type storeUnderTest struct {
	name   string
	shared bool // by several processes
	open   func(t *testing.T) store
	reopen func(t *testing.T, s store) store
}

func storesUnderTest() []storeUnderTest {
	paths := map[store]string{}
	openAt := func(t *testing.T, path string) store {
		s, err := openSQLiteStore(t.Context(), path, slog.New(slog.DiscardHandler))
		require.NoError(t, err)
		paths[s] = path
		return s
	}
	return []storeUnderTest{
		{name: "memory", open: func(*testing.T) store { return newMemoryStore() }},
		{
			name: "sqlite",
			open: func(t *testing.T) store { return openAt(t, filepath.Join(t.TempDir(), "orders.db")) },
			reopen: func(t *testing.T, s store) store {
				require.NoError(t, s.close())
				return openAt(t, paths[s])
			},
		},
		postgresUnderTest(),
	}
}

// TestStore is the suite that every store passes.
func TestStore(t *testing.T) {
	for _, kind := range storesUnderTest() {
		t.Run(kind.name, func(t *testing.T) {
			for name, test := range storeSuite {
				t.Run(name, func(t *testing.T) {
					s := kind.open(t)
					t.Cleanup(func() { require.NoError(t, s.close()) })
					test(t, s)
				})
			}
			if kind.reopen == nil {
				return
			}
			t.Run("keeps everything when it is opened again", func(t *testing.T) {
				s := kind.open(t)
				o := testOrder("A-1")
				o.IdempotencyKey = "key-1"
				insertOrders(t, s, o)
				want, err := s.get(t.Context(), o.ID)
				require.NoError(t, err)
				s = kind.reopen(t, s)
				defer func() { require.NoError(t, s.close()) }()
				got, err := s.get(t.Context(), o.ID)
				require.NoError(t, err)
				require.Equal(t, want, got)
				require.Equal(t, int64(1), s.counts()[contract.StatusAccepted])
			})
			t.Run("keeps what is published, where, and since when", func(t *testing.T) {
				s := kind.open(t)
				o := testOrder("A-1")
				insertOrders(t, s, o)
				since := o.AcceptedAt.Add(time.Second)
				writeAll(t, s, &change{marks: []mark{{id: o.ID}}, publishedAt: since})
				require.NoError(t, s.setCarrier(t.Context(), "amqp /sluice"))
				s = kind.reopen(t, s)
				defer func() { require.NoError(t, s.close()) }()
				oldest, err := s.oldestPublished(t.Context())
				require.NoError(t, err)
				require.Equal(t, since, oldest)
				carrier, err := s.carrier(t.Context())
				require.NoError(t, err)
				require.Equal(t, "amqp /sluice", carrier)
			})
			if kind.shared {
				return
			}
			t.Run("makes direct orders due again", func(t *testing.T) {
				s := kind.open(t)
				published, waiting, direct, saved := testOrder("A-1"), testOrder("A-2"), testOrder("A-3"), testOrder("A-4")
				later := published.AcceptedAt.Add(time.Hour)
				waiting.PublishAt = later
				direct.Direct, direct.PublishAt = true, later
				insertOrders(t, s, published, waiting, direct, saved)
				writeAll(t, s, &change{marks: []mark{{id: published.ID}}, publishedAt: published.AcceptedAt})
				update(t, s, saved.ID, finishAs(contract.StatusSaved))
				s = kind.reopen(t, s)
				defer func() { require.NoError(t, s.close()) }()

				n, err := s.recover(t.Context(), published.AcceptedAt)
				require.NoError(t, err)
				require.Equal(t, 1, n)
				require.ElementsMatch(t, []uuid.UUID{direct.ID}, dueIDs(t, s, published.AcceptedAt))
				require.Equal(t, int64(1), s.counts()[statusDirect], "until the relay takes it over")
			})
		})
	}
}

var storeSuite = map[string]func(*testing.T, store){
	"knows which orders would repeat another": func(t *testing.T, s store) {
		keyed, foreign, rejected, plain := testOrder("A-1"), testOrder("A-2"), testOrder("A-3"), testOrder("")
		keyed.IdempotencyKey, foreign.Owner = "key-1", "someone"
		insertOrders(t, s, keyed, foreign, rejected, plain)
		update(t, s, rejected.ID, func(o *order) verdict {
			o.NumberReleased = true
			return finishAs(contract.StatusRejected)(o)
		})
		for _, c := range []struct {
			owner, number, key string
			held               bool
		}{
			{"", "A-1", "", true}, {"", "", "key-1", true}, {"", "A-9", "key-1", true}, {"someone", "A-2", "", true},
			{"", "A-2", "", false}, {"someone", "A-1", "key-1", false}, {"", "A-3", "", false}, {"", "", "", false}, {"", "A-9", "key-9", false},
		} {
			o := testOrder(c.number)
			o.Owner, o.IdempotencyKey = c.owner, c.key
			held, err := s.holds(t.Context(), o)
			require.NoError(t, err)
			require.Equal(t, c.held, held, "%+v", c)
		}
	},
	"makes due again what was published before a time and is silent": func(t *testing.T, s store) {
		silent, answered, later, dead, fresh := testOrder("A-1"), testOrder("A-2"), testOrder("A-3"), testOrder("A-4"), testOrder("A-5")
		early := fresh.AcceptedAt.Add(time.Minute)
		late := early.Add(time.Minute)
		insertOrders(t, s, silent, answered, later, dead, fresh)
		update(t, s, dead.ID, finishAs(contract.StatusDead))
		oldest, err := s.oldestPublished(t.Context())
		require.NoError(t, err)
		require.Zero(t, oldest)
		writeAll(t, s, &change{marks: []mark{{id: silent.ID}, {id: answered.ID}, {id: dead.ID, dead: true}}, publishedAt: early},
			&change{marks: []mark{{id: later.ID}}, publishedAt: late})
		update(t, s, answered.ID, finishAs(contract.StatusSaved))
		oldest, err = s.oldestPublished(t.Context())
		require.NoError(t, err)
		require.Equal(t, early, oldest)
		require.Equal(t, []uuid.UUID{fresh.ID}, dueIDs(t, s, late))

		n, err := s.republish(t.Context(), early, late, 10)
		require.NoError(t, err)
		require.Zero(t, n, "published at that time is not before it")
		n, err = s.republish(t.Context(), late, late, 10)
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.Equal(t, []uuid.UUID{fresh.ID, silent.ID}, dueIDs(t, s, late))
		oldest, err = s.oldestPublished(t.Context())
		require.NoError(t, err)
		require.Equal(t, late, oldest)

		// What is published again counts from then on.
		writeAll(t, s, &change{marks: []mark{{id: silent.ID}}, publishedAt: late.Add(time.Minute)})
		n, err = s.republish(t.Context(), late.Add(time.Second), late, 10)
		require.NoError(t, err)
		require.Equal(t, 1, n)
		require.Equal(t, []uuid.UUID{fresh.ID, later.ID}, dueIDs(t, s, late))
	},
	"makes published orders due again in batches": func(t *testing.T, s store) {
		var marks []mark
		for range 5 {
			o := testOrder("")
			insertOrders(t, s, o)
			marks = append(marks, mark{id: o.ID})
		}
		at := now()
		writeAll(t, s, &change{marks: marks, publishedAt: at})
		for _, want := range []int{2, 2, 1, 0} {
			n, err := s.republish(t.Context(), at.Add(time.Second), at, 2)
			require.NoError(t, err)
			require.Equal(t, want, n)
		}
	},
	"remembers the broker": func(t *testing.T, s store) {
		for _, name := range []string{"", "gochannel", "amqp /sluice"} {
			if name != "" {
				require.NoError(t, s.setCarrier(t.Context(), name))
			}
			got, err := s.carrier(t.Context())
			require.NoError(t, err)
			require.Equal(t, name, got)
		}
	},
	"returns what was inserted": func(t *testing.T, s store) {
		o := testOrder("A-1")
		o.Owner, o.IdempotencyKey, o.TraceParent, o.TraceState = "shop", "key", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "a=b"
		insertOrders(t, s, o)
		got, err := s.get(t.Context(), o.ID)
		require.NoError(t, err)
		want := *o
		want.Body, want.Size = nil, len(o.Body)
		require.Equal(t, &want, got)
	},
	"does not know other orders": func(t *testing.T, s store) {
		_, err := s.get(t.Context(), testOrder("A-1").ID)
		require.ErrorIs(t, err, errNotFound)
	},
	"inserts a number once, in one group and across groups": func(t *testing.T, s store) {
		first, twin, late := testOrder("A-1"), testOrder("A-1"), testOrder("A-1")
		one, two := &change{insert: first}, &change{insert: twin}
		writeAll(t, s, one, two)
		require.True(t, one.changed)
		require.False(t, two.changed)
		require.Equal(t, first.ID, two.found.ID)
		three := &change{insert: late}
		writeAll(t, s, three)
		require.False(t, three.changed)
		require.Equal(t, first.ID, three.found.ID)
		require.Equal(t, int64(1), s.counts()[contract.StatusAccepted])
	},
	"inserts large groups with duplicates in the middle": func(t *testing.T, s store) {
		var changes []*change
		for i := range 3*manyRows + 5 {
			changes = append(changes, &change{insert: testOrder(fmt.Sprintf("A-%d", i/2))}) // each number twice
		}
		writeAll(t, s, changes...)
		for i, c := range changes {
			require.Equal(t, i%2 == 0, c.changed, i)
			if i%2 == 1 {
				require.Equal(t, changes[i-1].insert.ID, c.found.ID)
			}
		}
	},
	"gives an order the key of its repetition, if it has none": func(t *testing.T, s store) {
		repeat := func(o *order, key string) *change {
			again := testOrder(o.Number)
			again.Hash, again.IdempotencyKey = o.Hash, key
			return &change{insert: again}
		}
		plain, keyed, marked, other := testOrder("A-1"), testOrder("A-2"), testOrder("A-3"), testOrder("A-4")
		keyed.IdempotencyKey = "own"
		insertOrders(t, s, plain, keyed, marked, other)
		writeAll(t, s, &change{marks: []mark{{id: plain.ID}}, publishedAt: plain.AcceptedAt})
		differs, same := &change{insert: testOrder("A-1")}, repeat(plain, "k")
		differs.insert.IdempotencyKey = "differs"
		writeAll(t, s, differs, repeat(plain, ""), same, repeat(keyed, "second"), repeat(other, "k"))
		require.Equal(t, "k", same.found.IdempotencyKey)
		for o, key := range map[*order]string{plain: "k", keyed: "own", other: ""} {
			got, err := s.get(t.Context(), o.ID)
			require.NoError(t, err)
			require.Equal(t, key, got.IdempotencyKey, o.Number)
		}
		oldest, err := s.oldestPublished(t.Context())
		require.NoError(t, err)
		require.Equal(t, plain.AcceptedAt, oldest, "nothing else has changed")

		reused := &change{insert: testOrder("A-5")}
		reused.insert.IdempotencyKey = "k"
		writeAll(t, s, reused)
		require.False(t, reused.changed)
		require.Equal(t, plain.ID, reused.found.ID)
	},
	"gives one key to one of the orders whose repetitions bring it at once": func(t *testing.T, s store) {
		for i := range 50 {
			orders := []*order{testOrder(fmt.Sprintf("A-%d", i)), testOrder(fmt.Sprintf("B-%d", i))}
			insertOrders(t, s, orders...)
			var writers sync.WaitGroup
			repeats := make([]*change, len(orders))
			for n, o := range orders {
				again := testOrder(o.Number)
				again.Hash, again.IdempotencyKey = o.Hash, fmt.Sprintf("k-%d", i)
				repeats[n] = &change{insert: again}
				writers.Go(func() { assert.NoError(t, s.write(t.Context(), []*change{repeats[n]})) })
			}
			writers.Wait()
			require.Equal(t, repeats[0].found.ID, repeats[1].found.ID)
		}
	},
	"keeps numbers and keys of different owners apart": func(t *testing.T, s store) {
		mine, yours := testOrder("A-1"), testOrder("A-1")
		mine.IdempotencyKey, yours.IdempotencyKey, yours.Owner = "k", "k", "you"
		insertOrders(t, s, mine, yours)
	},
	"keeps what different owners do with a number and a key apart": func(t *testing.T, s store) {
		var mine, yours []*order
		for i := range 2*manyRows + 3 {
			for _, o := range []struct {
				owner string
				list  *[]*order
			}{{"me", &mine}, {"you", &yours}} {
				one := testOrder(fmt.Sprintf("A-%d", i))
				one.Owner, one.IdempotencyKey = o.owner, fmt.Sprintf("k-%d", i)
				*o.list = append(*o.list, one)
			}
		}
		insertOrders(t, s, slices.Concat(mine, yours)...)

		// A repeat finds the order of its own owner, in a group with repeats of
		// the other's, and whatever the hashes are.
		var changes []*change
		for i := range mine {
			for _, first := range []*order{mine[i], yours[i]} {
				byNumber, byKey := testOrder(first.Number), testOrder("")
				byNumber.Owner, byKey.Owner, byKey.IdempotencyKey = first.Owner, first.Owner, first.IdempotencyKey
				changes = append(changes, &change{insert: byNumber}, &change{insert: byKey})
			}
		}
		writeAll(t, s, changes...)
		for i, c := range changes {
			require.False(t, c.changed)
			want := mine[i/4]
			if i%4 > 1 {
				want = yours[i/4]
			}
			require.Equal(t, want.ID, c.found.ID)
			require.Equal(t, want.Owner, c.found.Owner)
		}

		// A rejected order frees its number for its owner only.
		update(t, s, mine[0].ID, func(o *order) verdict {
			o.Status, o.NumberReleased, o.FinishedAt, o.PublishAt = contract.StatusRejected, true, now(), time.Time{}
			return save
		})
		for _, again := range []struct {
			owner   string
			changed bool
		}{{"you", false}, {"me", true}, {"me", false}} {
			o := testOrder("A-0")
			o.Owner = again.owner
			c := &change{insert: o}
			writeAll(t, s, c)
			require.Equal(t, again.changed, c.changed, again.owner)
			if !c.changed {
				require.Equal(t, again.owner, c.found.Owner)
			}
		}
	},
	"lists the orders of their owner only, whatever is asked for": func(t *testing.T, s store) {
		states := []contract.Status{contract.StatusAccepted, contract.StatusRetrying, contract.StatusSaved, contract.StatusRejected, contract.StatusDead}
		own := map[string][]uuid.UUID{} // newest first
		for i := range 30 {
			owner := []string{"", "me", "you"}[i%3]
			o := testOrder(fmt.Sprintf("A-%d", i/3))
			o.Owner = owner
			insertOrders(t, s, o)
			update(t, s, o.ID, func(o *order) verdict {
				if o.Status = states[i/3%5]; o.Status.Final() {
					o.FinishedAt, o.PublishAt = now(), time.Time{}
				}
				return save
			})
			own[owner] = append([]uuid.UUID{o.ID}, own[owner]...)
		}
		for owner, mine := range own {
			list := func(q query) []uuid.UUID {
				q.owner, q.limit = owner, 100
				page, err := s.list(t.Context(), q)
				require.NoError(t, err)
				require.Zero(t, page.next)
				return ids(page.orders)
			}
			require.Equal(t, mine, list(query{}))
			for i, id := range mine {
				require.Equal(t, mine[i+1:], append([]uuid.UUID{}, list(query{before: id})...))
				number := fmt.Sprintf("A-%d", 9-i)
				require.Equal(t, []uuid.UUID{id}, list(query{number: number}))
				require.Equal(t, []uuid.UUID{id}, list(query{number: number, status: states[(9-i)%5]}))
				require.Empty(t, list(query{number: number, status: states[(10-i)%5]}))
			}
			for i, status := range states {
				require.Equal(t, []uuid.UUID{mine[4-i], mine[9-i]}, list(query{status: status}))
			}
		}
		require.Empty(t, func() []*order { page, _ := s.list(t.Context(), query{owner: "nobody", limit: 10}); return page.orders }())
	},
	"finds the holder of a key before that of a number": func(t *testing.T, s store) {
		byKey, byNumber, both := testOrder("A-1"), testOrder("A-2"), testOrder("A-2")
		byKey.IdempotencyKey, both.IdempotencyKey = "k", "k"
		insertOrders(t, s, byKey, byNumber)
		c := &change{insert: both}
		writeAll(t, s, c)
		require.False(t, c.changed)
		require.Equal(t, byKey.ID, c.found.ID)
	},
	"lets orders without a number coexist": func(t *testing.T, s store) {
		insertOrders(t, s, testOrder(""), testOrder(""))
	},
	"frees the number of a rejected order": func(t *testing.T, s store) {
		first, second, third := testOrder("A-1"), testOrder("A-1"), testOrder("A-1")
		insertOrders(t, s, first)
		update(t, s, first.ID, func(o *order) verdict {
			o.NumberReleased = true
			return finishAs(contract.StatusRejected)(o)
		})
		insertOrders(t, s, second)
		c := &change{insert: third}
		writeAll(t, s, c)
		require.Equal(t, second.ID, c.found.ID)
		found, err := s.list(t.Context(), query{number: "A-1", limit: 10})
		require.NoError(t, err)
		require.Len(t, found.orders, 2, "the list shows all that ever had the number")
	},
	"gives a direct order to the second client that sends it": func(t *testing.T, s store) {
		direct := testOrder("A-1")
		direct.Direct = true
		insertOrders(t, s, direct)
		other := &change{insert: testOrder("A-1")} // another body: it is refused, and promised nothing
		writeAll(t, s, other)
		require.True(t, other.found.Direct)
		c := &change{insert: testOrder("A-1")}
		c.insert.Hash = direct.Hash
		writeAll(t, s, c)
		require.False(t, c.found.Direct)
		o, err := s.get(t.Context(), direct.ID)
		require.NoError(t, err)
		require.False(t, o.Direct)
	},
	"counts direct orders, and those that became final as such": func(t *testing.T, s store) {
		saved, rejected, failed, adopted, tried := testOrder("A-1"), testOrder("A-2"), testOrder("A-3"), testOrder("A-4"), testOrder("A-5")
		for _, o := range []*order{saved, rejected, failed, adopted, tried} {
			o.Direct = true
		}
		insertOrders(t, s, saved, rejected, failed, adopted, tried)
		counted := func(want map[contract.Status]int64) {
			t.Helper()
			require.Equal(t, want, nonZero(s.counts()))
		}
		counted(map[contract.Status]int64{contract.StatusAccepted: 5, statusDirect: 5})
		for range 2 {
			repeat := testOrder("A-4")
			repeat.Hash = adopted.Hash
			writeAll(t, s, &change{insert: repeat})
		}
		counted(map[contract.Status]int64{contract.StatusAccepted: 5, statusDirect: 4})
		ends := func(o *order, kind string) *change {
			return &change{id: o.ID, first: true, update: func(o *order) verdict { return o.apply(outcome(kind, 1), t0, threeTry) }}
		}
		writeAll(t, s, ends(saved, contract.TypeSaved), ends(rejected, contract.TypeRejected), ends(adopted, contract.TypeSaved),
			ends(tried, contract.TypeAttemptFailed))
		update(t, s, failed.ID, func(*order) verdict { return remove })
		counted(map[contract.Status]int64{contract.StatusSaved: 2, contract.StatusRejected: 1, contract.StatusRetrying: 1, statusDirectFinal: 2})
		purged, err := s.purge(t.Context(), t0.Add(time.Minute), 10)
		require.NoError(t, err)
		require.Equal(t, 3, purged)
		counted(map[contract.Status]int64{contract.StatusRetrying: 1, statusPurged: 3, statusDirectFinal: 2})
	},
	"updates, removes, leaves, and says so": func(t *testing.T, s store) {
		o := testOrder("A-1")
		insertOrders(t, s, o)
		c := update(t, s, o.ID, func(o *order) verdict {
			o.Attempts, o.BackendStatus, o.BackendType, o.BackendBody = 3, 503, "text/plain", []byte("busy")
			o.Problem, o.Status = []byte(`{"title":"x"}`), contract.StatusRetrying
			o.History = append(o.History, attempt{Number: 3, StartedAt: o.AcceptedAt, Duration: "1ms", Error: "busy"})
			return save
		})
		require.True(t, c.changed)
		got, err := s.get(t.Context(), o.ID)
		require.NoError(t, err)
		c.found.historySize = got.historySize // which only reading tells
		require.Equal(t, c.found, got)
		require.Equal(t, "busy", got.History[0].Error)

		c = update(t, s, o.ID, func(*order) verdict { return leave })
		require.False(t, c.changed)
		require.Equal(t, got, c.found)

		c = update(t, s, o.ID, func(*order) verdict { return remove })
		require.True(t, c.changed)
		require.Nil(t, c.found)
		require.Empty(t, dueIDs(t, s, o.AcceptedAt.Add(time.Hour)))
		insertOrders(t, s, testOrder("A-1"))

		c = update(t, s, o.ID, func(*order) verdict { return save })
		require.Nil(t, c.found)
		require.False(t, c.changed)
		require.Equal(t, map[contract.Status]int64{contract.StatusAccepted: 1}, nonZero(s.counts()))
	},
	"makes many changes of many orders in one group, in the order given": func(t *testing.T, s store) {
		const n = 2*manyRows + 3
		var orders []*order
		var changes []*change
		for i := range n {
			o := testOrder(fmt.Sprintf("A-%d", i))
			o.Attempts = i % 2
			orders = append(orders, o)
			changes = append(changes, &change{insert: o})
		}
		count := func(o *order) verdict { o.Attempts++; return save }
		for _, o := range orders {
			changes = append(changes, &change{marks: []mark{{id: o.ID}}}, &change{id: o.ID, update: count}, &change{id: o.ID, update: count})
		}
		last := orders[n-1]
		changes = append(changes,
			&change{id: last.ID, update: func(*order) verdict { return remove }}, &change{id: last.ID, update: count}, &change{id: newTestID(), update: count})
		writeAll(t, s, changes...)
		for i, o := range orders[:n-1] {
			got, err := s.get(t.Context(), o.ID)
			require.NoError(t, err)
			require.Equal(t, i%2+2, got.Attempts)
			require.Equal(t, i%2 == 0, got.PublishAt.IsZero(), "marked for no attempts")
		}
		for _, c := range changes[len(changes)-2:] {
			require.Nil(t, c.found)
			require.False(t, c.changed)
		}
		_, err := s.get(t.Context(), last.ID)
		require.ErrorIs(t, err, errNotFound)
		require.Equal(t, int64(n-1), s.counts()[contract.StatusAccepted])
	},
	"keeps every attempt since the last replay": func(t *testing.T, s store) {
		const most = historyLimit + 50
		o := testOrder("A-1")
		insertOrders(t, s, o)
		fail := func(n int) {
			update(t, s, o.ID, func(o *order) verdict {
				return o.apply(outcome(contract.TypeAttemptFailed, n), t0, RetryConfig{MaxAttempts: most, RetryInitial: 1, RetryMax: 1})
			})
		}
		kept := func() (numbers []int) {
			got, err := s.get(t.Context(), o.ID)
			require.NoError(t, err)
			for _, a := range got.History {
				numbers = append(numbers, a.Number)
			}
			return numbers
		}
		for n := 1; n <= most; n++ {
			fail(n)
		}
		all := kept()
		require.Len(t, all, most)
		update(t, s, o.ID, func(o *order) verdict { return o.replay(t0) })
		fail(most + 1)
		require.Equal(t, append(all[most-historyLimit+1:], most+1), kept())
	},
	"takes over the outcome of a first attempt like any other": func(t *testing.T, s store) {
		for _, kind := range []string{contract.TypeSaved, contract.TypeRejected, contract.TypeAttemptFailed} {
			out := outcome(kind, 1)
			out.StatusCode, out.ContentType, out.Body, out.Duration = 418, "text/plain", []byte("short and stout"), time.Second
			twin, first := testOrder("A-"+kind), testOrder("B-"+kind)
			twin.IdempotencyKey, first.IdempotencyKey = "a-"+kind, "b-"+kind
			insertOrders(t, s, twin, first)
			once := RetryConfig{MaxAttempts: 1}
			writeAll(t, s, &change{id: twin.ID, update: func(o *order) verdict { return o.apply(out, t0, once) }})
			c := &change{id: first.ID, first: true, update: func(o *order) verdict { return o.apply(out, t0, once) }}
			writeAll(t, s, c)
			want, err := s.get(t.Context(), twin.ID)
			require.NoError(t, err)
			got, err := s.get(t.Context(), first.ID)
			require.NoError(t, err)
			require.True(t, c.changed)
			require.Equal(t, first.ID, c.found.ID)
			require.Equal(t, got.Status, c.found.Status)
			require.Equal(t, got.PublishAt, c.found.PublishAt)
			require.Equal(t, first.Number, got.Number)
			require.Equal(t, first.IdempotencyKey, got.IdempotencyKey)
			want.ID, want.Number, want.IdempotencyKey, want.AcceptedAt, want.Hash, want.Size = got.ID, got.Number, got.IdempotencyKey, got.AcceptedAt, got.Hash, got.Size
			require.Equal(t, want, got)
		}
		require.Equal(t, map[contract.Status]int64{contract.StatusSaved: 2, contract.StatusRejected: 2, contract.StatusDead: 2}, nonZero(s.counts()))
		again := testOrder("B-" + contract.TypeRejected) // whose number is free
		insertOrders(t, s, again)
	},
	"does not let the outcome of a first attempt wipe out what came later": func(t *testing.T, s store) {
		once := RetryConfig{MaxAttempts: 1}
		first := func(o *order, kind string) *change {
			return &change{id: o.ID, first: true, update: func(o *order) verdict { return o.apply(outcome(kind, 1), t0, once) }}
		}
		removed, replayed, saved, tried, twice := testOrder("A-1"), testOrder("A-2"), testOrder("A-3"), testOrder("A-4"), testOrder("A-5")
		insertOrders(t, s, removed, replayed, saved, tried, twice)
		update(t, s, removed.ID, func(*order) verdict { return remove })
		update(t, s, replayed.ID, func(o *order) verdict { return o.apply(outcome(contract.TypeAttemptFailed, 1), t0, once) })
		update(t, s, replayed.ID, func(o *order) verdict { return o.replay(t0) })
		update(t, s, saved.ID, func(o *order) verdict { return o.apply(outcome(contract.TypeSaved, 1), t0, once) })
		for n := range 2 {
			update(t, s, tried.ID, func(o *order) verdict { return o.apply(outcome(contract.TypeAttemptFailed, n+1), t0, threeTry) })
		}
		before := map[uuid.UUID]*order{}
		for _, o := range []*order{replayed, saved, tried} {
			var err error
			before[o.ID], err = s.get(t.Context(), o.ID)
			require.NoError(t, err)
		}

		gone, late, repeated, rejected := first(removed, contract.TypeSaved), first(replayed, contract.TypeAttemptFailed), first(saved, contract.TypeSaved), first(tried, contract.TypeRejected)
		earlier, later := first(twice, contract.TypeSaved), first(twice, contract.TypeRejected)
		writeAll(t, s, gone, late, repeated, rejected, earlier, later)
		require.Nil(t, gone.found)
		for _, c := range []*change{late, repeated, rejected} {
			require.False(t, c.changed)
			require.Equal(t, before[c.id], c.found)
			after, err := s.get(t.Context(), c.id)
			require.NoError(t, err)
			require.Equal(t, before[c.id], after)
		}
		require.True(t, earlier.changed)
		require.False(t, later.changed)
		require.Equal(t, contract.StatusSaved, later.found.Status)

		// News of a save counts, and keeps what is known of the later attempts.
		c := first(tried, contract.TypeSaved)
		writeAll(t, s, c)
		require.True(t, c.changed)
		o, err := s.get(t.Context(), tried.ID)
		require.NoError(t, err)
		require.Equal(t, contract.StatusSaved, o.Status)
		require.Equal(t, 2, o.Attempts)
		require.Len(t, o.History, 3)
		require.Equal(t, map[contract.Status]int64{contract.StatusSaved: 3, contract.StatusRetrying: 1}, nonZero(s.counts()))
	},
	"hands out what is due, longest due first, with bodies": func(t *testing.T, s store) {
		a, b, c, d := testOrder("A"), testOrder("B"), testOrder("C"), testOrder("D")
		base := a.AcceptedAt
		a.PublishAt, b.PublishAt, c.PublishAt, d.PublishAt = base.Add(2*time.Second), base.Add(time.Second), base.Add(time.Minute), time.Time{}
		insertOrders(t, s, a, b, c, d)
		require.Equal(t, []uuid.UUID{b.ID, a.ID}, dueIDs(t, s, base.Add(2*time.Second)))
		found, err := s.claim(t.Context(), base.Add(time.Hour), time.Time{}, 1, 1<<20, skipNone)
		require.NoError(t, err)
		require.Len(t, found, 1)
		require.Equal(t, b.Body, found[0].Body)
		next, err := s.nextDue(t.Context(), time.Time{})
		require.NoError(t, err)
		require.Equal(t, b.PublishAt, next)
		next, err = s.nextDue(t.Context(), a.PublishAt)
		require.NoError(t, err)
		require.Equal(t, c.PublishAt, next)
		found, err = s.claim(t.Context(), base.Add(time.Hour), time.Time{}, 1, 1<<20, func(id uuid.UUID) bool { return id == b.ID || id == a.ID })
		require.NoError(t, err)
		require.Equal(t, []uuid.UUID{c.ID}, ids(found))
	},
	"bounds the bytes of what it hands out, but hands out one": func(t *testing.T, s store) {
		a, b := testOrder("A"), testOrder("B")
		insertOrders(t, s, a, b)
		found, err := s.claim(t.Context(), b.PublishAt, time.Time{}, 10, 1, skipNone)
		require.NoError(t, err)
		require.Len(t, found, 1)
	},
	"marks what was published, unless the order has gone on": func(t *testing.T, s store) {
		a, b := testOrder("A"), testOrder("B")
		insertOrders(t, s, a, b)
		update(t, s, b.ID, func(o *order) verdict {
			o.Attempts, o.Status = 1, contract.StatusRetrying
			return save
		})
		writeAll(t, s, &change{marks: []mark{{id: a.ID}, {id: b.ID}}})
		require.Equal(t, []uuid.UUID{b.ID}, dueIDs(t, s, b.PublishAt))
		o, err := s.get(t.Context(), a.ID)
		require.NoError(t, err)
		require.True(t, o.PublishAt.IsZero())
	},
	"marks the news of a dead order, unless it has been replayed": func(t *testing.T, s store) {
		a, b := testOrder("A"), testOrder("B")
		insertOrders(t, s, a, b)
		for _, o := range []*order{a, b} {
			update(t, s, o.ID, func(o *order) verdict {
				o.Attempts, o.Status, o.FinishedAt = 1, contract.StatusDead, o.AcceptedAt
				return save
			})
		}
		update(t, s, b.ID, func(o *order) verdict { return o.replay(o.PublishAt) })
		writeAll(t, s, &change{marks: []mark{{a.ID, 1, true}, {b.ID, 1, true}}})
		require.Equal(t, []uuid.UUID{b.ID}, dueIDs(t, s, b.PublishAt))
		writeAll(t, s, &change{marks: []mark{{b.ID, 1, false}}})
		require.Empty(t, dueIDs(t, s, b.PublishAt))
	},
	"has nothing due when it is empty": func(t *testing.T, s store) {
		next, err := s.nextDue(t.Context(), time.Time{})
		require.NoError(t, err)
		require.True(t, next.IsZero())
		oldest, err := s.oldestWaiting(t.Context())
		require.NoError(t, err)
		require.True(t, oldest.IsZero())
		require.NoError(t, s.ping(t.Context()))
	},
	"knows the oldest waiting order": func(t *testing.T, s store) {
		a, b, c := testOrder("A"), testOrder("B"), testOrder("C")
		a.AcceptedAt, b.AcceptedAt = a.AcceptedAt.Add(-time.Hour), b.AcceptedAt.Add(-time.Minute)
		insertOrders(t, s, a, b, c)
		update(t, s, a.ID, finishAs(contract.StatusSaved))
		update(t, s, c.ID, func(o *order) verdict { o.Status = contract.StatusRetrying; return save })
		oldest, err := s.oldestWaiting(t.Context())
		require.NoError(t, err)
		require.Equal(t, b.AcceptedAt, oldest)
	},
	"samples what waits for its first attempt, oldest first": func(t *testing.T, s store) {
		var waiting []uuid.UUID
		for i := range 10 {
			o := testOrder("")
			insertOrders(t, s, o)
			switch i {
			case 2:
				update(t, s, o.ID, finishAs(contract.StatusSaved))
			case 5:
				update(t, s, o.ID, func(o *order) verdict { o.Status = contract.StatusRetrying; return save })
			default:
				waiting = append(waiting, o.ID)
			}
		}
		every := func(n int) []uuid.UUID {
			ids, err := s.sample(t.Context(), n)
			require.NoError(t, err)
			return ids
		}
		require.Equal(t, waiting, every(1))
		require.Equal(t, []uuid.UUID{waiting[2], waiting[5]}, every(3))
		require.Empty(t, every(9))
	},
	"lists newest first, by page, status, number and owner": func(t *testing.T, s store) {
		var all []uuid.UUID
		for i := range 7 {
			o := testOrder(fmt.Sprintf("A-%d", i))
			insertOrders(t, s, o)
			all = append([]uuid.UUID{o.ID}, all...)
		}
		other := testOrder("A-0")
		other.Owner = "you"
		insertOrders(t, s, other)

		var seen []uuid.UUID
		for q := (query{limit: 3}); ; {
			page, err := s.list(t.Context(), q)
			require.NoError(t, err)
			seen = append(seen, ids(page.orders)...)
			if page.next == uuid.Nil {
				break
			}
			require.Len(t, page.orders, q.limit)
			q.before = page.next
			insertOrders(t, s, testOrder("")) // newer ones do not disturb the pages
		}
		require.Equal(t, all, seen)

		for i, status := range []contract.Status{contract.StatusSaved, contract.StatusRejected, contract.StatusDead, contract.StatusRetrying} {
			update(t, s, all[i], func(o *order) verdict { o.Status = status; return save })
			page, err := s.list(t.Context(), query{status: status, limit: 10})
			require.NoError(t, err)
			require.Equal(t, []uuid.UUID{all[i]}, ids(page.orders), status)
		}
		page, err := s.list(t.Context(), query{number: "A-3", limit: 10})
		require.NoError(t, err)
		require.Equal(t, all[3:4], ids(page.orders))
		page, err = s.list(t.Context(), query{owner: "you", limit: 10})
		require.NoError(t, err)
		require.Equal(t, []uuid.UUID{other.ID}, ids(page.orders))
	},
	"fills a page with no more than its bytes, and gives every order once": func(t *testing.T, s store) {
		var all []uuid.UUID
		for i := range 9 {
			o := testOrder("")
			insertOrders(t, s, o)
			update(t, s, o.ID, func(o *order) verdict {
				o.BackendStatus, o.BackendBody = 422, bytes.Repeat([]byte("x"), pageBytes/4)
				o.Problem = bytes.Repeat([]byte("y"), pageBytes/4)
				if i == 4 {
					o.Problem = bytes.Repeat([]byte("y"), 2*pageBytes)
				}
				return finishAs(contract.StatusRejected)(o)
			})
			all = append([]uuid.UUID{o.ID}, all...)
		}
		var pages []int
		var seen []uuid.UUID
		for q := (query{status: contract.StatusRejected, limit: 500}); ; {
			found, err := findPage(t.Context(), s, q, listReach)
			require.NoError(t, err)
			pages = append(pages, len(found.orders))
			seen = append(seen, ids(found.orders)...)
			if q.before = found.next; q.before == uuid.Nil {
				break
			}
		}
		require.Equal(t, all, seen)
		require.Equal(t, []int{2, 2, 1, 2, 2}, pages)
	},
	"looks at a bounded number of orders for a page, and gives every order once": func(t *testing.T, s store) {
		const reach = 4
		wanted := []query{{owner: "me"}, {owner: "me", status: contract.StatusSaved}, {status: contract.StatusSaved}, {owner: "me", status: contract.StatusAccepted},
			{owner: "me", status: contract.StatusRejected}, {owner: "nobody", status: contract.StatusDead}, {}}
		want := make([][]uuid.UUID, len(wanted))
		statuses := contract.Statuses()
		for i := range 40 {
			o := testOrder("")
			o.Owner = []string{"", "", "you", "me"}[i/3%4]
			insertOrders(t, s, o)
			status := statuses[i%len(statuses)]
			if i > 30 {
				status = contract.StatusAccepted
			}
			if status.Final() {
				update(t, s, o.ID, finishAs(status))
			}
			if status == contract.StatusRetrying {
				update(t, s, o.ID, func(o *order) verdict { o.Status = status; return save })
			}
			for j, q := range wanted {
				if q.owner == o.Owner && (q.status == "" || q.status == status) {
					want[j] = append([]uuid.UUID{o.ID}, want[j]...)
				}
			}
		}
		for j, q := range wanted {
			q.limit = 3
			var seen []uuid.UUID
			for {
				found, err := findPage(t.Context(), s, q, reach)
				require.NoError(t, err)
				require.LessOrEqual(t, len(found.orders), q.limit)
				seen = append(seen, ids(found.orders)...)
				if found.next == uuid.Nil {
					break
				}
				before := q.before
				q.before = found.next
				looked, err := s.floor(t.Context(), query{owner: q.owner, status: q.status, before: before}, reach)
				require.NoError(t, err)
				require.LessOrEqual(t, idTime(looked), idTime(found.next), "%+v: a page reached further than it may", q)
			}
			require.Equal(t, want[j], seen, "%+v", q)
		}
		found, err := findPage(t.Context(), s, query{owner: "nobody", status: contract.StatusDead, limit: 3}, reach)
		require.NoError(t, err)
		require.Empty(t, found.orders)
		require.NotZero(t, found.next, "the dead of the others are more than one page may look at")
		require.Equal(t, make([]byte, 10), found.next[6:], "and the cursor is none of their ids")
	},
	"purges what finished long ago and nothing else": func(t *testing.T, s store) {
		old, older, fresh, waiting := testOrder("A"), testOrder("B"), testOrder("C"), testOrder("D")
		month := 30 * 24 * time.Hour
		base := now()
		for i, o := range []*order{older, old, fresh, waiting} {
			o.AcceptedAt = base.Add(-2*month + time.Duration(i)*time.Second)
			copy(o.ID[:], idAt(o.AcceptedAt)[:6])
			o.PublishAt = time.Time{}
		}
		insertOrders(t, s, old, older, fresh, waiting)
		for _, o := range []*order{old, older, fresh} {
			update(t, s, o.ID, func(c *order) verdict {
				c.Status, c.FinishedAt = contract.StatusSaved, o.AcceptedAt
				if o == fresh {
					c.FinishedAt = base
				}
				return save
			})
		}
		for _, want := range []int{1, 1, 0} {
			n, err := s.purge(t.Context(), base.Add(-month), 1)
			require.NoError(t, err)
			require.Equal(t, want, n)
		}
		left, err := s.list(t.Context(), query{limit: 10})
		require.NoError(t, err)
		require.ElementsMatch(t, []uuid.UUID{fresh.ID, waiting.ID}, ids(left.orders))
		require.Equal(t, map[contract.Status]int64{contract.StatusAccepted: 1, contract.StatusSaved: 1, statusPurged: 2}, nonZero(s.counts()))
		insertOrders(t, s, testOrder("A"))
	},
	"lets readers and writers go on at once": func(t *testing.T, s store) {
		first := testOrder("first")
		insertOrders(t, s, first)
		var wg sync.WaitGroup
		errs := make(chan error, 4)
		for w := range 2 {
			wg.Go(func() {
				for i := range 50 {
					if err := s.write(context.Background(), []*change{{insert: testOrder(fmt.Sprintf("%d-%d", w, i))}}); err != nil {
						errs <- err
						return
					}
				}
			})
			wg.Go(func() {
				for range 50 {
					_, err := s.get(context.Background(), first.ID)
					_, err2 := s.list(context.Background(), query{limit: 20})
					_, err3 := s.claim(context.Background(), now(), time.Time{}, 100, 1<<20, skipNone)
					if err := errors.Join(err, err2, err3); err != nil {
						errs <- err
						return
					}
				}
			})
		}
		wg.Wait()
		close(errs)
		for err := range errs {
			require.NoError(t, err)
		}
		require.Equal(t, int64(101), s.counts()[contract.StatusAccepted])
	},
}

var testOrders struct {
	sync.Mutex
	n int
}

// testOrder returns an order that is due at once, each a little younger than
// the one before.
func testOrder(number string) *order {
	testOrders.Lock()
	defer testOrders.Unlock()
	testOrders.n++
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC).Add(time.Duration(testOrders.n) * time.Millisecond)
	o := &order{
		Number: number, Status: contract.StatusAccepted, ContentType: "application/json",
		Body: []byte(`{"orderNumber":"` + number + `"}`), AcceptedAt: at, UpdatedAt: at, PublishAt: at,
	}
	o.ID = newTestID()
	copy(o.ID[:], idAt(at)[:6])
	o.Size = len(o.Body)
	o.Hash[0] = byte(testOrders.n)
	return o
}

func newTestID() uuid.UUID {
	id, err := newID()
	if err != nil {
		panic(err)
	}
	return id
}

func writeAll(t *testing.T, s store, changes ...*change) {
	t.Helper()
	require.NoError(t, s.write(t.Context(), changes))
}

func insertOrders(t *testing.T, s store, orders ...*order) {
	t.Helper()
	for _, o := range orders {
		c := &change{insert: o}
		writeAll(t, s, c)
		require.True(t, c.changed, "order %q was not inserted", o.Number)
		require.Nil(t, c.found)
	}
}

func update(t *testing.T, s store, id uuid.UUID, f func(*order) verdict) *change {
	t.Helper()
	c := &change{id: id, update: f}
	writeAll(t, s, c)
	return c
}

func finishAs(status contract.Status) func(*order) verdict {
	return func(o *order) verdict {
		o.Status, o.FinishedAt, o.PublishAt = status, o.AcceptedAt.Add(time.Second), time.Time{}
		return save
	}
}

func skipNone(uuid.UUID) bool { return false }

func dueIDs(t *testing.T, s store, at time.Time) []uuid.UUID {
	t.Helper()
	found, err := s.claim(t.Context(), at, time.Time{}, 100, 1<<20, skipNone)
	require.NoError(t, err)
	return ids(found)
}

func ids(orders []*order) []uuid.UUID {
	var all []uuid.UUID
	for _, o := range orders {
		all = append(all, o.ID)
	}
	return all
}

func nonZero(counts map[contract.Status]int64) map[contract.Status]int64 {
	for status, n := range counts {
		if n == 0 {
			delete(counts, status)
		}
	}
	return counts
}
