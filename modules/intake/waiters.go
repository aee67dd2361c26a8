package intake

import (
	"sync"

	"github.com/google/uuid"
)

// waiters lets requests wait for news of an order without asking the store
// again and again.
type waiters struct {
	mu   sync.Mutex
	news map[uuid.UUID]*bell
}

// bell is shared by all that wait for one order.
type bell struct {
	rung  chan struct{} // closed by notify
	users int
}

// watch returns a channel that is closed when the order changes next, and the
// function that ends the watch. Watch first and read the order afterwards, or
// a change between the two goes unnoticed.
func (w *waiters) watch(id uuid.UUID) (<-chan struct{}, func()) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.news == nil {
		w.news = map[uuid.UUID]*bell{}
	}
	b := w.news[id]
	if b == nil {
		b = &bell{rung: make(chan struct{})}
		w.news[id] = b
	}
	b.users++
	return b.rung, func() { w.leave(id, b) }
}

func (w *waiters) leave(id uuid.UUID, b *bell) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if b.users--; b.users == 0 && w.news[id] == b {
		delete(w.news, id)
	}
}

// notify wakes all that watch the order.
func (w *waiters) notify(id uuid.UUID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if b := w.news[id]; b != nil {
		close(b.rung)
		delete(w.news, id)
	}
}
