package intake

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	tracenoop "go.opentelemetry.io/otel/trace/noop"

	"sluice/modules/contract"
)

// brokenStore is a store whose writes of one kind fail while it is told to.
type brokenStore struct {
	store
	mu    sync.Mutex
	fails func(*change) bool
	tries int // writes that failed
}

var errDiskFull = errors.New("disk full")

func (s *brokenStore) write(ctx context.Context, changes []*change) error {
	s.mu.Lock()
	for _, c := range changes {
		if s.fails != nil && s.fails(c) {
			s.tries++
			s.mu.Unlock()
			return errDiskFull
		}
	}
	s.mu.Unlock()
	return s.store.write(ctx, changes)
}

func (s *brokenStore) breaks(fails func(*change) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fails, s.tries = fails, 0
}

func (s *brokenStore) failures() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.tries
}

// topicLog is a publisher that remembers, and refuses while it is told to.
type topicLog struct {
	mu       sync.Mutex
	messages map[string][]*message.Message
	refuses  bool
}

func (l *topicLog) Publish(topic string, msgs ...*message.Message) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.refuses {
		return errors.New("broker is away")
	}
	if l.messages == nil {
		l.messages = map[string][]*message.Message{}
	}
	l.messages[topic] = append(l.messages[topic], msgs...)
	return nil
}

func (l *topicLog) Close() error { return nil }

func (l *topicLog) refuse(yes bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.refuses = yes
}

// of returns the ids of the messages of a topic.
func (l *topicLog) of(topic string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	var all []string
	for _, msg := range l.messages[topic] {
		all = append(all, msg.UUID)
	}
	return all
}

// testModule is a running module on a store that can break and a publisher
// that remembers.
func testModule(t *testing.T, window int) (*Module, *brokenStore, *topicLog) {
	t.Helper()
	s, log := &brokenStore{store: newMemoryStore()}, &topicLog{}
	return runModule(t, s, Bus{Publisher: log, Window: window, System: "test"}), s, log
}

// runModule runs a module until the end of the test.
func runModule(t *testing.T, s store, bus Bus) *Module {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	m, wait := startModule(ctx, t, s, bus)
	t.Cleanup(func() {
		stop()
		wait()
	})
	return m
}

// startModule runs a module until ctx ends. The second result waits for that
// and closes it, but not its store.
func startModule(ctx context.Context, t *testing.T, s store, bus Bus) (m *Module, wait func()) {
	t.Helper()
	m, err := newModule(t.Context(), DefaultConfig(), DefaultStoreConfig(), threeTry, Deps{
		Logger:         slog.New(slog.DiscardHandler),
		TracerProvider: tracenoop.NewTracerProvider(),
		MeterProvider:  metricnoop.NewMeterProvider(),
		Propagator:     propagation.TraceContext{},
		Bus:            bus,
		AttemptTimeout: 10 * time.Second,
		Silence:        60 * time.Second,
	}, s)
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = m.Run(ctx) // ends without an error
	}()
	return m, func() {
		<-done
		require.NoError(t, m.Close())
	}
}

func submit(t *testing.T, m *Module, number string) *order {
	t.Helper()
	o := testOrder(number)
	require.NoError(t, m.writer.do(t.Context(), &change{insert: o}))
	return o
}

func soon(t *testing.T, condition func() bool) {
	t.Helper()
	require.Eventually(t, condition, 20*time.Second, time.Millisecond)
}

func TestRelayPublishesAndMarks(t *testing.T) {
	m, s, log := testModule(t, 0)
	o := submit(t, m, "A-1")
	soon(t, func() bool { return len(log.of(contract.TopicSubmitted)) == 1 })
	soon(t, func() bool {
		got, err := s.get(t.Context(), o.ID)
		return err == nil && got.PublishAt.IsZero()
	})
	require.Equal(t, []string{o.ID.String() + ".1"}, log.of(contract.TopicSubmitted))
}

// Their process is gone, or what became of them could not be stored.
func TestRelayTakesOverDirectOrdersThatAreDue(t *testing.T) {
	for _, kind := range storesUnderTest() {
		for _, window := range []int{0, 10} {
			t.Run(fmt.Sprint(kind.name, ", window of ", window), func(t *testing.T) {
				s, log := kind.open(t), &topicLog{}
				left, ended := testOrder("A-1"), testOrder("A-2")
				left.Direct, ended.Direct = true, true
				insertOrders(t, s, left, ended)
				runModule(t, &lateEnd{store: s, id: ended.ID}, Bus{Publisher: log, Window: window, System: "test"})
				soon(t, func() bool { return len(log.of(contract.TopicSubmitted)) > 0 })
				require.Equal(t, []string{left.submitted().Message().UUID}, log.of(contract.TopicSubmitted))
				got, err := s.get(t.Context(), left.ID)
				require.NoError(t, err)
				require.False(t, got.Direct)
				require.Equal(t, map[contract.Status]int64{contract.StatusAccepted: 1, contract.StatusSaved: 1, statusDirectFinal: 1}, nonZero(s.counts()))
			})
		}
	}
}

// lateEnd is a store in which an order becomes final when it has just been
// claimed.
type lateEnd struct {
	store
	id uuid.UUID
}

func (s *lateEnd) claim(ctx context.Context, now, until time.Time, limit, size int, skip func(uuid.UUID) bool) ([]*order, error) {
	found, err := s.store.claim(ctx, now, until, limit, size, skip)
	end := &change{id: s.id, update: func(o *order) verdict { return o.apply(outcome(contract.TypeSaved, 1), now, threeTry) }}
	return found, errors.Join(err, s.store.write(ctx, []*change{end}))
}

func TestRelayDoesNotPublishAgainWhatItCouldNotMark(t *testing.T) {
	m, s, log := testModule(t, 0)
	s.breaks(func(c *change) bool { return c.marks != nil })
	o := submit(t, m, "A-1")
	soon(t, func() bool { return s.failures() >= 3 })
	require.Len(t, log.of(contract.TopicSubmitted), 1, "published again instead of marked again")
	s.breaks(nil)
	submit(t, m, "A-2")
	soon(t, func() bool { return len(log.of(contract.TopicSubmitted)) == 2 })
	got, err := s.get(t.Context(), o.ID)
	require.NoError(t, err)
	require.True(t, got.PublishAt.IsZero())
}

func TestRelayGoesOnWhenTheBrokerIsBack(t *testing.T) {
	m, _, log := testModule(t, 0)
	log.refuse(true)
	for i := range 3 {
		submit(t, m, fmt.Sprintf("A-%d", i))
	}
	log.refuse(false)
	soon(t, func() bool { return len(log.of(contract.TopicSubmitted)) == 3 })
}

func TestRelayKeepsToItsWindow(t *testing.T) {
	m, _, log := testModule(t, 2)
	var orders []*order
	for i := range 5 {
		orders = append(orders, submit(t, m, fmt.Sprintf("A-%d", i)))
	}
	for n := 2; n <= 5; n++ {
		soon(t, func() bool { return len(log.of(contract.TopicSubmitted)) == n })
		// Nothing more comes until an attempt has ended.
		limit, _ := m.relay.room()
		require.Zero(t, limit)
		out := outcome(contract.TypeSaved, 1)
		out.OrderID = orders[n-2].ID.String()
		project(t, m, out)
	}
	require.Len(t, log.of(contract.TopicSubmitted), 5)
}

func TestRelayWithAWindowPublishesOnceWhileAnAttemptIsUnderWay(t *testing.T) {
	m, s, log := testModule(t, 10)
	first := submit(t, m, "A-1")
	for n := 1; n <= 2; n++ {
		soon(t, func() bool { return len(log.of(contract.TopicSubmitted)) == 2*n-1 })
		// Other orders come and go meanwhile.
		other := submit(t, m, fmt.Sprintf("B-%d", n))
		soon(t, func() bool { return len(log.of(contract.TopicSubmitted)) == 2*n })
		out := outcome(contract.TypeSaved, 1)
		out.OrderID = other.ID.String()
		project(t, m, out)
		failed := outcome(contract.TypeAttemptFailed, 1) // the second time it is late news
		failed.OrderID = first.ID.String()
		project(t, m, failed)
	}
	require.Equal(t, first.ID.String()+".2", log.of(contract.TopicSubmitted)[2])
	got, err := s.get(t.Context(), first.ID)
	require.NoError(t, err)
	require.True(t, got.due(now()), "it stays due until its outcome is known")
	submit(t, m, "C")
	soon(t, func() bool { return len(log.of(contract.TopicSubmitted)) == 5 })
}

func TestRelayBoundsTheBytesOfItsWindow(t *testing.T) {
	r := newRelay(newMemoryStore(), nil, nil, Deps{Bus: Bus{Window: 100}})
	big := &order{ID: uuid.New(), Size: windowBytes}
	r.take([]*order{big})
	r.take([]*order{big}) // published again: it counts once
	limit, _ := r.room()
	require.Zero(t, limit)
	r.finished(big.ID, 0) // of an attempt before this one
	limit, _ = r.room()
	require.Zero(t, limit)
	r.finished(big.ID, 1)
	r.finished(big.ID, 1)
	limit, size := r.room()
	require.Equal(t, 100, limit)
	require.Equal(t, relayBytes, size)
}

func TestTheDeathOfAnOrderIsPublished(t *testing.T) {
	m, s, log := testModule(t, 0)
	o := submit(t, m, "A-1")
	for n := 1; n <= 3; n++ {
		out := outcome(contract.TypeAttemptFailed, n)
		out.OrderID = o.ID.String()
		project(t, m, out)
	}
	soon(t, func() bool { return len(log.of(contract.TopicOutcome)) == 1 })
	require.Equal(t, []string{o.ID.String() + ".3." + contract.TypeDead}, log.of(contract.TopicOutcome))
	got, err := s.get(t.Context(), o.ID)
	require.NoError(t, err)
	require.Equal(t, contract.StatusDead, got.Status)
}

func TestProjectionHoldsAnOutcomeUntilItIsStored(t *testing.T) {
	m, s, _ := testModule(t, 0)
	o := submit(t, m, "A-1")
	s.breaks(func(c *change) bool { return c.update != nil })
	out := outcome(contract.TypeSaved, 1)
	out.OrderID = o.ID.String()
	done := make(chan struct{})
	go func() {
		defer close(done)
		msg, err := out.Message()
		if err == nil {
			err = m.project(msg)
		}
		if err != nil {
			t.Error(err)
		}
	}()
	soon(t, func() bool { return s.failures() >= 2 })
	select {
	case <-done:
		require.FailNow(t, "acknowledged before it was stored")
	default:
	}
	s.breaks(nil)
	<-done
	got, err := s.get(t.Context(), o.ID)
	require.NoError(t, err)
	require.Equal(t, contract.StatusSaved, got.Status)
}

func TestProjectionGivesTheMessageBackWhenItIsStopped(t *testing.T) {
	m, s, _ := testModule(t, 0)
	o := submit(t, m, "A-1")
	s.breaks(func(c *change) bool { return c.update != nil })
	out := outcome(contract.TypeSaved, 1)
	out.OrderID = o.ID.String()
	msg, err := out.Message()
	require.NoError(t, err)
	ctx, cancel := context.WithCancel(t.Context())
	msg.SetContext(ctx)
	cancel()
	require.Error(t, m.project(msg))
}

func TestProjectionRefusesWhatItCannotRead(t *testing.T) {
	m, _, _ := testModule(t, 0)
	require.ErrorIs(t, m.project(message.NewMessage(watermill.NewUUID(), []byte("x"))), contract.ErrUndecodable)
	out := outcome(contract.TypeSaved, 1)
	out.OrderID = "not a uuid"
	msg, err := out.Message()
	require.NoError(t, err)
	require.ErrorIs(t, m.project(msg), contract.ErrUndecodable)
	out.OrderID = uuid.NewString() // of an order that a restored database does not have
	project(t, m, out)
}

func project(t *testing.T, m *Module, out contract.Outcome) {
	t.Helper()
	msg, err := out.Message()
	require.NoError(t, err)
	msg.SetContext(t.Context())
	require.NoError(t, m.project(msg))
}
