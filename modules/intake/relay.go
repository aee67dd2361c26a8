package intake

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
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
	// windowBytes bounds the bodies that a window holds. The window's size is
	// counted in orders, and orders can be large.
	windowBytes = 64 << 20

	relayPauseMin = 100 * time.Millisecond
	relayPauseMax = 5 * time.Second
)

// relay publishes what is due. First publication, retry, replay and recovery
// are the same to it: a row whose publish_at has come.
//
// One turn reads due rows, publishes them and marks them as published. A crash
// in between leaves them due, so they are published again: at least once.
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
	window     int // most orders published and unfinished; 0 = no limit

	wake      chan struct{}
	published []mark    // and not marked yet
	looked    time.Time // when the last turn looked for what is due

	mu       sync.Mutex
	inFlight map[uuid.UUID]flight // with a window: orders published and unfinished
	bytes    int                  // of their bodies
}

// flight is one publication on its way.
type flight struct {
	attempt int
	size    int
}

func newRelay(s store, w *writer, deps Deps) *relay {
	return &relay{
		store:      s,
		writer:     w,
		publisher:  deps.Bus.Publisher,
		propagator: deps.Propagator,
		logger:     deps.Logger,
		window:     deps.Bus.Window,
		wake:       make(chan struct{}, 1),
		inFlight:   map[uuid.UUID]flight{},
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
	for ctx.Err() == nil {
		n, err := r.turn(ctx)
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
	r.looked = time.Now()
	orders, err := r.store.due(ctx, r.looked, limit, size, r.isInFlight)
	if err != nil {
		return 0, err
	}
	n := 0
	for _, o := range orders {
		if err = r.publish(ctx, o); err != nil {
			break
		}
		n++
		if dead := o.Status == contract.StatusDead; dead || r.window == 0 {
			r.published = append(r.published, mark{o.ID, o.Attempts, dead})
		}
	}
	return n, errors.Join(err, r.mark(ctx))
}

// mark notes in the store what was published. It does so even if ctx has ended:
// a graceful stop repeats nothing.
func (r *relay) mark(ctx context.Context) error {
	if len(r.published) == 0 {
		return nil
	}
	if err := r.writer.do(context.WithoutCancel(ctx), &change{marks: r.published}); err != nil {
		return fmt.Errorf("mark %d orders as published: %w", len(r.published), err)
	}
	r.published = nil
	return nil
}

// publish hands one order, or the news that it is dead, to the broker.
func (r *relay) publish(ctx context.Context, o *order) error {
	topic, msg := contract.TopicSubmitted, (*message.Message)(nil)
	if o.Status == contract.StatusDead {
		var err error
		topic = contract.TopicOutcome
		if msg, err = o.dead().Message(); err != nil {
			return err
		}
	} else {
		msg = o.submitted().Message()
		r.take(o)
	}
	// The trace goes on where the client's request left it, maybe in another
	// life of this process.
	msg.SetContext(r.propagator.Extract(ctx, propagation.MapCarrier{"traceparent": o.TraceParent, "tracestate": o.TraceState}))
	if err := r.publisher.Publish(topic, msg); err != nil {
		r.finished(o.ID, o.Attempts+1)
		return fmt.Errorf("publish order %s to %s: %w", o.ID, topic, err)
	}
	return nil
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

func (r *relay) take(o *order) {
	if r.window == 0 {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.bytes += o.Size - r.inFlight[o.ID].size
	r.inFlight[o.ID] = flight{o.Attempts + 1, o.Size}
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
