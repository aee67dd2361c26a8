package intake

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"sluice/modules/contract"
)

func TestWaitersAreToldAndForgotten(t *testing.T) {
	var w waiters
	first, second := &order{ID: uuid.New()}, &order{Attempts: 1}
	a, b, c := w.watch(first.ID), w.watch(first.ID), w.watch(uuid.New())
	w.leave(c)
	w.notify(first.ID, first)
	w.notify(first.ID, second)
	w.leave(b)
	w.notify(first.ID, nil)
	require.Same(t, first, <-a.news)
	require.Same(t, second, <-a.news)
	require.Nil(t, <-a.news)
	require.Len(t, b.news, 2)
	require.Empty(t, c.news)
	w.leave(a)
	require.Empty(t, w.waited)
}

func TestAWaiterThatTakesNothingKeepsTheLatest(t *testing.T) {
	var w waiters
	id := uuid.New()
	a := w.watch(id)
	for n := range 10 {
		w.notify(id, &order{Attempts: n})
	}
	require.Len(t, a.news, newsKept)
	require.Equal(t, 10-newsKept, (<-a.news).Attempts)
	w.leave(a)
}

func TestOnlyOrdersThatAreWaitedForAreLookedAt(t *testing.T) {
	var w waiters
	o := &order{ID: uuid.New(), Status: contract.StatusRetrying, Attempts: 2}
	a, b := w.watch(o.ID), w.watch(uuid.New())
	w.heard([]uuid.UUID{uuid.New()})
	require.Empty(t, w.takeStale())
	w.notify(o.ID, o)
	w.heard([]uuid.UUID{o.ID, o.ID})
	<-w.wake()
	require.Equal(t, []version{{o.ID, 2, contract.StatusRetrying}}, w.takeStale())
	w.heard(nil)
	require.Len(t, w.takeStale(), 2, "any may have changed")
	w.heard(nil)
	w.leave(a)
	w.leave(b)
	require.Empty(t, w.takeStale())
}

func TestStatesOfAnOrderAreInOrder(t *testing.T) {
	states := []*order{
		{Status: contract.StatusAccepted},
		{Status: contract.StatusRetrying, Attempts: 1},
		{Status: contract.StatusRetrying, Attempts: 2},
		{Status: contract.StatusDead, Attempts: 3},
		{Status: contract.StatusRetrying, Attempts: 3, AttemptBase: 3}, // replayed
		{Status: contract.StatusSaved, Attempts: 4, AttemptBase: 3},
	}
	for i, a := range states {
		for j, b := range states {
			require.Equal(t, i > j, a.after(b), "%v after %v", a, b)
		}
	}
	dead, late := &order{Status: contract.StatusDead, Attempts: 3}, &order{Status: contract.StatusSaved, Attempts: 3}
	require.True(t, late.after(dead), "news of a save came late")
}

// ask sends a request to the module's routes and returns the answer when it is
// complete.
func ask(m *Module, method, path string, header ...string) *httptest.ResponseRecorder {
	return sendTo(m, method, path, "", header...)
}

// sendTo is ask with a body.
func sendTo(m *Module, method, path, body string, header ...string) *httptest.ResponseRecorder {
	mux := http.NewServeMux()
	m.Routes(mux)
	r := httptest.NewRequest(method, path, strings.NewReader(body))
	if body != "" {
		r.Header.Set("Content-Type", "application/json")
	}
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Set(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	mux.ServeHTTP(w, r)
	return w
}

func TestAProblemAfterAWaitAppliesNoPreference(t *testing.T) {
	m, _, _ := testModule(t, 0)
	o := submit(t, m, "A-1")
	answered := make(chan *httptest.ResponseRecorder, 1)
	go func() { answered <- ask(m, http.MethodGet, location(o), "Prefer", "wait=20") }()
	soon(t, func() bool { return m.waiters.waiting() == 1 })
	require.NoError(t, m.writer.do(t.Context(), &change{id: o.ID, update: func(*order) verdict { return remove }}))
	a := <-answered
	require.Equal(t, http.StatusNotFound, a.Code)
	require.Empty(t, a.Header().Get("Preference-Applied"))
}

// waiting is how many orders are waited for.
func (w *waiters) waiting() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return len(w.waited)
}

// What one process makes of an order, a client of another one is told: at once,
// by the news, not by the look that comes now and then.
func TestThoseWhoWaitAtAnotherProcessAreTold(t *testing.T) {
	one, two, _ := openTwice(t)
	log := &topicLog{}
	here, there := runModule(t, one, Bus{Publisher: log, System: "test"}), runModule(t, two, Bus{Publisher: log, System: "test"})
	soon(t, func() bool { return one.news.others.Load() && two.news.others.Load() })

	const n = 500 // more than one payload holds
	var answers sync.WaitGroup
	got := make([]int, n)
	var orders []*order
	for i := range n {
		o := submit(t, here, fmt.Sprintf("A-%d", i))
		orders = append(orders, o)
		answers.Go(func() { got[i] = statusOf(ask(there, http.MethodGet, location(o), "Prefer", "wait=20")) })
	}
	soon(t, func() bool { return there.waiters.waiting() == n })
	began := time.Now()
	var outcomes sync.WaitGroup
	for _, o := range orders {
		outcomes.Go(func() {
			out := outcome(contract.TypeSaved, 1)
			out.OrderID = o.ID.String()
			project(t, here, out)
		})
	}
	outcomes.Wait()
	stored := time.Since(began)
	answers.Wait()
	t.Logf("%d outcomes were stored after %v, and all clients of the other process answered after %v", n, stored, time.Since(began))
	for _, status := range got {
		require.Equal(t, http.StatusOK, status)
	}
	require.Zero(t, there.waiters.waiting())
}

func statusOf(w *httptest.ResponseRecorder) int { return w.Code }

func TestNewsThatWasLostIsFound(t *testing.T) {
	one, two, _ := openTwice(t)
	there := runModule(t, two, Bus{Publisher: &topicLog{}, System: "test"})
	kept, removed := testOrder("A-1"), testOrder("A-2")
	removed.Direct = true
	insertOrders(t, one, kept, removed)
	answers := make(chan int, 2)
	for _, o := range []*order{kept, removed} {
		go func() { answers <- statusOf(ask(there, http.MethodGet, location(o), "Prefer", "wait=20")) }()
	}
	soon(t, func() bool { return there.waiters.waiting() == 2 })
	require.False(t, one.news.others.Load(), "it does not listen, so it tells nobody")
	update(t, one, kept.ID, finishAs(contract.StatusSaved))
	require.Equal(t, http.StatusOK, <-answers)
	update(t, one, removed.ID, func(*order) verdict { return remove })
	require.Equal(t, http.StatusNotFound, <-answers)
}

func TestPostgresNewsSurviveALostConnection(t *testing.T) {
	one, two, dsn := openTwice(t)
	bus := Bus{Publisher: &topicLog{}, System: "test"}
	runModule(t, one, bus)
	there := runModule(t, two, bus)
	bothListen := func() bool {
		return askPostgres[int](t, dsn, `SELECT count(*)::int FROM pg_stat_activity WHERE datname = current_database() AND query LIKE '%pg_locks%' AND pid <> pg_backend_pid()`) == 2
	}
	soon(t, bothListen)
	require.Equal(t, 2, askPostgres[int](t, dsn, `SELECT count(pg_terminate_backend(pid))::int FROM pg_stat_activity
		WHERE datname = current_database() AND query LIKE '%pg_locks%' AND pid <> pg_backend_pid()`))
	soon(t, bothListen)
	soon(t, one.news.others.Load)
	o := testOrder("A-1")
	insertOrders(t, one, o)
	w := there.waiters.watch(o.ID)
	defer there.waiters.leave(w)
	update(t, one, o.ID, finishAs(contract.StatusSaved))
	require.Equal(t, contract.StatusSaved, (<-w.news).Status)
}

func TestPostgresTellsOfMoreThanItKeeps(t *testing.T) {
	n := &postgresNews{self: "12345678901234567890123456789012", dirty: make(chan struct{}, 1)}
	n.tell(make([][16]byte, 1))
	require.Empty(t, n.payloads(), "nobody listens")
	n.others.Store(true)
	n.tell(make([][16]byte, newsPending))
	n.tell(make([][16]byte, 1))
	payloads := n.payloads()
	require.Equal(t, n.self, payloads[0], "some were missed")
	require.Len(t, payloads, 1+newsPending/newsIDs)
	other := &postgresNews{self: "x2345678901234567890123456789012"}
	heard := 0
	for i, payload := range payloads {
		require.Less(t, len(payload), 8000)
		other.heard(payload, func(ids []uuid.UUID) {
			heard += len(ids)
			require.Equal(t, i == 0, ids == nil)
		})
		n.heard(payload, func([]uuid.UUID) { require.Fail(t, "its own news") })
	}
	require.Equal(t, newsPending, heard)
	require.True(t, other.others.Load())
	other.heard("of somebody else", func([]uuid.UUID) { require.Fail(t, "no news") })
}
