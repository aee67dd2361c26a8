package intake

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"sluice/modules/contract"
)

// queue is a broker that keeps messages, in order, until the test takes or loses
// them.
type queue struct {
	mu        sync.Mutex
	waiting   []*message.Message
	accepted  map[string]int // publications by message id
	markers   int
	refuses   func(*message.Message) bool // if set, says which messages are not taken
	slow      time.Duration               // what a publish takes
	published func(*message.Message)      // if set, is called with each order
}

func (q *queue) Publish(_ string, msgs ...*message.Message) error {
	q.mu.Lock()
	slow := q.slow
	q.mu.Unlock()
	<-time.After(slow) // by the clock of the test's bubble
	q.mu.Lock()
	defer q.mu.Unlock()
	var err error
	msgs = slices.DeleteFunc(slices.Clone(msgs), func(msg *message.Message) bool {
		if q.refuses == nil || !q.refuses(msg) {
			return false
		}
		err = errors.New("message too large")
		return true
	})
	for _, msg := range msgs {
		if contract.IsMarker(msg) {
			q.markers++
		} else {
			q.accepted[msg.UUID]++
			if q.published != nil {
				q.published(msg)
			}
		}
	}
	q.waiting = append(q.waiting, msgs...)
	return err
}

func (q *queue) Close() error { return nil }

func (q *queue) slows(d time.Duration) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.slow = d
}

// take removes up to n messages from the head.
func (q *queue) take(n int) []*message.Message {
	q.mu.Lock()
	defer q.mu.Unlock()
	n = min(n, len(q.waiting))
	taken := q.waiting[:n]
	q.waiting = q.waiting[n:]
	return taken
}

// repeated is the number of messages that were published more than once.
func (q *queue) repeated() int {
	q.mu.Lock()
	defer q.mu.Unlock()
	n := 0
	for _, times := range q.accepted {
		n += times - 1
	}
	return n
}

// answer plays dispatch: orders are saved, markers come back.
func answer(t *testing.T, m *Module, msgs []*message.Message) {
	t.Helper()
	for _, msg := range msgs {
		if !contract.IsMarker(msg) {
			order, err := contract.DecodeSubmitted(msg)
			require.NoError(t, err)
			msg, err = contract.Outcome{Type: contract.TypeSaved, OrderID: order.OrderID, Attempt: order.Attempt}.Message()
			require.NoError(t, err)
		}
		require.NoError(t, m.project(msg))
	}
}

// sweeping runs a test in a bubble of its own time, with a module on a broker
// that keeps messages.
func sweeping(t *testing.T, test func(t *testing.T, m *Module, q *queue)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		q := &queue{accepted: map[string]int{}}
		m := runModule(t, newMemoryStore(), Bus{Publisher: q, Carrier: "test", System: "test"})
		test(t, m, q)
	})
}

func pass(d time.Duration) {
	<-time.After(d) // by the clock of the test's bubble
	synctest.Wait()
}

// submitNow accepts orders and returns when the relay has done its work.
func submitNow(t *testing.T, m *Module, n int) {
	t.Helper()
	for range n {
		o := testOrder("")
		o.AcceptedAt, o.PublishAt = now(), now()
		require.NoError(t, m.writer.do(t.Context(), &change{insert: o}))
	}
	synctest.Wait()
}

func waitingOrders(m *Module) int64 { return backlogOf(m.store.counts()) }

func TestOrdersWhoseMessagesTheBrokerLostBecomeDueAgain(t *testing.T) {
	sweeping(t, func(t *testing.T, m *Module, q *queue) {
		for round := range 3 {
			submitNow(t, m, 700)
			require.Len(t, q.take(700), 700) // the queue is purged
			for range 60 {
				pass(10 * time.Second)
				answer(t, m, q.take(10_000))
			}
			require.Zero(t, waitingOrders(m))
			require.Equal(t, 700*(round+1), q.repeated())
		}
	})
}

func TestALongQueueIsNotTakenForALostOne(t *testing.T) {
	sweeping(t, func(t *testing.T, m *Module, q *queue) {
		submitNow(t, m, 6000)
		for range 6000 / 5 {
			pass(5 * time.Second) // an hour and forty minutes in all
			answer(t, m, q.take(5))
		}
		require.LessOrEqual(t, q.markers, 60, "the longer the queue, the fewer markers")
		answer(t, m, q.take(100))
		require.Zero(t, waitingOrders(m))
		require.Zero(t, q.repeated())
	})
}

func TestOneLostOrderIsFoundInALongQueue(t *testing.T) {
	sweeping(t, func(t *testing.T, m *Module, q *queue) {
		submitNow(t, m, 1000)
		q.take(3)
		for range 2000 {
			pass(5 * time.Second)
			answer(t, m, q.take(2))
		}
		require.Zero(t, waitingOrders(m))
		require.Equal(t, 3, q.repeated())
	})
}

func TestAnAttemptThatTakesAllOfItsTimeIsNotTakenForLost(t *testing.T) {
	sweeping(t, func(t *testing.T, m *Module, q *queue) {
		submitNow(t, m, 20)
		slow := q.take(20)
		for range 4 * m.deps.AttemptTimeout / time.Second {
			pass(time.Second)
			answer(t, m, q.take(1)) // markers overtake it
		}
		answer(t, m, slow)
		pass(time.Hour)
		require.Zero(t, waitingOrders(m))
		require.Zero(t, q.repeated())
	})
}

func TestNobodyIsTakenForLostWhileTheBrokerBlocksPublishing(t *testing.T) {
	sweeping(t, func(t *testing.T, m *Module, q *queue) {
		submitNow(t, m, 20)
		held := q.take(20) // attempts whose outcomes cannot be published
		pass(15 * time.Second)
		answer(t, m, q.take(1)) // a first marker is back
		q.slows(10 * time.Minute)
		pass(5 * time.Minute)
		q.slows(0)
		pass(5*time.Minute + 30*time.Second)
		answer(t, m, q.take(10)) // markers overtake the outcomes
		answer(t, m, held)
		require.Zero(t, waitingOrders(m))
		require.Zero(t, q.repeated())
	})
}

func TestAMessageThatTheBrokerRefusesHoldsUpNoOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := &queue{accepted: map[string]int{}}
		s := newMemoryStore()
		bad := testOrder("bad")
		bad.AcceptedAt, bad.PublishAt = now(), now()
		require.NoError(t, s.write(t.Context(), []*change{{insert: bad}}))
		q.refuses = func(msg *message.Message) bool { return strings.HasPrefix(msg.UUID, bad.ID.String()) }
		m := runModule(t, s, Bus{Publisher: q, Carrier: "test", System: "test"})
		submitNow(t, m, 2000)
		for range 30 {
			pass(10 * time.Second)
			answer(t, m, q.take(10_000))
		}
		require.EqualValues(t, 1, waitingOrders(m))
		require.Less(t, q.repeated(), 10*relayGroup, "one group each time that it is tried again")
		q.mu.Lock()
		q.refuses = nil
		q.mu.Unlock()
		pass(2 * refusedPause)
		answer(t, m, q.take(10))
		require.Zero(t, waitingOrders(m))
	})
}

func TestWithGoChannelsWhatAnotherBrokerStillHasBecomesDue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, q := newMemoryStore(), &queue{accepted: map[string]int{}}
		m := runModule(t, s, Bus{Publisher: q, Window: 100, Carrier: "gochannel", System: "test"})
		submitNow(t, m, 1)
		answer(t, m, q.take(1))
		// A process that has not been told yet marks an order for its broker.
		late := testOrder("late")
		late.PublishAt = now().Add(time.Hour)
		require.NoError(t, s.write(t.Context(), []*change{{insert: late}, {marks: []mark{{id: late.ID}}, publishedAt: now()}}))
		pass(2 * forgetfulSweep)
		answer(t, m, q.take(1))
		require.Zero(t, waitingOrders(m))
	})
}

// claims records until when orders are claimed, and when they are given back.
type claims struct {
	store
	mu    sync.Mutex
	until map[uuid.UUID]time.Time
}

func (c *claims) claim(ctx context.Context, now, until time.Time, limit, size int, skip func(uuid.UUID) bool) ([]*order, error) {
	orders, err := c.store.claim(ctx, now, until, limit, size, skip)
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, o := range orders {
		c.until[o.ID] = until
	}
	return orders, err
}

func (c *claims) renew(_ context.Context, claimed []mark, until time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, m := range claimed {
		c.until[m.id] = until
	}
	return nil
}

func TestNoOrderIsPublishedAfterItsClaimHasRunOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		q := &queue{accepted: map[string]int{}}
		c := &claims{store: newMemoryStore(), until: map[uuid.UUID]time.Time{}}
		late := 0
		q.published = func(msg *message.Message) {
			c.mu.Lock()
			defer c.mu.Unlock()
			if id, _, _ := strings.Cut(msg.UUID, "."); !now().Before(c.until[uuid.MustParse(id)]) {
				late++
			}
		}
		q.slows(9 * time.Second)
		m := runModule(t, c, Bus{Publisher: q, Carrier: "test", System: "test"})
		submitNow(t, m, 1000)
		pass(10 * time.Minute)
		require.Len(t, q.accepted, 1000)
		require.Zero(t, q.repeated())
		c.mu.Lock()
		defer c.mu.Unlock()
		require.Zero(t, late, "other processes may have published them by then")
	})
}

func TestMarkersRestWhereNobodyIsSilent(t *testing.T) {
	sweeping(t, func(t *testing.T, m *Module, q *queue) {
		pass(time.Hour)
		submitNow(t, m, 10)
		answer(t, m, q.take(10))
		pass(time.Hour)
		require.Zero(t, q.markers)
	})
}

func TestOrdersOfAnotherBrokerBecomeDueAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newMemoryStore()
		// published runs a process on a broker and returns how many orders it
		// published.
		published := func(carrier string, submit int) int {
			q := &queue{accepted: map[string]int{}}
			ctx, stop := context.WithCancel(t.Context())
			defer stop()
			m, wait := startModule(ctx, t, s, Bus{Publisher: q, Carrier: carrier, System: "test"})
			submitNow(t, m, submit)
			pass(time.Second)
			stop()
			wait()
			return len(q.take(10_000))
		}
		require.Equal(t, 700, published("first", 700))
		require.Zero(t, published("first", 0), "it has them already")
		require.Equal(t, 701, published("second", 1))
		require.Zero(t, published("second", 0))
		require.Equal(t, 702, published("first", 1))
	})
}
