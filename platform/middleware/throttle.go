package middleware

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/ThreeDotsLabs/watermill/message"
)

// ErrClosed is returned by Limiter.Acquire after Close.
var ErrClosed = errors.New("limiter is closed")

// Limiter bounds how many do something at once. Permits are given in the order
// in which they were asked for. It is safe for concurrent use.
type Limiter struct {
	mu       sync.Mutex
	limit    int
	inFlight int
	waiters  list.List     // of chan struct{}, first come first; closed when the permit is theirs
	closed   chan struct{} // by Close
}

// NewLimiter returns a Limiter of n permits. With n of 0 or less nobody gets
// one.
func NewLimiter(n int) *Limiter {
	return &Limiter{limit: max(n, 0), closed: make(chan struct{})}
}

// Acquire takes a permit, and blocks until there is one, ctx ends or the Limiter
// closes. In the last two cases it returns ctx's error or ErrClosed and has
// taken none, also if that had happened before. Each permit must be given back
// by one Release.
func (l *Limiter) Acquire(ctx context.Context) error {
	if err := l.over(ctx); err != nil {
		return err
	}
	l.mu.Lock()
	// While somebody waits there is no permit left, so nobody is overtaken.
	if l.inFlight < l.limit {
		l.inFlight++
		l.mu.Unlock()
		return nil
	}
	granted := make(chan struct{})
	waiter := l.waiters.PushBack(granted)
	l.mu.Unlock()

	select {
	case <-granted:
		return nil
	case <-ctx.Done():
	case <-l.closed:
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-granted: // in the same moment; the next in line has more use for it
		l.inFlight--
		l.grant()
	default:
		l.waiters.Remove(waiter)
	}
	return l.over(ctx)
}

// over says why no permit is to be had any more.
func (l *Limiter) over(ctx context.Context) error {
	select {
	case <-l.closed:
		return ErrClosed
	default:
		return ctx.Err()
	}
}

// Close turns away all who wait for a permit and all who will come, with
// ErrClosed. Permits that are taken stay taken until they are released. Closing
// again does nothing.
func (l *Limiter) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.closed:
	default:
		close(l.closed)
	}
}

// Release gives a permit back. Without one to give back it does nothing.
func (l *Limiter) Release() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.inFlight > 0 {
		l.inFlight--
	}
	l.grant()
}

// SetLimit changes the number of permits at once. Raising it lets waiters go
// on; lowering it takes no permit away, but none is given until fewer than n
// are in flight. With n of 0 or less nobody gets one, until it is raised again.
func (l *Limiter) SetLimit(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.limit = max(n, 0)
	l.grant()
}

// Limit is the number of permits.
func (l *Limiter) Limit() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.limit
}

// InFlight is the number of permits taken. After SetLimit has lowered the limit
// it can be above it for as long as these are held.
func (l *Limiter) InFlight() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.inFlight
}

// grant gives waiters what permits there are. mu is held.
func (l *Limiter) grant() {
	for l.inFlight < l.limit && l.waiters.Len() > 0 {
		granted := l.waiters.Remove(l.waiters.Front()).(chan struct{})
		l.inFlight++
		close(granted)
	}
}

// Throttle lets at most as many handlers run at once as l has permits. A permit
// is held only while the inner handler runs: what is further out, like
// publishing, goes on without one, and what is further in, like a time limit,
// starts after the wait. If the message's context ends during the wait, or the
// Limiter is closed, the handler is not called and the error is returned.
func Throttle(l *Limiter) message.HandlerMiddleware {
	return func(h message.HandlerFunc) message.HandlerFunc {
		return func(msg *message.Message) ([]*message.Message, error) {
			if err := l.Acquire(msg.Context()); err != nil {
				return nil, fmt.Errorf("wait for a permit: %w", err)
			}
			defer l.Release()
			return h(msg)
		}
	}
}
