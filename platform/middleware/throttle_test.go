package middleware_test

import (
	"context"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"sluice/platform/middleware"
)

// caller is somebody who asks for a permit.
type caller struct {
	id     int
	cancel context.CancelFunc
	result chan error // takes one result
}

// The model of a Limiter: who holds a permit, and who waits, in order. After
// each step, when everything has come to rest, the Limiter must agree.
func TestLimiterModel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		// Hidden in a struct, for rapid would ask a *testing.T for its deadline,
		// which has no meaning with a fake clock.
		rapid.Check(struct{ *testing.T }{t}, checkLimiterModel)
	})
}

func checkLimiterModel(t *rapid.T) {
	limit := rapid.IntRange(-1, 4).Draw(t, "limit")
	limiter := middleware.NewLimiter(limit)
	var holding int
	var waiting []*caller // by the model
	var ids int
	all, cancelAll := context.WithCancel(context.Background())
	defer cancelAll() // also when the check fails
	settle := func() {
		for holding < limit && len(waiting) > 0 {
			first := waiting[0]
			waiting = waiting[1:]
			holding++
			synctest.Wait()
			select {
			case err := <-first.result:
				require.NoError(t, err)
				first.cancel()
			default:
				require.FailNow(t, "a permit is free, and the first in line did not get it", "caller %d", first.id)
			}
		}
	}
	acquire := func(ctx context.Context, cancel context.CancelFunc) *caller {
		ids++
		c := &caller{id: ids, cancel: cancel, result: make(chan error, 1)}
		go func() { c.result <- limiter.Acquire(ctx) }()
		synctest.Wait()
		return c
	}

	t.Repeat(map[string]func(*rapid.T){
		"acquire": func(*rapid.T) {
			waiting = append(waiting, acquire(context.WithCancel(all)))
			settle()
		},
		"acquire with a context that is over": func(t *rapid.T) {
			ctx, cancel := context.WithCancel(all)
			cancel()
			require.ErrorIs(t, <-acquire(ctx, cancel).result, context.Canceled)
		},
		"release": func(t *rapid.T) {
			if holding == 0 {
				t.Skip("nobody holds a permit")
			}
			holding--
			limiter.Release()
			settle()
		},
		"release too much": func(t *rapid.T) {
			if holding > 0 {
				t.Skip("that would be a permit given back")
			}
			limiter.Release()
		},
		"cancel": func(t *rapid.T) {
			if len(waiting) == 0 {
				t.Skip("nobody waits")
			}
			i := rapid.IntRange(0, len(waiting)-1).Draw(t, "waiter")
			c := waiting[i]
			waiting = slices.Delete(waiting, i, i+1)
			c.cancel()
			require.ErrorIs(t, <-c.result, context.Canceled)
		},
		"set limit": func(t *rapid.T) {
			limit = rapid.IntRange(-1, 6).Draw(t, "limit")
			limiter.SetLimit(limit)
			settle()
		},
		"": func(t *rapid.T) {
			synctest.Wait()
			require.Equal(t, max(limit, 0), limiter.Limit())
			require.Equal(t, holding, limiter.InFlight())
			for _, c := range waiting {
				require.Empty(t, c.result, "caller %d does not wait any more", c.id)
			}
		},
	})

	for _, c := range waiting {
		c.cancel()
		require.Error(t, <-c.result)
	}
	require.Equal(t, holding, limiter.InFlight())
}

func TestLimiterNeverPassesItsLimit(t *testing.T) {
	const limit = 5
	limiter := middleware.NewLimiter(limit)
	var inFlight, most atomic.Int64
	var all sync.WaitGroup
	for range 50 {
		all.Go(func() {
			for range 200 {
				ctx, cancel := context.WithCancel(t.Context())
				if rand.IntN(3) == 0 {
					go cancel()
				}
				if limiter.Acquire(ctx) == nil {
					now := inFlight.Add(1)
					for seen := most.Load(); now > seen && !most.CompareAndSwap(seen, now); seen = most.Load() {
					}
					inFlight.Add(-1)
					limiter.Release()
				}
				cancel()
			}
		})
	}
	all.Wait()
	require.LessOrEqual(t, most.Load(), int64(limit))
	require.Zero(t, limiter.InFlight())
	requireFree(t, limiter, limit)
}

// No permit may be lost between a waiter that gives up and the permit that
// comes in the same moment.
func TestLimiterGiveUpMayRaceWithTheGrant(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limiter := middleware.NewLimiter(1)
		var granted, gaveUp int
		for i := range 2000 {
			require.NoError(t, limiter.Acquire(t.Context()))
			ctx, cancel := context.WithCancel(t.Context())
			first, second := make(chan error, 1), make(chan error, 1)
			go func() { first <- limiter.Acquire(ctx) }()
			synctest.Wait()
			go func() { second <- limiter.Acquire(t.Context()) }()
			synctest.Wait()
			if i%2 == 0 {
				cancel()
				limiter.Release()
			} else {
				limiter.Release()
				cancel()
			}
			if <-first == nil {
				granted++
				limiter.Release()
			} else {
				gaveUp++
			}
			require.NoError(t, <-second, "the permit went to the next in line")
			limiter.Release()
			require.Zero(t, limiter.InFlight())
		}
		require.NotZero(t, granted)
		require.NotZero(t, gaveUp)
	})
}

func TestLimiterCloseTurnsAwayWhoeverHasNoPermit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limiter := middleware.NewLimiter(1)
		require.NoError(t, limiter.Acquire(t.Context()))
		waiting := make(chan error, 1)
		go func() { waiting <- limiter.Acquire(t.Context()) }()
		synctest.Wait()
		limiter.Close()
		limiter.Close()
		require.ErrorIs(t, <-waiting, middleware.ErrClosed)
		require.ErrorIs(t, limiter.Acquire(t.Context()), middleware.ErrClosed)
		require.Equal(t, 1, limiter.InFlight(), "who has a permit keeps it")
		limiter.Release()
		require.Zero(t, limiter.InFlight())
		require.ErrorIs(t, limiter.Acquire(t.Context()), middleware.ErrClosed)
	})
}

func TestLimiterLimitMayChangeAtAnyTime(t *testing.T) {
	limiter := middleware.NewLimiter(0)
	stop := make(chan struct{})
	var changing, working sync.WaitGroup
	changing.Go(func() {
		for {
			select {
			case <-stop:
				limiter.SetLimit(3)
				return
			default:
				limiter.SetLimit(rand.IntN(4))
			}
		}
	})
	for range 20 {
		working.Go(func() {
			for range 500 {
				if err := limiter.Acquire(t.Context()); err != nil {
					t.Error(err)
					return
				}
				limiter.Release()
			}
		})
	}
	working.Wait() // a lost wake-up hangs here
	close(stop)
	changing.Wait()
	require.Zero(t, limiter.InFlight())
	requireFree(t, limiter, 3)
}

// requireFree takes and gives back all n permits without waiting.
func requireFree(t *testing.T, limiter *middleware.Limiter, n int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for range n {
		require.NoError(t, limiter.Acquire(ctx))
	}
	require.Equal(t, n, limiter.InFlight())
	for range n {
		limiter.Release()
	}
}

func TestThrottle(t *testing.T) {
	t.Run("bounds handlers, not what is further out", func(t *testing.T) {
		const limit, messages = 3, 20
		limiter := middleware.NewLimiter(limit)
		var inner, outer sync.WaitGroup
		outer.Add(messages)
		release := make(chan struct{})
		inner.Add(limit)
		var entered atomic.Int64
		h := middleware.Chain(
			func(*message.Message) ([]*message.Message, error) {
				if entered.Add(1) <= limit {
					inner.Done()
				}
				<-release
				require.LessOrEqual(t, limiter.InFlight(), limit)
				return nil, nil
			},
			func(h message.HandlerFunc) message.HandlerFunc {
				return func(msg *message.Message) ([]*message.Message, error) {
					defer outer.Done()
					return h(msg)
				}
			},
			middleware.Throttle(limiter),
		)
		for range messages {
			go func() { _, _ = h(newMessage("1")) }() // never an error
		}
		inner.Wait()
		require.EqualValues(t, limit, entered.Load())
		require.Equal(t, limit, limiter.InFlight())
		close(release)
		outer.Wait()
		require.EqualValues(t, messages, entered.Load())
		require.Zero(t, limiter.InFlight())
	})

	t.Run("gives the permit back after an error and after a panic", func(t *testing.T) {
		limiter := middleware.NewLimiter(1)
		_, err := middleware.Chain(failing, middleware.Throttle(limiter))(newMessage("1"))
		require.ErrorIs(t, err, errHandler)
		require.Panics(t, func() {
			_, _ = middleware.Chain(panicking, middleware.Throttle(limiter))(newMessage("1"))
		})
		require.Zero(t, limiter.InFlight())
	})

	t.Run("does not call the handler when the context ends during the wait", func(t *testing.T) {
		limiter := middleware.NewLimiter(0)
		ctx, cancel := context.WithCancel(t.Context())
		msg := newMessage("1")
		msg.SetContext(ctx)
		cancel()
		_, err := middleware.Chain(panicking, middleware.Throttle(limiter))(msg)
		require.ErrorIs(t, err, context.Canceled)
		require.Zero(t, limiter.InFlight())
	})

	t.Run("the wait does not eat the time limit", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			limiter := middleware.NewLimiter(0)
			h := middleware.Chain(func(msg *message.Message) ([]*message.Message, error) {
				deadline, ok := msg.Context().Deadline()
				require.True(t, ok)
				require.Equal(t, time.Second, time.Until(deadline))
				return nil, nil
			}, middleware.Throttle(limiter), middleware.Timeout(time.Second))
			time.AfterFunc(time.Minute, func() { limiter.SetLimit(1) })
			start := time.Now()
			_, err := h(newMessage("1"))
			require.NoError(t, err)
			require.Equal(t, time.Minute, time.Since(start))
		})
	})
}
