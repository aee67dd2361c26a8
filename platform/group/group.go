// Package group makes batches of concurrent calls: group commit.
//
// What costs the same for one item as for many, such as a transaction that has
// to reach the disk, is done once for all who ask for it at the same time.
// Stores (modules/intake) and the broker in PostgreSQL (platform/pubsub) write
// through it. It knows nothing of what is written, and it has no timer.
package group

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"time"
)

var (
	// ErrClosed is returned by Group.Do and Group.Add after Close.
	ErrClosed = errors.New("group commit is closed")
	// ErrOverdue is the error of a batch that waited longer than
	// Config.Patience for its flush, which then never began.
	ErrOverdue = errors.New("waited too long for its turn")
)

// Config says what a Group does with its batches.
type Config[T any] struct {
	// Flush writes a batch. All items of a batch share its error; what differs
	// between them it notes on the items. Its context is never cancelled, since
	// a batch belongs to many callers: it sets its own time limit.
	Flush func(context.Context, []T) error
	// Flushers is on how many goroutines Flush runs at once, at most.
	Flushers int
	// Size is the most that the items of a batch weigh together, unless one
	// item alone is heavier.
	Size int
	// Weigh returns the weight of an item. Default: each weighs 1.
	Weigh func(T) int
	// Patience is how long a batch may wait for its flush. Set it to the time
	// limit of the callers, who are gone by then. Default: for ever.
	Patience time.Duration
}

// Group coalesces concurrent calls into batches, each flushed as one. There is
// no timer: while one flush runs the next batch collects, and it is flushed as
// soon as a flusher is free. So a lone call waits for nobody, and the busier
// the callers, the larger the batches (DeWitt et al. 1984, "Implementation
// Techniques for Main Memory Database Systems", section 5).
//
// A Group is safe for concurrent use. It has no goroutine while it is idle.
type Group[T any] struct {
	cfg Config[T]

	mu      sync.Mutex
	idle    *sync.Cond
	queue   []*batch[T] // the last one is still filling
	running int         // flusher goroutines
	closed  bool
}

type batch[T any] struct {
	items  []T
	weight int
	since  time.Time     // set where batches are not waited for for ever
	done   chan struct{} // closed when err is set
	err    error
}

// New returns a Group that has nothing to do yet.
func New[T any](cfg Config[T]) *Group[T] {
	g := &Group[T]{cfg: cfg}
	g.idle = sync.NewCond(&g.mu)
	return g
}

// Do adds the items to the next batch, in their order and to as many further
// batches as they fill, and waits until those are flushed. It returns the first
// error of them. When ctx ends before, Do returns its cause at once; the items
// are flushed all the same.
func (g *Group[T]) Do(ctx context.Context, items ...T) error {
	joined, err := g.join(ctx, items)
	if err != nil {
		return err
	}
	var first error
	for _, b := range joined {
		// All of them, so that nothing of the call is under way afterwards.
		if err := (Pending[T]{b}).Wait(ctx); first == nil {
			first = err
		}
	}
	return first
}

// Add is Do of one item without the waiting, for a caller that has many. It does
// not block, so that it is the caller who has to bound what is pending. Items
// that one caller adds are flushed in their order, as long as there is one
// flusher.
func (g *Group[T]) Add(ctx context.Context, item T) (Pending[T], error) {
	joined, err := g.join(ctx, []T{item})
	if err != nil {
		return Pending[T]{}, err
	}
	return Pending[T]{joined[0]}, nil
}

// Pending is an item on its way.
type Pending[T any] struct{ batch *batch[T] }

// Ready reports whether Wait would return at once.
func (p Pending[T]) Ready() bool {
	select {
	case <-p.batch.done:
		return true
	default:
		return false
	}
}

// Wait waits until the item was flushed and returns flush's error. When ctx
// ends first, it returns ctx's cause at once.
func (p Pending[T]) Wait(ctx context.Context) error {
	select {
	case <-p.batch.done:
	case <-ctx.Done():
		if !p.Ready() { // what is done is done, whatever else has ended
			return context.Cause(ctx)
		}
	}
	return p.batch.err
}

// join returns the batches that the items are in now.
func (g *Group[T]) join(ctx context.Context, items []T) (joined []*batch[T], err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, ErrClosed
	}
	for _, item := range items {
		b := g.room(item)
		b.items = append(b.items, item)
		if n := len(joined); n == 0 || joined[n-1] != b {
			joined = append(joined, b)
		}
	}
	if g.running < g.cfg.Flushers {
		g.running++
		// The flusher outlives the request that happens to start it.
		go g.run(context.WithoutCancel(ctx))
	}
	return joined, nil
}

// room returns a batch that the item fits in. mu is held.
func (g *Group[T]) room(item T) *batch[T] {
	weight := 1
	if g.cfg.Weigh != nil {
		weight = g.cfg.Weigh(item)
	}
	if n := len(g.queue); n > 0 && g.queue[n-1].weight+weight <= g.cfg.Size {
		g.queue[n-1].weight += weight
		return g.queue[n-1]
	}
	b := &batch[T]{weight: weight, done: make(chan struct{})}
	if g.cfg.Patience > 0 {
		b.since = time.Now()
	}
	g.queue = append(g.queue, b)
	return b
}

// run flushes batches until none is left.
func (g *Group[T]) run(ctx context.Context) {
	for {
		// Whoever is ready to run may join first. That is nobody on an idle
		// machine, and many on a busy one, where larger batches count.
		runtime.Gosched()
		b := g.next()
		if b == nil {
			return
		}
		if g.cfg.Patience > 0 && time.Since(b.since) > g.cfg.Patience {
			b.err = ErrOverdue
		} else {
			b.err = g.cfg.Flush(ctx, b.items)
		}
		b.items = nil // a Pending that is kept for long must not keep others' items
		close(b.done)
	}
}

// next takes the oldest batch. With nothing left, the flusher is gone.
func (g *Group[T]) next() *batch[T] {
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.queue) == 0 {
		g.running--
		g.idle.Broadcast()
		return nil
	}
	b := g.queue[0]
	g.queue[0] = nil
	g.queue = g.queue[1:]
	return b
}

// Close refuses further items and waits until those that were added are
// flushed. It may be called more than once.
func (g *Group[T]) Close() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.closed = true
	for g.running > 0 {
		g.idle.Wait()
	}
}
