package intake

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net/http/httptest"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"sluice/modules/contract"
)

// simulated is a simulated gateway whose clock is the test's.
type simulated struct {
	now    time.Time
	counts map[contract.Status]int64
	f      *forecast
}

func newSimulated() *simulated {
	q := &simulated{now: time.Now(), counts: map[contract.Status]int64{}}
	q.f = newForecast(func() map[contract.Status]int64 { return q.counts })
	q.f.seeded = true
	return q
}

// pass lets time pass, with so many orders accepted and finished a second.
func (q *simulated) pass(d time.Duration, accepted, finished float64) {
	const step = 10 * time.Millisecond
	var in, out float64
	for ; d > 0; d -= step {
		q.now = q.now.Add(step)
		in, out = in+accepted*step.Seconds(), out+finished*step.Seconds()
		for ; in >= 1; in-- {
			q.counts[contract.StatusAccepted]++
		}
		for ; out >= 1 && q.counts[contract.StatusAccepted] > 0; out-- {
			q.counts[contract.StatusAccepted]--
			q.counts[contract.StatusSaved]++
		}
		q.f.look(q.now)
	}
}

// at returns what is expected of an order that was accepted so long ago.
func (q *simulated) at(ago time.Duration) expectation {
	return q.f.of(&order{Status: contract.StatusAccepted, AcceptedAt: q.now.Add(-ago)}, q.now)
}

func TestAnEstimateIsThePlaceInTheQueueByTheRateOfTheDrain(t *testing.T) {
	q := newSimulated()
	q.pass(10*time.Second, 5000, 0) // a backlog of 50,000
	e := q.at(0)
	require.EqualValues(t, 50_000, e.position)
	require.Zero(t, e.completion, "nothing has been finished yet")
	require.InDelta(t, 10, e.retryAfter.Seconds(), 0.5, "as long as nothing has moved")

	q.pass(2*time.Second, 0, 1000)
	for ago, place := range map[time.Duration]float64{2 * time.Second: 48_000, 7 * time.Second: 23_000, 11 * time.Second: 3_000} {
		e := q.at(ago)
		require.InEpsilon(t, place, float64(e.position), 0.02, ago)
		require.InEpsilon(t, place/1000, e.completion.Sub(q.now).Seconds(), 0.05, ago)
		require.Equal(t, e.completion.Sub(q.now), e.retryAfter)
	}
	require.EqualValues(t, 1, q.at(time.Minute).position, "the oldest is next")

	q.pass(10*time.Second, 1000, 200) // the backend has become slower
	require.InEpsilon(t, float64(q.counts[contract.StatusAccepted])/200, q.at(0).completion.Sub(q.now).Seconds(), 0.1)
}

func TestAnEstimateIsNotGivenWhereNothingIsKnown(t *testing.T) {
	q := newSimulated()
	q.pass(time.Second, 1000, 0)
	q.pass(5*time.Second, 100, 100)
	require.NotZero(t, q.at(0).completion)
	q.pass(30*time.Second, 10, 0) // the backend is down
	e := q.at(0)
	require.Zero(t, e.completion)
	require.NotZero(t, e.position)
	require.InDelta(t, 30, e.retryAfter.Seconds(), 1)
	q.pass(3*time.Minute, 1, 0)
	require.Equal(t, retryUnknown, q.at(0).retryAfter)
	require.Equal(t, retryUnknown, q.f.patience(q.now))
	q.pass(3*time.Second, 10, 500) // it is back, and faster
	require.InEpsilon(t, float64(q.counts[contract.StatusAccepted])/500, q.at(0).completion.Sub(q.now).Seconds(), 0.1)
}

func TestTheDrainOfASmallBacklogSaysNothingOfALargeOne(t *testing.T) {
	q := newSimulated()
	q.pass(time.Minute, 20, 20) // idle half of the time
	q.pass(100*time.Millisecond, 20_000, 1000)
	q.pass(time.Second, 1000, 1000)
	require.InEpsilon(t, float64(q.counts[contract.StatusAccepted])/1000, q.at(0).completion.Sub(q.now).Seconds(), 0.1)
}

func TestTheDrainIsSeenInLeaps(t *testing.T) {
	q := newSimulated()
	q.pass(time.Second, 10_000, 0)
	for range 8 { // another process handles the outcomes
		q.pass(990*time.Millisecond, 0, 0)
		q.pass(10*time.Millisecond, 0, 50_000)
	}
	q.pass(700*time.Millisecond, 0, 0)
	require.InEpsilon(t, 6000.0/500, q.at(0).completion.Sub(q.now).Seconds(), 0.05)
}

// Where all calls begin at once and take equally long, orders are finished in
// bursts, which take a while themselves.
func TestTheDrainComesInBursts(t *testing.T) {
	for _, apart := range []time.Duration{400 * time.Millisecond, 640 * time.Millisecond, 2 * time.Second, 5 * time.Second} {
		for _, lasts := range []time.Duration{10 * time.Millisecond, 80 * time.Millisecond, 160 * time.Millisecond} {
			t.Run(fmt.Sprintf("%s apart, %s long", apart, lasts), func(t *testing.T) {
				q := newSimulated()
				q.pass(100*time.Millisecond, 50_000, 0)
				rate := 64 / apart.Seconds()
				for burst := range 10 {
					q.pass(apart-lasts, 0, 0)
					for at := time.Duration(0); at < lasts; at += 10 * time.Millisecond {
						q.pass(10*time.Millisecond, 0, 6400/float64(lasts/(10*time.Millisecond)))
						if e := q.at(0); !e.completion.IsZero() {
							require.InEpsilon(t, float64(q.counts[contract.StatusAccepted])/rate, e.completion.Sub(q.now).Seconds(), 0.15, "in burst %d", burst+1)
						} else {
							require.Less(t, burst, 3, "it must be known by now")
						}
					}
				}
			})
		}
	}
}

func TestBurstsOfThePastSayNothingOfASteadyDrain(t *testing.T) {
	q := newSimulated()
	q.pass(100*time.Millisecond, 500_000, 0)
	for range 8 { // another process handles the outcomes
		q.pass(990*time.Millisecond, 0, 0)
		q.pass(10*time.Millisecond, 0, 200_000)
	}
	q.pass(5*time.Second, 0, 400)
	require.InEpsilon(t, float64(q.counts[contract.StatusAccepted])/400, q.at(0).completion.Sub(q.now).Seconds(), 0.3)

	q = newSimulated()
	q.pass(100*time.Millisecond, 20, 0)
	q.pass(20*time.Second, 20, 20) // always one or two, with quiet in between
	q.pass(100*time.Millisecond, 200_000, 1000)
	q.pass(time.Second, 1000, 1000)
	require.InEpsilon(t, float64(q.counts[contract.StatusAccepted])/1000, q.at(0).completion.Sub(q.now).Seconds(), 0.1)
}

func TestAStragglerIsNotABurst(t *testing.T) {
	q := newSimulated()
	q.pass(100*time.Millisecond, 50_000, 0)
	for range 3 {
		q.pass(400*time.Millisecond, 0, 0)
		q.pass(70*time.Millisecond, 0, 900) // 63
		q.pass(200*time.Millisecond, 0, 0)
		q.pass(10*time.Millisecond, 0, 100) // one more
		q.pass(130*time.Millisecond, 0, 0)
		if e := q.at(0); !e.completion.IsZero() {
			require.InEpsilon(t, float64(q.counts[contract.StatusAccepted])/79, e.completion.Sub(q.now).Seconds(), 0.25)
		}
	}
	require.NotZero(t, q.at(0).completion)
}

func TestTheFirstOrderOfAnIdleGatewayTakesAsLongAsAnAttempt(t *testing.T) {
	q := newSimulated()
	q.pass(time.Second, 0, 0)
	q.counts[contract.StatusAccepted] = 1
	require.Zero(t, q.at(0).completion)
	q.f.attempted(50 * time.Millisecond)
	e := q.at(0)
	require.EqualValues(t, 1, e.position)
	require.Equal(t, q.now.Add(50*time.Millisecond), e.completion)
	require.EqualValues(t, 1, seconds(e.retryAfter))
}

func TestARetriedOrderIsExpectedAfterItsNextAttempt(t *testing.T) {
	q := newSimulated()
	q.pass(time.Second, 1000, 0)
	at := q.now.Add(40 * time.Second)
	o := &order{Status: contract.StatusRetrying, Attempts: 1, AcceptedAt: q.now, UpdatedAt: q.now, History: []attempt{{NextAttemptAt: &at}}}
	e := q.f.of(o, q.now)
	require.Zero(t, e.position, "it is not in the queue")
	require.Equal(t, 40*time.Second, e.retryAfter)
	q.pass(2*time.Second, 100, 100)
	require.Equal(t, at, q.f.of(o, q.now).completion)
	at = q.now
	q.counts[contract.StatusRetrying]++
	e = q.f.of(o, q.now)
	require.InEpsilon(t, float64(q.counts[contract.StatusAccepted]), float64(e.position), 0.01)

	replayed := &order{Status: contract.StatusRetrying, AcceptedAt: q.now.Add(-time.Hour), UpdatedAt: q.now}
	require.Equal(t, e.position, q.f.of(replayed, q.now).position)
}

func TestAForecastTakesNoMoreMemoryForALongerBacklog(t *testing.T) {
	q := newSimulated()
	q.pass(10*time.Minute, 5000, 1000)
	require.EqualValues(t, 2_400_000, q.counts[contract.StatusAccepted])
	require.LessOrEqual(t, len(q.f.ranks), tallyPoints)
	require.LessOrEqual(t, len(q.f.drains), 2*int(2*drainMost/drainEvery))
	require.LessOrEqual(t, cap(q.f.ranks), 2*tallyPoints)
	for _, ago := range []time.Duration{0, time.Minute, 4 * time.Minute, 7 * time.Minute} {
		require.InDelta(t, 2_400_000-5000*ago.Seconds(), float64(q.at(ago).position), 30_000, ago)
	}
	q.pass(time.Minute, 0, 50_000)
	q.pass(10*time.Second, 100, 100)
	q.counts[contract.StatusAccepted] = 1
	require.EqualValues(t, 1, q.at(0).position)
}

// A forecast that begins with a backlog knows as much as one that saw it grow.
func TestAForecastIsSeededFromTheStore(t *testing.T) {
	for _, kind := range storesUnderTest() {
		t.Run(kind.name, func(t *testing.T) {
			s := kind.open(t)
			t.Cleanup(func() { require.NoError(t, s.close()) })
			const n = 3000
			var changes []*change
			for range n {
				changes = append(changes, &change{insert: testOrder("")})
			}
			for group := range slices.Chunk(changes, groupSize) {
				writeAll(t, s, group...)
			}
			update(t, s, changes[0].insert.ID, finishAs(contract.StatusSaved))
			f := newForecast(s.counts)
			require.Zero(t, f.of(changes[n/2].insert, time.Now()).position, "not known yet")
			require.NoError(t, f.seed(t.Context(), s))
			last := int64(0)
			for i, c := range changes[1:] {
				p := f.of(c.insert, time.Now()).position
				require.InDelta(t, i+1, p, n/tallyParts+2)
				require.GreaterOrEqual(t, p, last)
				last = p
			}
		})
	}
}

// heldCalls is a backend of POST /orders/sync that answers when it is told to.
type heldCalls struct {
	begun   chan struct{}
	outcome chan string // type of the outcome
}

func (h heldCalls) Attempt(_ context.Context, s contract.Submitted) (contract.Outcome, error) {
	h.begun <- struct{}{}
	return contract.Outcome{Type: <-h.outcome, OrderID: s.OrderID, Attempt: s.Attempt, StatusCode: 200}, nil
}

// Dispatch is stuck, and its ten orders stay where they are, whatever comes and
// goes beside them.
func TestDirectOrdersChangeNothingForThoseInTheQueue(t *testing.T) {
	for _, kind := range storesUnderTest() {
		t.Run(kind.name, func(t *testing.T) {
			s := kind.open(t)
			var last *order
			for range 10 {
				last = testOrder("")
				insertOrders(t, s, last)
			}
			m := runModule(t, s, Bus{Publisher: &topicLog{}, System: "test"})
			backend := heldCalls{make(chan struct{}), make(chan string)}
			m.deps.Direct = backend
			position := func(path string) int64 {
				var res resource
				require.NoError(t, json.Unmarshal(ask(m, "GET", path).Body.Bytes(), &res))
				require.Nil(t, res.EstimatedCompletion, "nothing of the queue was finished")
				if res.QueuePosition == nil {
					return 0
				}
				return *res.QueuePosition
			}
			soon(t, func() bool { return position(location(last)) == 10 })

			post := func(path, number string) *httptest.ResponseRecorder {
				return sendTo(m, "POST", path, `{"orderNumber": "`+number+`", "customerId": "C", "currency": "EUR", "items": [{"sku": "S", "quantity": 1, "unitPrice": 1}]}`)
			}
			var calls sync.WaitGroup
			codes := make([]int, 20)
			for i := range codes {
				calls.Go(func() { codes[i] = post("/orders/sync", fmt.Sprint("D-", i)).Code })
				<-backend.begun
			}
			require.EqualValues(t, 30, waitingOrders(m), "the backlog is of all")
			require.EqualValues(t, 10, position(location(last)))
			var page struct{ Orders []resource }
			require.NoError(t, json.Unmarshal(ask(m, "GET", "/orders?orderNumber=D-0").Body.Bytes(), &page))
			require.Zero(t, position(page.Orders[0].Links.Self), "it is not in the queue")

			backend.outcome <- contract.TypeAttemptFailed // of any of them
			for range len(codes) - 1 {
				backend.outcome <- contract.TypeSaved
			}
			calls.Wait()
			require.EqualValues(t, 10, position(location(last)))
			for until := time.Now().Add(2 * drainSpanMin); time.Now().Before(until); {
				calls.Go(func() { post("/orders/sync", "E-1") })
				<-backend.begun
				backend.outcome <- contract.TypeRejected
				calls.Wait()
			}
			require.EqualValues(t, 10, position(location(last)))

			// An order is promised to a second client, and in the queue from then on.
			calls.Go(func() { post("/orders/sync", "F-1") })
			<-backend.begun
			repeat := post("/orders", "F-1")
			require.Equal(t, 202, repeat.Code)
			require.InDelta(t, 11, position(repeat.Header().Get("Location")), 1)
			require.EqualValues(t, 10, position(location(last)))
			backend.outcome <- contract.TypeAttemptFailed
			calls.Wait()
		})
	}
}

func TestASeedThatFailsIsTriedAgain(t *testing.T) {
	s := &unsampled{store: newMemoryStore()}
	s.fails = 1
	insertOrders(t, s.store, testOrder("A-1"))
	m := runModule(t, s, Bus{Publisher: &topicLog{}, System: "test"})
	soon(t, func() bool {
		m.outlook.mu.Lock()
		defer m.outlook.mu.Unlock()
		return m.outlook.seeded
	})
}

// unsampled is a store that cannot be sampled at first.
type unsampled struct {
	store
	fails int
}

func (s *unsampled) sample(ctx context.Context, n int) ([]uuid.UUID, error) {
	if s.fails > 0 {
		s.fails--
		return nil, fmt.Errorf("busy")
	}
	return s.store.sample(ctx, n)
}

func TestSecondsOfRetryAfterAreRoundedUp(t *testing.T) {
	for d, want := range map[time.Duration]int64{0: 1, time.Millisecond: 1, time.Second: 1, 1001 * time.Millisecond: 2, retryMost: 3600} {
		require.Equal(t, want, seconds(d), d)
	}
	require.Positive(t, perSecond(math.MaxInt64, 1e-9))
}

func TestTheTagOfAWaitingOrderIsOfItsState(t *testing.T) {
	m, _, _ := testModule(t, 0)
	o := submit(t, m, "A-1")
	first := ask(m, "GET", location(o))
	tag := first.Header().Get("ETag")
	require.Regexp(t, `^W/"[^"]+"$`, tag)
	for range 5 {
		submit(t, m, "")
	}
	for _, field := range []string{tag, tag[2:], `"x", ` + tag, "*"} {
		again := ask(m, "GET", location(o), "If-None-Match", field)
		require.Equal(t, 304, again.Code, field)
		require.Equal(t, tag, again.Header().Get("ETag"))
	}
	out := outcome(contract.TypeAttemptFailed, 1)
	out.OrderID = o.ID.String()
	project(t, m, out)
	require.Equal(t, 200, ask(m, "GET", location(o), "If-None-Match", tag).Code)
}
