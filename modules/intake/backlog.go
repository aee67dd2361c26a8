package intake

import (
	"sync/atomic"
)

// backlogLimit keeps the orders that wait within intake.max_backlog. It is
// safe for concurrent use.
//
// In one process the limit is kept to the order, whatever comes at once. With
// several on one store each knows what the others have accepted a second ago at
// the latest, so the backlog can pass the limit by what they accept in that
// time.
type backlogLimit struct {
	limit    int64 // 0 = none
	backlog  func() int64
	entering atomic.Int64 // let in, and maybe not in the backlog yet
}

// enter keeps places for n orders and reports true, or reports false if there
// are not as many. With true, leave gives them back when the orders are in the
// store, or are not going to be.
func (l *backlogLimit) enter(n int64) bool {
	if l.limit == 0 {
		return true
	}
	// First the place, then the look: of two that want the last one, each would
	// otherwise miss the other.
	if entering := l.entering.Add(n); l.backlog()+entering > l.limit {
		l.entering.Add(-n)
		return false
	}
	return true
}

func (l *backlogLimit) leave(n int64) {
	if l.limit > 0 {
		l.entering.Add(-n)
	}
}
