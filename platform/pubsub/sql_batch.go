package pubsub

import (
	"context"
	"errors"
	"sync"
	"time"
)

// errOverdue fails what waited for its turn longer than its publisher did.
var errOverdue = errors.New("the database did not keep up")

// batcher coalesces the items of concurrent calls: while one flush runs the
// next batch collects, and it is flushed as soon as a flusher is free. A lone
// call waits for nobody. It has no goroutine while it is idle.
type batcher[T any] struct {
	flush    func(context.Context, []T) error
	weigh    func(T) int
	limit    int // weight of a batch, unless one item alone is heavier
	flushers int
	patience time.Duration // after which nobody waits for a batch

	mu      sync.Mutex
	queue   []*batch[T] // the last one is still filling
	running int
}

type batch[T any] struct {
	items  []T
	weight int
	due    time.Time     // nobody waits after it
	done   chan struct{} // closed when err is set
	err    error
}

// add puts items into batches, in their order. start runs the function that it
// is given on a goroutine, or refuses to.
func (b *batcher[T]) add(items []T, start func(func(context.Context)) bool) ([]*batch[T], bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.running < b.flushers {
		if !start(b.run) {
			return nil, false
		}
		b.running++
	}
	var joined []*batch[T]
	for _, item := range items {
		in := b.room(b.weigh(item))
		in.items = append(in.items, item)
		if n := len(joined); n == 0 || joined[n-1] != in {
			joined = append(joined, in)
		}
	}
	return joined, true
}

// room returns a batch that an item of this weight fits in. mu is held.
func (b *batcher[T]) room(weight int) *batch[T] {
	if n := len(b.queue); n > 0 && b.queue[n-1].weight+weight <= b.limit {
		b.queue[n-1].weight += weight
		return b.queue[n-1]
	}
	in := &batch[T]{weight: weight, due: time.Now().Add(b.patience), done: make(chan struct{})}
	b.queue = append(b.queue, in)
	return in
}

// run flushes batches until none is left.
func (b *batcher[T]) run(ctx context.Context) {
	for next := b.next(); next != nil; next = b.next() {
		if time.Now().After(next.due) {
			next.err = errOverdue
		} else {
			next.err = b.flush(ctx, next.items)
		}
		close(next.done)
	}
}

// next takes the oldest batch. With nothing left, the flusher is gone.
func (b *batcher[T]) next() *batch[T] {
	b.mu.Lock()
	defer b.mu.Unlock()
	if len(b.queue) == 0 {
		b.running--
		return nil
	}
	first := b.queue[0]
	b.queue[0] = nil
	b.queue = b.queue[1:]
	return first
}
