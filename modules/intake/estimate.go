package intake

import (
	"context"
	"encoding/binary"
	"math"
	"sort"
	"sync"
	"time"

	"github.com/google/uuid"

	"sluice/modules/contract"
)

const (
	// tallyEvery is the least time between two looks at the counts, and
	// tallyIdle the longest.
	tallyEvery = 20 * time.Millisecond
	tallyIdle  = 200 * time.Millisecond
	// tallyPoints is how many points the way from time to rank has at most,
	// and about how many parts the backlog is divided into.
	tallyPoints = 4096
	tallyParts  = 1024

	// The drain is measured over the last drainOrders orders, and drainSpan,
	// whichever is longer, but not beyond drainMost.
	drainEvery  = 100 * time.Millisecond
	drainOrders = 1000
	drainSpan   = 3 * time.Second
	drainMost   = 60 * time.Second
	// A drain of fewer orders, or over a shorter time, is not known yet.
	drainOrdersMin = 8
	drainSpanMin   = 250 * time.Millisecond
	// drainGrowth is by how much a backlog must have been smaller for its drain
	// to say nothing of the present one: with few orders the backend is idle
	// half of the time.
	drainGrowth = 8
	// stallMin is how long nothing must have been finished before the drain
	// counts as stalled, at least.
	stallMin = 2 * time.Second

	// What clients are told to wait: no longer, however far away the end is,
	// and no longer where the end is not known.
	retryMost    = time.Hour
	retryUnknown = time.Minute
)

// forecast says where a waiting order stands, and when it will probably be
// final. It knows no order: only how many had been accepted by which time, how
// many are waiting, and how fast they become fewer, all of it from the store's
// counts. So it holds for what other processes do as well, costs the same
// whatever the backlog, and its memory is bounded.
//
// It takes orders to be finished in the order in which they were accepted, as
// brokers do it, more or less, and retries to be spread evenly among them.
// Direct orders are not in the queue, and it leaves them out. It is safe for
// concurrent use.
type forecast struct {
	counts func() map[contract.Status]int64

	mu       sync.Mutex
	ranks    []point // how many orders had been accepted at which time
	seeded   bool    // ranks goes back to the oldest that waited at the start
	drains   []drain
	attempt  time.Duration // moving mean of what the last attempt of an order takes, 0 = unknown
	lastLook time.Time
}

// point is one of the way from time to rank: so many orders had been accepted.
type point struct {
	at       time.Time
	accepted int64
}

// drain is what was finished by a time, and what was waiting then.
type drain struct {
	at                time.Time
	finished, backlog int64
}

// tally is what the counts say of the orders of the queue.
type tally struct {
	accepted        int64 // ever
	finished        int64 // ever
	fresh, retrying int64 // waiting
	backlog         int64 // both
}

func tallyOf(counts map[contract.Status]int64) tally {
	// At least none: on PostgreSQL, processes of a version that did not tell direct orders apart leave wrong counts.
	t := tally{fresh: max(0, counts[contract.StatusAccepted]-max(0, counts[statusDirect])), retrying: counts[contract.StatusRetrying]}
	t.backlog = t.fresh + t.retrying
	t.finished = counts[statusPurged] - counts[statusDirectFinal]
	for _, status := range contract.Statuses() {
		if status.Final() {
			t.finished += counts[status]
		}
	}
	t.accepted = t.finished + t.backlog
	return t
}

func newForecast(counts func() map[contract.Status]int64) *forecast {
	f := &forecast{counts: counts}
	f.look(time.Now())
	return f
}

// seed reads how the orders that are waiting already were accepted: one of so
// many, oldest first, from an index of nothing but the waiting.
func (f *forecast) seed(ctx context.Context, s store) error {
	t := tallyOf(f.counts())
	every := max(1, t.fresh/tallyParts)
	ids, err := s.sample(ctx, int(every))
	if err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	var before []point
	for i, id := range ids {
		// Those that were accepted since the start have points already.
		if at := idTime(id); at.Before(f.ranks[0].at) && len(before) < tallyPoints/2 {
			before = append(before, point{at, min(t.accepted, t.accepted-t.fresh+int64(i+1)*every)}) // direct ones are among them
		}
	}
	f.ranks = append(before, f.ranks...)
	f.seeded = true
	return nil
}

// look takes the counts over. It may be called as often as they change.
func (f *forecast) look(now time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if now.Sub(f.lastLook) < tallyEvery {
		return
	}
	f.lastLook = now
	t := tallyOf(f.counts())
	f.rank(now, t)
	if n := len(f.drains); n == 0 || now.Sub(f.drains[n-1].at) >= drainEvery {
		f.drains = append(f.drains, drain{now, t.finished, t.backlog})
		if old := len(f.drains) - int(2*drainMost/drainEvery); old > 0 {
			f.drains = append(f.drains[:0], f.drains[len(f.drains)/2:]...)
		}
	}
}

// rank adds a point, if it is worth one, and keeps their number bounded.
func (f *forecast) rank(now time.Time, t tally) {
	n := len(f.ranks)
	for i := n - 1; i >= 0 && f.ranks[i].accepted > t.accepted; i-- {
		f.ranks[i].accepted = t.accepted // a database took over that has not got them all
	}
	if n > 0 && t.accepted-f.ranks[n-1].accepted < max(1, t.backlog/tallyParts) {
		return
	}
	f.ranks = append(f.ranks, point{now, t.accepted})
	if n = len(f.ranks); n < tallyPoints {
		return
	}
	// Of those who all have been finished the last one will do; of the others,
	// if they are too many still, every second one.
	first := sort.Search(n, func(i int) bool { return f.ranks[i].accepted > t.accepted-t.backlog })
	f.ranks = append(f.ranks[:0], f.ranks[max(0, first-1):]...)
	if n = len(f.ranks); n >= tallyPoints/2 {
		for i := range n / 2 {
			f.ranks[i] = f.ranks[2*i+1]
		}
		f.ranks = f.ranks[:n/2]
	}
}

// acceptedBy returns how many orders had been accepted at that time.
func (f *forecast) acceptedBy(at, now time.Time, t tally) int64 {
	i := sort.Search(len(f.ranks), func(i int) bool { return f.ranks[i].at.After(at) })
	if i == 0 {
		return f.ranks[0].accepted
	}
	from, to := f.ranks[i-1], point{now, t.accepted}
	if i < len(f.ranks) {
		to = f.ranks[i]
	}
	span := to.at.Sub(from.at)
	if span <= 0 {
		return to.accepted
	}
	part := float64(at.Sub(from.at)) / float64(span)
	return from.accepted + int64(math.Round(min(part, 1)*float64(to.accepted-from.accepted)))
}

// attempted notes how long an attempt took that was an order's last.
func (f *forecast) attempted(took time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.attempt == 0 {
		f.attempt = took
	}
	f.attempt += (took - f.attempt) / 32
}

// expectation is what is known of the future of a waiting order.
type expectation struct {
	position   int64         // among those that wait for their first attempt, 1 = next; 0 = unknown
	completion time.Time     // zero = unknown
	retryAfter time.Duration // when to ask again
}

// of returns what is to be expected of an order that is not final.
func (f *forecast) of(o *order, now time.Time) expectation {
	f.look(now)
	f.mu.Lock()
	defer f.mu.Unlock()
	if o.Direct { // its call is under way: it waits for no other
		return expectation{retryAfter: f.attempt}
	}
	t := tallyOf(f.counts())
	rate, stalled := f.rate(now)
	next := o.queuedAt()
	e := expectation{}
	if next.After(now) {
		if rate > 0 {
			e.completion = later(next, now.Add(perSecond(t.fresh, rate))).Add(f.attempt)
		}
	} else if e.position = f.position(next, now, t); e.position > 0 {
		switch {
		case rate > 0:
			e.completion = now.Add(max(perSecond(withRetries(e.position, t), rate), f.attempt))
		case e.position == 1 && stalled == 0 && f.attempt > 0:
			e.completion = now.Add(f.attempt)
		}
	}
	switch {
	case !e.completion.IsZero():
		e.retryAfter = min(e.completion.Sub(now), retryMost)
	case next.After(now):
		e.retryAfter = min(next.Sub(now), retryMost)
	default:
		e.retryAfter = min(stalled, retryUnknown)
	}
	return e
}

// position returns the place of an order that waits since that time, 0 if it is
// not known.
func (f *forecast) position(since, now time.Time, t tally) int64 {
	if !f.seeded || t.fresh <= 0 {
		return 0
	}
	ahead := t.fresh - (t.accepted - f.acceptedBy(since, now, t))
	return min(max(ahead, 1), t.fresh)
}

// withRetries returns how many orders are finished until that place is, if those
// that are tried again are spread evenly among the others.
func withRetries(position int64, t tally) int64 {
	return int64(math.Round(float64(position) * float64(t.backlog) / float64(t.fresh)))
}

// patience returns when a client may come again who was refused.
func (f *forecast) patience(now time.Time) time.Duration {
	f.look(now)
	f.mu.Lock()
	defer f.mu.Unlock()
	rate, stalled := f.rate(now)
	if rate > 0 {
		stalled = perSecond(tallyOf(f.counts()).backlog, rate)
	}
	return min(stalled, retryUnknown)
}

// rate returns how many orders per second become final, 0 if that is not known,
// and for how long none has although there are some.
func (f *forecast) rate(now time.Time) (perSecond float64, stalled time.Duration) {
	newest := f.drains[len(f.drains)-1]
	all := f.stretch(newest.backlog, 0, func(int) bool { return true })
	if all.end < 0 {
		if newest.backlog > 0 {
			stalled = now.Sub(all.busySince)
		}
		return 0, stalled
	}
	silence := now.Sub(f.drains[all.end].at)
	if silence > max(stallMin, 3*all.gap, 3*f.attempt) {
		return 0, silence
	}
	n, span := f.between(all)
	// Calls that began together end together. From the middle of one such burst
	// to the end of another, up to a burst too many would be counted, and of
	// the first few that is a lot: ends of bursts are better, if there are any.
	// A straggler is not a burst, and what was before says nothing of now.
	if ends := f.stretch(newest.backlog, all.start, f.quietAfter); ends.end >= 0 {
		m, apart := f.between(ends)
		age := f.drains[all.end].at.Sub(f.drains[ends.end].at)
		if 2*m >= n && 2*apart >= span && apart <= 2*span+drainSpan && 2*age <= span {
			n, span = m, apart
		} else if span < max(drainSpan, 2*all.gap) {
			return 0, 0
		}
	}
	if span < drainSpanMin || (n < drainOrdersMin && span < drainSpan) {
		return 0, 0
	}
	return float64(n) / span.Seconds(), 0
}

// stretch is a part of drains that the rate is measured over: from one at which
// orders were finished to another. Elsewhere finished ones are seen once a
// second only.
type stretch struct {
	start, end int           // -1 if there is none
	gap        time.Duration // longest time in which nothing was finished
	busySince  time.Time     // no later than that orders have been waiting
}

// stretch returns the latest one that is long enough, or else the longest that
// there is, between drains that may be used. It does not end before drain from.
func (f *forecast) stretch(backlog int64, from int, use func(i int) bool) stretch {
	s := stretch{start: -1, end: -1, busySince: f.drains[len(f.drains)-1].at}
	for i := len(f.drains) - 1; i > 0 && f.drains[i-1].backlog > 0 && backlog > 0; i-- {
		if s.end < 0 && i < from {
			break
		}
		d, earlier := f.drains[i], f.drains[i-1]
		s.busySince = earlier.at
		if d.finished < earlier.finished {
			break // a replay
		}
		if d.finished > earlier.finished && use(i) {
			if s.end < 0 {
				s.end = i
			} else {
				s.gap = max(s.gap, f.drains[s.start].at.Sub(d.at))
			}
			s.start = i
		}
		if s.end >= 0 && f.measured(s, earlier, backlog) {
			break
		}
	}
	return s
}

// quietAfter reports whether nothing was finished next.
func (f *forecast) quietAfter(i int) bool {
	return i+1 < len(f.drains) && f.drains[i+1].finished == f.drains[i].finished
}

// between returns what was finished in a stretch, and how long that took.
func (f *forecast) between(s stretch) (int64, time.Duration) {
	return f.drains[s.end].finished - f.drains[s.start].finished, f.drains[s.end].at.Sub(f.drains[s.start].at)
}

// measured reports whether it is enough to look at the drains of a stretch.
func (f *forecast) measured(s stretch, earlier drain, backlog int64) bool {
	n, span := f.between(s)
	switch {
	case n >= drainOrders && span >= drainSpan, span >= drainMost:
		return true
	default:
		return drainGrowth*earlier.backlog < backlog && n >= 4*drainOrdersMin && span >= 2*drainSpanMin
	}
}

// queuedAt returns since when, or from when on, the order waits for its next
// attempt.
func (o *order) queuedAt() time.Time {
	if o.Status == contract.StatusAccepted {
		return o.AcceptedAt
	}
	return later(o.nextAttempt(), o.UpdatedAt) // a replayed one has no next attempt
}

func later(a, b time.Time) time.Time {
	if a.After(b) {
		return a
	}
	return b
}

func perSecond(n int64, rate float64) time.Duration {
	return time.Duration(min(float64(n)/rate*float64(time.Second), float64(math.MaxInt64/4)))
}

// seconds rounds up to whole ones, at least 1: delta-seconds of Retry-After.
func seconds(d time.Duration) int64 { return max(1, int64((d+time.Second-1)/time.Second)) }

// idTime returns when an order with that id was accepted (RFC 9562, section
// 5.7).
func idTime(id uuid.UUID) time.Time {
	return time.UnixMilli(int64(binary.BigEndian.Uint64(id[:8]) >> 16))
}
