package database

import (
	"context"
	"errors"
	"runtime"
	"sync"
)

// ErrClosed is returned by Group.Do after Close.
var ErrClosed = errors.New("group commit is closed")

// Group coalesces concurrent calls into batches, each flushed as one: group
// commit. There is no timer: while one flush runs the next batch collects, and
// it is flushed as soon as a flusher is free. So a lone call waits for nobody,
// and the busier the callers, the larger the batches (DeWitt et al. 1984,
// "Implementation Techniques for Main Memory Database Systems", section 5).
//
// A Group is safe for concurrent use. It has no goroutine while it is idle.
type Group[T any] struct {
	flush    func(context.Context, []T) error
	size     int
	flushers int

	mu      sync.Mutex
	idle    *sync.Cond
	queue   []*batch[T] // the last one is still filling
	running int         // flusher goroutines
	closed  bool
}

type batch[T any] struct {
	items []T
	done  chan struct{}
	err   error
}

// NewGroup returns a Group whose batches have at most size items and whose
// flush runs on at most flushers goroutines at once. All items of a batch
// share flush's error; what differs between them flush notes on the items.
// The context that flush is given is never cancelled, since a batch belongs to
// many callers; flush sets its own time limit.
func NewGroup[T any](size, flushers int, flush func(context.Context, []T) error) *Group[T] {
	g := &Group[T]{flush: flush, size: size, flushers: flushers}
	g.idle = sync.NewCond(&g.mu)
	return g
}

// Do adds item to the next batch and waits until that batch was flushed.
// When ctx ends first, Do returns its error at once; the item is flushed
// all the same.
func (g *Group[T]) Do(ctx context.Context, item T) error {
	b, err := g.join(ctx, item)
	if err != nil {
		return err
	}
	select {
	case <-b.done:
		return b.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (g *Group[T]) join(ctx context.Context, item T) (*batch[T], error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return nil, ErrClosed
	}
	if n := len(g.queue); n == 0 || len(g.queue[n-1].items) >= g.size {
		g.queue = append(g.queue, &batch[T]{done: make(chan struct{})})
	}
	b := g.queue[len(g.queue)-1]
	b.items = append(b.items, item)
	if g.running < g.flushers {
		g.running++
		// The flusher outlives the request that happens to start it.
		go g.run(context.WithoutCancel(ctx))
	}
	return b, nil
}

// run flushes batches until none is left.
func (g *Group[T]) run(ctx context.Context) {
	for {
		// Whoever is ready to run may join first. That is nobody on an idle
		// machine, and many on a busy one, where larger batches count.
		runtime.Gosched()
		g.mu.Lock()
		if len(g.queue) == 0 {
			g.running--
			g.idle.Broadcast()
			g.mu.Unlock()
			return
		}
		b := g.queue[0]
		g.queue[0] = nil
		g.queue = g.queue[1:]
		g.mu.Unlock()

		b.err = g.flush(ctx, b.items)
		close(b.done)
	}
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
