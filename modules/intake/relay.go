package intake

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"
	"go.opentelemetry.io/otel/propagation"

	"sluice/modules/contract"
)

const (
	// relayBatch and relayBytes bound what one turn of the relay takes into
	// memory.
	relayBatch = 512
	relayBytes = 8 << 20
	// relayGroup is how many orders are handed to a broker that keeps messages
	// before they are marked. While they are, the next ones are on their way:
	// no more than two groups are published again after a crash.
	relayGroup = 64
	// windowBytes bounds the bodies that a window holds. The window's size is
	// counted in orders, and orders can be large.
	windowBytes = 64 << 20

	relayPauseMin = 100 * time.Millisecond
	relayPauseMax = 5 * time.Second

	// relayLease is how long an order that was claimed stays with the process
	// that did, without a sign of life of it. A publish must have ended by
	// then, one way or the other.
	relayLease = 30 * time.Second
	// refusedPause is how long a message that the broker does not take, while
	// it takes others, keeps out of their way.
	refusedPause = time.Minute
	// refusals in a row mean that it is not the message.
	refusals = 3
)

// relay publishes what is due. First publication, retry, replay and recovery
// are the same to it: a row whose publish_at has come.
//
// One turn claims due rows, publishes them and marks them as published. A crash
// in between leaves them due, if not at once then when the claim runs out, so
// they are published again: at least once.
//
// A broker with a window forgets its messages when the process ends, and so
// then may the relay what it published: there is no mark, the relay remembers
// what is in flight, and the row stays due until an outcome changes it. That
// saves every order one of its three writes.
type relay struct {
	store      store
	writer     *writer
	publisher  message.Publisher
	propagator propagation.TextMapPropagator
	logger     *slog.Logger
	stats      *stats
	window     int    // most orders published and unfinished; 0 = no limit
	name       string // of the broker, and the place in it

	wake      chan struct{}
	ended     chan struct{}           // closed by close
	published []mark                  // and not marked yet
	marking   *marking                // under way, or nil
	looked    time.Time               // when the last turn looked for what is due
	aside     map[uuid.UUID]time.Time // refused by the broker, and until when they are left alone

	holding sync.WaitGroup // hold

	mu       sync.Mutex
	inFlight map[uuid.UUID]flight // with a window: orders published and unfinished
	bytes    int                  // of their bodies
}

// flight is one publication on its way.
type flight struct {
	attempt int
	size    int
}

func newRelay(s store, w *writer, st *stats, deps Deps) *relay {
	return &relay{
		store:      s,
		writer:     w,
		publisher:  deps.Bus.Publisher,
		propagator: deps.Propagator,
		logger:     deps.Logger,
		stats:      st,
		window:     deps.Bus.Window,
		name:       deps.Bus.Carrier,
		wake:       make(chan struct{}, 1),
		inFlight:   map[uuid.UUID]flight{},
		aside:      map[uuid.UUID]time.Time{},
		ended:      make(chan struct{}),
	}
}

// nudge tells the relay that something may be due. It never blocks.
func (r *relay) nudge() {
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// run publishes until ctx ends.
func (r *relay) run(ctx context.Context) {
	pause := time.Duration(0)
	takenOver := false
	for ctx.Err() == nil {
		var n int
		var err error
		if !takenOver {
			err = r.takeOver(ctx)
			takenOver = err == nil
		}
		if takenOver {
			n, err = r.turn(ctx)
		}
		switch {
		case ctx.Err() != nil:
			return
		case err != nil && pause == 0:
			r.logger.Error("cannot hand orders to the broker; they are safe and are tried again until it works", "error", err)
			fallthrough
		case err != nil:
			pause = min(max(2*pause, relayPauseMin), relayPauseMax)
			wait(ctx, pause, nil)
		default:
			if pause > 0 {
				r.logger.Info("handing orders to the broker again")
				pause = 0
			}
			if n == 0 {
				r.rest(ctx)
			}
		}
	}
}

// takeOver makes all orders due that another broker was carrying, the first
// time that this one serves the store.
func (r *relay) takeOver(ctx context.Context) error {
	earlier, err := r.store.carrier(ctx)
	// With a window nothing is ever marked: what is, another broker has,
	// maybe since we took over, from a process that had not.
	if err != nil || earlier == r.name && r.window == 0 {
		return err
	}
	n, err := republish(ctx, r.store, now())
	if err != nil {
		return err
	}
	if n > 0 {
		r.logger.Info("orders that another broker was carrying are handed to this one", "orders", n, "earlier", earlier, "now", r.name)
	}
	return r.store.setCarrier(ctx, r.name)
}

// republishBatch bounds a transaction, so that no new order waits long for it.
const republishBatch = 500

// republish makes all unfinished orders due that were published before the
// given time.
func republish(ctx context.Context, s store, before time.Time) (int, error) {
	for total := 0; ; {
		n, err := s.republish(ctx, before, now(), republishBatch)
		total += n
		if err != nil || n < republishBatch {
			return total, err
		}
	}
}

// turn publishes one batch and returns its size.
func (r *relay) turn(ctx context.Context) (int, error) {
	// First what an earlier turn published and could not mark: to read it as
	// due again would publish it twice.
	if err := r.mark(ctx); err != nil {
		return 0, err
	}
	limit, size := r.room()
	if limit == 0 {
		return 0, nil
	}
	r.looked = now()
	orders, err := r.store.claim(ctx, r.looked, r.looked.Add(relayLease), limit, size, r.skip)
	if err != nil || len(orders) == 0 {
		return 0, err
	}
	group := relayGroup
	if r.window > 0 {
		group = relayBatch // nothing is marked
	}
	rest, err := r.inherit(ctx, orders)
	// A slow broker must not let the claims run out: what there is no time for
	// is claimed again.
	for len(rest) > 0 && err == nil && ctx.Err() == nil && !r.late() {
		n := min(group, len(rest))
		err = errors.Join(r.publish(ctx, rest[:n]), r.startMarking(ctx))
		rest = rest[n:]
	}
	if err = errors.Join(err, r.giveBack(ctx, marksOf(rest)), r.mark(ctx)); err != nil {
		return 0, err
	}
	return len(orders), nil
}

// inherit makes orders of the queue of direct ones, whose call must have ended
// by now and has left them here. It returns what is to be published: not those
// whose call came to its end after all.
func (r *relay) inherit(ctx context.Context, claimed []*order) ([]*order, error) {
	var changes []*change
	for _, o := range claimed {
		if o.Direct {
			changes = append(changes, &change{id: o.ID, update: func(o *order) verdict {
				if !o.Direct {
					return leave
				}
				o.Direct = false
				return save
			}})
		}
	}
	if len(changes) == 0 {
		return claimed, nil
	}
	if err := r.writer.do(ctx, changes...); err != nil {
		return claimed, fmt.Errorf("take over %d direct orders: %w", len(changes), err)
	}
	ended := map[uuid.UUID]bool{}
	for _, c := range changes {
		ended[c.id] = c.found == nil || c.found.Status.Final()
	}
	return slices.DeleteFunc(claimed, func(o *order) bool { return ended[o.ID] }), nil
}

// marking is a write of marks that the relay does not wait for yet.
type marking struct {
	marks []mark
	done  chan error
}

// startMarking notes in the store what was published, once it knows what became
// of the last such write. It goes on even if ctx has ended: a graceful stop
// repeats nothing.
func (r *relay) startMarking(ctx context.Context) error {
	if err := r.endMarking(); err != nil || len(r.published) == 0 {
		return err
	}
	w := &marking{marks: r.published, done: make(chan error, 1)}
	r.marking, r.published = w, nil
	at := now()
	go func() { w.done <- r.writer.do(context.WithoutCancel(ctx), &change{marks: w.marks, publishedAt: at}) }()
	return nil
}

// endMarking waits for the write that is under way. What it could not mark is
// to be marked still.
func (r *relay) endMarking() error {
	w := r.marking
	if w == nil {
		return nil
	}
	r.marking = nil
	if err := <-w.done; err != nil {
		r.published = append(w.marks, r.published...)
		return fmt.Errorf("mark %d orders as published: %w", len(w.marks), err)
	}
	return nil
}

// mark returns when all that was published is marked.
func (r *relay) mark(ctx context.Context) error {
	if err := r.startMarking(ctx); err != nil {
		return err
	}
	return r.endMarking()
}

func marksOf(orders []*order) []mark {
	marks := make([]mark, 0, len(orders))
	for _, o := range orders {
		marks = append(marks, mark{o.ID, o.Attempts, o.Status == contract.StatusDead})
	}
	return marks
}

// publish hands orders, and the news of those that are dead, to the broker. What
// it does not take is given back.
func (r *relay) publish(ctx context.Context, orders []*order) error {
	var live, dead []*order
	for _, o := range orders {
		if o.Status == contract.StatusDead {
			dead = append(dead, o)
		} else {
			live = append(live, o)
		}
	}
	return errors.Join(
		r.publishTo(ctx, contract.TopicSubmitted, live, func(o *order) (*message.Message, error) { return o.submitted().Message(), nil }),
		r.publishTo(ctx, contract.TopicOutcome, dead, func(o *order) (*message.Message, error) { return o.dead().Message() }),
	)
}

// encoder makes the message of an order.
type encoder func(*order) (*message.Message, error)

// publishTo hands orders to the broker, all together if it takes them. When it
// does not, one by one: a message that the broker refuses must not hold up the
// others. What it does not take is given back.
func (r *relay) publishTo(ctx context.Context, topic string, orders []*order, encode encoder) error {
	if len(orders) == 0 {
		return nil
	}
	err := r.hand(ctx, topic, orders, encode)
	if err == nil {
		return nil
	}
	// If it took its time to fail, it is the broker and not a message.
	if r.window > 0 || len(orders) == 1 || r.late() {
		return errors.Join(err, r.giveBack(ctx, marksOf(orders)))
	}
	var refused []*order // since the last one that was taken
	var reason error     // why the last of them was not
	for i, o := range orders {
		if err = r.hand(ctx, topic, orders[i:i+1], encode); err == nil {
			r.putAside(ctx, refused, reason)
			refused = nil
			continue
		}
		refused, reason = append(refused, o), err
		if len(refused) == refusals || r.late() {
			return errors.Join(err, r.giveBack(ctx, marksOf(append(refused, orders[i+1:]...))))
		}
	}
	r.putAside(ctx, refused, reason)
	return nil
}

// putAside keeps orders out of the way of others for a while.
func (r *relay) putAside(ctx context.Context, refused []*order, reason error) {
	if len(refused) == 0 {
		return
	}
	until := now().Add(refusedPause)
	for _, o := range refused {
		r.aside[o.ID] = until
		r.logger.Error("the broker does not take the message of an order; it is tried again later, and others go before it",
			"order_id", o.ID, "trace_id", o.traceID(), "size", o.Size, "error", reason)
	}
	if err := r.store.renew(context.WithoutCancel(ctx), marksOf(refused), until); err != nil {
		r.logger.Warn("other processes may try a message again that the broker does not take", "error", err)
	}
}

// skip says which due orders are not to be published now.
func (r *relay) skip(id uuid.UUID) bool {
	if until, ok := r.aside[id]; ok {
		if now().Before(until) {
			return true
		}
		delete(r.aside, id)
	}
	return r.isInFlight(id)
}

// hand publishes orders in one call. When it fails, the broker may have some of
// them.
func (r *relay) hand(ctx context.Context, topic string, orders []*order, encode encoder) error {
	msgs := make([]*message.Message, 0, len(orders))
	for _, o := range orders {
		msg, err := encode(o)
		if err != nil {
			return err
		}
		// The trace goes on where the client's request left it, maybe in
		// another life of this process. A stop lets the broker finish: to
		// break off would leave it unknown what it has.
		msg.SetContext(r.propagator.Extract(context.WithoutCancel(ctx), propagation.MapCarrier{"traceparent": o.TraceParent, "tracestate": o.TraceState}))
		msgs = append(msgs, msg)
	}
	inWindow := r.window > 0 && topic == contract.TopicSubmitted
	if inWindow {
		r.take(orders)
	}
	if err := r.publisher.Publish(topic, msgs...); err != nil {
		for _, o := range orders {
			r.finished(o.ID, o.Attempts+1)
		}
		return fmt.Errorf("publish %d messages to %s: %w", len(msgs), topic, err)
	}
	if topic == contract.TopicSubmitted {
		r.stats.published(len(msgs))
	}
	if !inWindow {
		r.published = append(r.published, marksOf(orders)...)
	}
	return nil
}

// late reports whether the claims of this turn should not be relied on for
// another publish.
func (r *relay) late() bool { return now().Sub(r.looked) >= relayLease/4 }

// giveBack ends the claims of orders that were not published, or not finished.
func (r *relay) giveBack(ctx context.Context, claimed []mark) error {
	if len(claimed) == 0 {
		return nil
	}
	if err := r.store.renew(context.WithoutCancel(ctx), claimed, now()); err != nil {
		return fmt.Errorf("give back %d orders: %w", len(claimed), err)
	}
	return nil
}

// hold renews the claims of what is in flight until close, which is after the
// last call of the backend has ended. There is nothing to renew without a
// window: what the broker has is marked.
func (r *relay) hold() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for r.window > 0 {
		wait(ctx, relayLease/4, r.ended)
		if isClosed(r.ended) {
			return
		}
		if err := r.store.renew(ctx, r.claimed(), now().Add(relayLease)); err != nil {
			r.logger.Warn("cannot tell other processes which orders this one is busy with; they may be saved twice", "error", err)
		}
	}
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// claimed returns what is in flight.
func (r *relay) claimed() []mark {
	r.mu.Lock()
	defer r.mu.Unlock()
	marks := make([]mark, 0, len(r.inFlight))
	for id, f := range r.inFlight {
		marks = append(marks, mark{id: id, attempts: f.attempt - 1})
	}
	return marks
}

// close gives back what is still in flight. Call it once, when no outcome can
// arrive any more.
func (r *relay) close() error {
	close(r.ended)
	r.holding.Wait()
	return r.giveBack(context.Background(), r.claimed())
}

// room returns how many orders and bytes the next turn may take. When a window
// is nearly full it waits for a quarter of it to be free, since the consumers
// have plenty to do and small turns cost as much as large ones.
func (r *relay) room() (limit, size int) {
	if r.window == 0 {
		return relayBatch, relayBytes
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	free := r.window - len(r.inFlight)
	if free < max(1, r.window/4) || (r.bytes >= windowBytes && len(r.inFlight) > 0) {
		return 0, 0
	}
	return min(free, relayBatch), min(relayBytes, windowBytes-r.bytes)
}

func (r *relay) isInFlight(id uuid.UUID) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.inFlight[id]
	return ok
}

func (r *relay) take(orders []*order) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, o := range orders {
		r.bytes += o.Size - r.inFlight[o.ID].size
		r.inFlight[o.ID] = flight{o.Attempts + 1, o.Size}
	}
}

// finished says that an attempt at the order has ended and that its outcome is
// stored, so that its place in the window is free. News of an attempt before
// the one in flight changes nothing.
func (r *relay) finished(id uuid.UUID, attempt int) {
	if r.window == 0 {
		return
	}
	r.mu.Lock()
	f, ok := r.inFlight[id]
	ended := ok && f.attempt <= attempt
	if ended {
		delete(r.inFlight, id)
		r.bytes -= f.size
	}
	r.mu.Unlock()
	if ended {
		r.nudge()
	}
}

// rest waits for a nudge, or until the next order is due.
func (r *relay) rest(ctx context.Context) {
	if limit, _ := r.room(); limit == 0 {
		wait(ctx, relayPauseMax, r.wake)
		return
	}
	next, err := r.store.nextDue(ctx, r.looked)
	if err != nil {
		wait(ctx, relayPauseMin, r.wake) // the next turn will say what is wrong
		return
	}
	pause := relayPauseMax
	if !next.IsZero() {
		pause = min(pause, time.Until(next))
	}
	wait(ctx, pause, r.wake)
}

// wait returns after d, on a signal, or when ctx ends.
func wait(ctx context.Context, d time.Duration, signal <-chan struct{}) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-signal:
	case <-ctx.Done():
	}
}
