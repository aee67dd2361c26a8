package group_test

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"sluice/platform/group"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestFlushesALoneItemAtOnce(t *testing.T) {
	var got []int
	g := group.New(group.Config[int]{Size: 10, Flushers: 1, Flush: func(_ context.Context, items []int) error {
		got = append(got, items...)
		return nil
	}})
	defer g.Close()
	require.NoError(t, g.Do(t.Context(), 7))
	require.Equal(t, []int{7}, got)
}

func TestCollectsWhileItFlushes(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	var sizes []int
	g := group.New(group.Config[int]{Size: 4, Flushers: 1, Flush: func(_ context.Context, items []int) error {
		sizes = append(sizes, len(items)) // one flusher, so no lock is needed: -race would tell
		if len(sizes) == 1 {
			close(entered)
			<-leave
		}
		return nil
	}})
	var calls sync.WaitGroup
	calls.Go(func() { require.NoError(t, g.Do(t.Context(), 0)) })
	<-entered
	// Items join in the order of the calls; a cancelled caller's item stays.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for i := range 10 {
		require.ErrorIs(t, g.Do(gone, i), context.Canceled)
	}
	close(leave)
	calls.Wait()
	g.Close()
	require.Equal(t, []int{1, 4, 4, 2}, sizes)
}

// What waits for long would otherwise keep what all the others had in its batch.
func TestAPendingItemKeepsNoOther(t *testing.T) {
	g := group.New(group.Config[*[1 << 10]byte]{Size: 10, Flushers: 1, Flush: func(context.Context, []*[1 << 10]byte) error { return nil }})
	defer g.Close()
	var pending group.Pending[*[1 << 10]byte]
	freed := make(chan struct{})
	func() {
		other := new([1 << 10]byte)
		runtime.AddCleanup(other, func(freed chan struct{}) { close(freed) }, freed)
		_, err := g.Add(t.Context(), other)
		require.NoError(t, err)
		pending, err = g.Add(t.Context(), new([1 << 10]byte))
		require.NoError(t, err)
	}()
	require.NoError(t, pending.Wait(t.Context()))
	require.Eventually(t, func() bool {
		runtime.GC()
		select {
		case <-freed:
			return true
		default:
			return false
		}
	}, 10*time.Second, time.Millisecond)
	require.True(t, pending.Ready())
}

func TestWhatIsFlushedIsNoFailureOfAContextThatHasEnded(t *testing.T) {
	g := group.New(group.Config[int]{Size: 1, Flushers: 1, Flush: func(context.Context, []int) error { return nil }})
	defer g.Close()
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for i := range 100 {
		pending, err := g.Add(t.Context(), i)
		require.NoError(t, err)
		require.NoError(t, pending.Wait(t.Context()))
		require.NoError(t, pending.Wait(gone))
	}
}

func TestSharesAnErrorWithItsBatchOnly(t *testing.T) {
	broken := errors.New("disk full")
	g := group.New(group.Config[int]{Size: 1, Flushers: 2, Flush: func(_ context.Context, items []int) error {
		if items[0] == 1 {
			return broken
		}
		return nil
	}})
	defer g.Close()
	var calls sync.WaitGroup
	for i := range 20 {
		calls.Go(func() {
			err := g.Do(context.Background(), i%2)
			if i%2 == 1 {
				require.ErrorIs(t, err, broken)
			} else {
				require.NoError(t, err)
			}
		})
	}
	calls.Wait()
}

func TestFlushesEveryItemOnceUnderLoad(t *testing.T) {
	const callers, each = 32, 200
	var seen [callers * each]atomic.Int32
	var running, most atomic.Int32
	g := group.New(group.Config[int]{Size: 16, Flushers: 3, Flush: func(_ context.Context, items []int) error {
		n := running.Add(1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		for _, i := range items {
			seen[i].Add(1)
		}
		running.Add(-1)
		return nil
	}})
	var calls sync.WaitGroup
	for c := range callers {
		calls.Go(func() {
			for i := range each {
				require.NoError(t, g.Do(context.Background(), c*each+i))
			}
		})
	}
	calls.Wait()
	g.Close()
	for i := range seen {
		require.Equal(t, int32(1), seen[i].Load())
	}
	require.LessOrEqual(t, most.Load(), int32(3))
}

func TestRefusesItemsAfterClose(t *testing.T) {
	g := group.New(group.Config[int]{Size: 1, Flushers: 1, Flush: func(context.Context, []int) error { return nil }})
	g.Close()
	g.Close()
	require.ErrorIs(t, g.Do(t.Context(), 1), group.ErrClosed)
}

func TestBatchesAreBoundedByWeight(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	var batches [][]int
	g := group.New(group.Config[int]{Size: 10, Flushers: 1, Weigh: func(i int) int { return i }, Flush: func(_ context.Context, items []int) error {
		if batches = append(batches, items); len(batches) == 1 {
			close(entered)
			<-leave
		}
		return nil
	}})
	var calls sync.WaitGroup
	calls.Go(func() { require.NoError(t, g.Do(t.Context(), 1)) })
	<-entered
	// One call can fill several batches, and waits for all of them.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	require.ErrorIs(t, g.Do(gone, 4, 5, 2, 30, 9), context.Canceled)
	calls.Go(func() { require.NoError(t, g.Do(t.Context(), 1, 7)) })
	close(leave)
	calls.Wait()
	g.Close()
	require.Equal(t, [][]int{{1}, {4, 5}, {2}, {30}}, batches[:4])
	require.Equal(t, 9+1+7, sum(batches[4:]))
}

func sum(batches [][]int) (total int) {
	for _, batch := range batches {
		for _, i := range batch {
			total += i
		}
	}
	return total
}

func TestACallWithSeveralBatchesReturnsTheirFirstError(t *testing.T) {
	broken := errors.New("disk full")
	g := group.New(group.Config[int]{Size: 1, Flushers: 1, Flush: func(_ context.Context, items []int) error {
		if items[0] == 2 {
			return broken
		}
		return nil
	}})
	defer g.Close()
	require.ErrorIs(t, g.Do(t.Context(), 1, 2, 3), broken)
	require.NoError(t, g.Do(t.Context()))
}

func TestABatchThatWaitedTooLongIsNotFlushed(t *testing.T) {
	g := group.New(group.Config[int]{Size: 1, Flushers: 1, Patience: time.Nanosecond, Flush: func(context.Context, []int) error {
		t.Error("flushed")
		return nil
	}})
	defer g.Close()
	require.ErrorIs(t, g.Do(t.Context(), 1), group.ErrOverdue)
}
