package intake

import (
	"context"
	"errors"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/google/uuid"

	"sluice/modules/contract"
	"sluice/platform/httpserver"
)

// await holds the request until the order is final, or the client's wait (or
// intake.max_wait) is over, or the server drains. When it returns false, the
// request has been answered.
func (m *Module) await(w http.ResponseWriter, r *http.Request, o *order, d time.Duration) (_ *order, ok bool) {
	d = min(d, m.cfg.MaxWait)
	defer func() {
		if ok { // not with a problem
			w.Header().Set("Preference-Applied", "wait="+strconv.Itoa(int(d/time.Second)))
		}
	}()
	watch := m.waiters.watch(o.ID)
	defer m.waiters.leave(watch)
	current, err := m.store.get(r.Context(), o.ID)
	switch {
	case err == nil:
		o = current
	case r.Method == http.MethodPost:
		// The order is committed, whatever can be read now: that is what to say.
		m.logger.WarnContext(r.Context(), "cannot read an order that was just accepted; its client may wait in vain", "order_id", o.ID, "error", err)
	default:
		m.unread(w, r, err)
		return nil, false
	}
	if o.Status.Final() {
		return o, true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		select {
		case news := <-watch.news:
			switch {
			case news == nil:
				httpserver.WriteProblem(w, r, problemNotFound())
				return nil, false
			case !news.after(o):
				continue
			}
			if o = news.sent(o); o.Status.Final() {
				return o, true
			}
		case <-timer.C:
			return o, true
		case <-httpserver.Draining(r.Context()):
			return o, true
		case <-r.Context().Done(): // the client has left, or has closed its side and may be there still
			return o, true
		}
	}
}

// unread answers a request for an order that could not be read.
func (m *Module) unread(w http.ResponseWriter, r *http.Request, err error) {
	switch {
	case errors.Is(err, errNotFound):
		httpserver.WriteProblem(w, r, problemNotFound())
	case r.Context().Err() != nil: // which is why, and nothing to log
		m.refuse(w, r, problemUnread())
	default:
		m.failed(w, r, "read an order", err)
	}
}

// sent returns the order with what its client sent taken from an earlier state of
// it: news may not have that (see change.first).
func (o *order) sent(earlier *order) *order {
	whole := *o
	whole.Owner, whole.Number, whole.IdempotencyKey = earlier.Owner, earlier.Number, earlier.IdempotencyKey
	whole.ContentType, whole.Size, whole.Hash = earlier.ContentType, earlier.Size, earlier.Hash
	whole.AcceptedAt, whole.TraceParent, whole.TraceState = earlier.AcceptedAt, earlier.TraceParent, earlier.TraceState
	return &whole
}

// after reports whether o is a later state of an order than earlier: of a later
// set of attempts, or further on its way in the same one.
func (o *order) after(earlier *order) bool {
	if o.AttemptBase != earlier.AttemptBase {
		return o.AttemptBase > earlier.AttemptBase
	}
	if o.Attempts != earlier.Attempts {
		return o.Attempts > earlier.Attempts
	}
	return progress(o.Status) > progress(earlier.Status)
}

// progress sorts the statuses of one set of attempts. News of a save can come
// for a dead order still.
func progress(s contract.Status) int {
	switch s {
	case contract.StatusAccepted:
		return 0
	case contract.StatusRetrying:
		return 1
	case contract.StatusDead:
		return 2
	default:
		return 3
	}
}

// shared is a store that other processes change, too.
type shared interface {
	// follow calls heard with the ids of orders that other processes have
	// changed, soon after they did, and with nil when it may have missed some.
	// It blocks until ctx ends.
	follow(ctx context.Context, heard func(ids []uuid.UUID))
	// changed returns those of the orders, without bodies, that are not in the
	// state any more in which they are known, and the ids of those that are
	// gone.
	changed(ctx context.Context, known []version) (found []*order, gone []uuid.UUID, err error)
}

// version is a state of an order, as far as it matters to those who wait. The
// zero state is none that an order can have.
type version struct {
	id       uuid.UUID
	attempts int
	status   contract.Status
}

const (
	// lookEvery is how often the orders that are waited for are looked at,
	// all together: for news that was lost.
	lookEvery = 2 * time.Second
	// lookSize is how many are looked at in one query.
	lookSize = 500
)

// follow takes over what other processes make of orders that are waited for
// here, until ctx ends. A process that has its store for itself has nothing to
// follow.
func (m *Module) follow(ctx context.Context) {
	s, ok := m.store.(shared)
	if !ok {
		return
	}
	var listening sync.WaitGroup
	defer listening.Wait()
	listening.Go(func() { s.follow(ctx, m.waiters.heard) })
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			m.waiters.heard(nil)
		case <-m.waiters.wake():
		case <-ctx.Done():
			return
		}
		if err := m.look(ctx, s); err != nil && ctx.Err() == nil {
			// Whoever reads or writes tells it louder; the next tick tries again.
			m.logger.Debug("cannot look for news of orders that are waited for", "error", err)
		}
	}
}

// look reads the orders of which there may be news, and hands them on.
func (m *Module) look(ctx context.Context, s shared) error {
	stale := m.waiters.takeStale()
	for len(stale) > 0 {
		n := min(len(stale), lookSize)
		found, gone, err := s.changed(ctx, stale[:n])
		if err != nil {
			return err
		}
		for _, o := range found {
			m.waiters.notify(o.ID, o)
		}
		for _, id := range gone {
			m.waiters.notify(id, nil)
		}
		stale = stale[n:]
	}
	return nil
}

// waiters hands the news of orders to the requests that wait for it, so that
// they do not ask the store again and again. It is safe for concurrent use.
type waiters struct {
	mu      sync.Mutex
	waited  map[uuid.UUID]*audience
	stale   map[uuid.UUID]struct{} // waited for, and to be looked at
	stirred chan struct{}          // there is something in stale
}

// audience is all that wait for one order.
type audience struct {
	known   version // what they were told last
	watches []*watch
}

// watch is one that waits.
type watch struct {
	id uuid.UUID
	// news has the order after each change, nil when it is gone, as the change
	// found it: without its body, and maybe without what its client sent. What
	// is not taken in time gives way to what is newer.
	news chan *order
}

// newsKept is how many changes a watch keeps: an order has no more statuses
// between a replay and the next.
const newsKept = 3

// watch begins to collect news of the order, until leave. Watch first and read
// the order afterwards, or a change between the two goes unnoticed; what was
// read can therefore be newer than the first news.
func (w *waiters) watch(id uuid.UUID) *watch {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.waited == nil {
		w.waited = map[uuid.UUID]*audience{}
	}
	a := w.waited[id]
	if a == nil {
		a = &audience{known: version{id: id}}
		w.waited[id] = a
	}
	one := &watch{id: id, news: make(chan *order, newsKept)}
	a.watches = append(a.watches, one)
	return one
}

func (w *waiters) leave(one *watch) {
	w.mu.Lock()
	defer w.mu.Unlock()
	a := w.waited[one.id]
	for i, other := range a.watches {
		if other == one {
			last := len(a.watches) - 1
			a.watches[i], a.watches[last] = a.watches[last], nil
			a.watches = a.watches[:last]
			break
		}
	}
	if len(a.watches) == 0 {
		delete(w.waited, one.id)
		delete(w.stale, one.id)
	}
}

// notify hands the order to all that watch it, nil if it is gone. It never
// blocks.
func (w *waiters) notify(id uuid.UUID, o *order) {
	w.mu.Lock()
	defer w.mu.Unlock()
	a := w.waited[id]
	if a == nil {
		return
	}
	if o != nil {
		a.known = version{id, o.Attempts, o.Status}
	}
	for _, one := range a.watches {
		one.put(o)
	}
}

// put is called by one at a time.
func (w *watch) put(o *order) {
	for {
		select {
		case w.news <- o:
			return
		default:
		}
		select {
		case <-w.news:
		default:
		}
	}
}

// heard notes that other processes have changed these orders, or any if ids is
// nil.
func (w *waiters) heard(ids []uuid.UUID) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stale == nil {
		w.stale = map[uuid.UUID]struct{}{}
	}
	for _, id := range ids {
		if w.waited[id] != nil {
			w.stale[id] = struct{}{}
		}
	}
	if ids == nil {
		for id := range w.waited {
			w.stale[id] = struct{}{}
		}
	}
	if len(w.stale) > 0 {
		select {
		case w.stirring() <- struct{}{}:
		default:
		}
	}
}

// takeStale returns the orders to be looked at, as they are known.
func (w *waiters) takeStale() []version {
	w.mu.Lock()
	defer w.mu.Unlock()
	known := make([]version, 0, len(w.stale))
	for id := range w.stale {
		known = append(known, w.waited[id].known)
	}
	clear(w.stale)
	return known
}

// wake returns a channel that has something when orders are to be looked at.
func (w *waiters) wake() <-chan struct{} {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.stirring()
}

// stirring is called with mu held.
func (w *waiters) stirring() chan struct{} {
	if w.stirred == nil {
		w.stirred = make(chan struct{}, 1)
	}
	return w.stirred
}
