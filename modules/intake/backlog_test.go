package intake

import (
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestBacklogLimitIsKeptToTheOrder(t *testing.T) {
	var backlog, most atomic.Int64
	l := backlogLimit{limit: 50, backlog: backlog.Load}
	var orders sync.WaitGroup
	for i := range 400 {
		orders.Go(func() {
			n := int64(i%3 + 1)
			if !l.enter(n) {
				return
			}
			for waiting := backlog.Add(n); ; {
				if seen := most.Load(); seen >= waiting || most.CompareAndSwap(seen, waiting) {
					break
				}
			}
			l.leave(n)
			if i%2 == 0 {
				backlog.Add(-n)
			}
		})
	}
	orders.Wait()
	require.LessOrEqual(t, most.Load(), int64(50))
	require.Zero(t, l.entering.Load(), "every place was given back")

	require.True(t, l.enter(50-backlog.Load()))
	require.False(t, l.enter(1), "places that are kept count")
	l.leave(50 - backlog.Load())
}

func TestWithoutABacklogLimitThereIsAlwaysRoom(t *testing.T) {
	l := backlogLimit{backlog: func() int64 { return 1 << 40 }}
	require.True(t, l.enter(1<<40))
	l.leave(1 << 40)
}
