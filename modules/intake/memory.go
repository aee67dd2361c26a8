package intake

import (
	"bytes"
	"context"
	"encoding/binary"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/google/uuid"
	"github.com/tidwall/btree"

	"sluice/modules/contract"
)

// memoryStore keeps orders until the process ends. It serves tests, trials and
// the measurement of what durability costs.
type memoryStore struct {
	mu     sync.RWMutex
	orders btree.Map[string, *order] // by the bytes of the id, so by time
	number map[ownedKey]uuid.UUID    // numbers that are held
	key    map[ownedKey]uuid.UUID    // idempotency keys
	queue  btree.Map[dueKey, uuid.UUID]
	wait   btree.Set[string] // unfinished orders
	count  map[contract.Status]int64

	published map[uuid.UUID]time.Time // unfinished orders that are marked
	broker    string                  // that has them
}

type ownedKey struct{ owner, value string }

// dueKey sorts by time, then by id. It is a string so that the tree's order is
// the built-in one: eight bytes of time, sixteen of id.
type dueKey = string

func newMemoryStore() *memoryStore {
	return &memoryStore{
		number: map[ownedKey]uuid.UUID{},
		key:    map[ownedKey]uuid.UUID{},
		count:  map[contract.Status]int64{},

		published: map[uuid.UUID]time.Time{},
	}
}

// flushers is one: there is one lock.
func (s *memoryStore) flushers() int { return 1 }

func (s *memoryStore) write(_ context.Context, changes []*change) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range changes {
		if c.insert != nil {
			s.insert(c)
		}
	}
	for _, c := range changes {
		for _, m := range c.marks {
			s.mark(m, c.publishedAt)
		}
	}
	for _, c := range changes {
		if c.update != nil {
			s.update(c)
		}
	}
	return nil
}

func (s *memoryStore) insert(c *change) {
	c.found, c.changed = nil, false
	o := *c.insert
	if holder, ok := s.holder(&o); ok {
		if found := *s.at(holder); found.adopt(&o) == save {
			recount(s.count, s.at(holder), &found)
			s.put(&found)
		}
		if found := *s.at(holder); found.takesKey(&o) {
			found.IdempotencyKey = o.IdempotencyKey
			s.orders.Set(string(holder[:]), &found)
			s.key[ownedKey{o.Owner, o.IdempotencyKey}] = holder
		}
		c.found = withoutBody(s.at(holder))
		return
	}
	c.changed = true
	o.Size = len(o.Body)
	recount(s.count, nil, &o)
	s.put(&o)
}

func (s *memoryStore) holds(_ context.Context, o *order) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, ok := s.holder(o)
	return ok, nil
}

func (s *memoryStore) holder(o *order) (uuid.UUID, bool) {
	if o.IdempotencyKey != "" {
		if id, ok := s.key[ownedKey{o.Owner, o.IdempotencyKey}]; ok {
			return id, true
		}
	}
	if o.Number != "" {
		if id, ok := s.number[ownedKey{o.Owner, o.Number}]; ok {
			return id, true
		}
	}
	return uuid.Nil, false
}

func (s *memoryStore) mark(m mark, at time.Time) {
	found := s.at(m.id)
	if found == nil || found.Attempts != m.attempts || (found.Status == contract.StatusDead) != m.dead {
		return
	}
	o := *found
	o.PublishAt = time.Time{}
	s.put(&o)
	if !m.dead {
		s.published[o.ID] = at
	}
}

func (s *memoryStore) update(c *change) {
	c.found, c.changed = nil, false
	current := s.at(c.id)
	if current == nil {
		return
	}
	o := *current
	o.History = slices.Clone(o.History)
	switch c.update(&o) {
	case leave:
	case save:
		c.changed = true
		recount(s.count, current, &o)
		s.put(&o)
	case remove:
		c.changed = true
		recount(s.count, current, nil)
		s.drop(current)
		return
	}
	c.found = withoutBody(s.at(c.id))
}

// put replaces the order and keeps every index in step. Stored orders are never
// changed in place, so a reader may hold on to one.
func (s *memoryStore) put(o *order) {
	if old := s.at(o.ID); old != nil {
		s.drop(old)
	}
	id := string(o.ID[:])
	s.orders.Set(id, o)
	if o.Number != "" && !o.NumberReleased {
		s.number[ownedKey{o.Owner, o.Number}] = o.ID
	}
	if o.IdempotencyKey != "" {
		s.key[ownedKey{o.Owner, o.IdempotencyKey}] = o.ID
	}
	if !o.PublishAt.IsZero() {
		s.queue.Set(dueKeyOf(o), o.ID)
	}
	if !o.Status.Final() {
		s.wait.Insert(id)
	}
}

func (s *memoryStore) drop(o *order) {
	id := string(o.ID[:])
	s.orders.Delete(id)
	delete(s.published, o.ID)
	if o.Number != "" && !o.NumberReleased {
		delete(s.number, ownedKey{o.Owner, o.Number})
	}
	if o.IdempotencyKey != "" {
		delete(s.key, ownedKey{o.Owner, o.IdempotencyKey})
	}
	if !o.PublishAt.IsZero() {
		s.queue.Delete(dueKeyOf(o))
	}
	s.wait.Delete(id)
}

func (s *memoryStore) at(id uuid.UUID) *order {
	o, _ := s.orders.Get(string(id[:]))
	return o
}

func (s *memoryStore) get(_ context.Context, id uuid.UUID) (*order, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	o := s.at(id)
	if o == nil {
		return nil, errNotFound
	}
	return withoutBody(o), nil
}

func (s *memoryStore) list(_ context.Context, q query) (found page, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.below(q, func(o *order) bool {
		if bytes.Compare(o.ID[:], q.floor[:]) < 0 {
			return false
		}
		if o.Owner == q.owner && (q.status == "" || o.Status == q.status) && (q.number == "" || o.Number == q.number) {
			return found.take(withoutBody(o), q.limit)
		}
		return true
	})
	return found, nil
}

func (s *memoryStore) floor(_ context.Context, q query, n int) (floor uuid.UUID, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.below(q, func(o *order) bool {
		if n--; n == 0 {
			floor = o.ID
		}
		return n > 0
	})
	return floor, nil
}

// below visits the orders before q.before, newest first, until visit returns
// false.
func (s *memoryStore) below(q query, visit func(*order) bool) {
	below := string(q.below())
	s.orders.Descend(below, func(id string, o *order) bool { return id == below || visit(o) })
}

func (s *memoryStore) claim(_ context.Context, now, _ time.Time, limit, size int, skip func(uuid.UUID) bool) ([]*order, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var found []*order
	total := 0
	s.queue.Scan(func(_ dueKey, id uuid.UUID) bool {
		o := s.at(id)
		if !o.due(now) || len(found) >= limit || (total >= size && len(found) > 0) {
			return false
		}
		if !skip(id) {
			found = append(found, o)
			total += o.Size
		}
		return true
	})
	return found, nil
}

func (s *memoryStore) nextDue(_ context.Context, now time.Time) (next time.Time, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	s.queue.Ascend(timeKey(now.Add(time.Microsecond)), func(_ dueKey, id uuid.UUID) bool {
		next = s.at(id).PublishAt
		return false
	})
	return next, nil
}

// renew has nothing to do: nobody else claims.
func (s *memoryStore) renew(context.Context, []mark, time.Time) error { return nil }

// recover has nothing to do: no order outlives the process that called.
func (s *memoryStore) recover(context.Context, time.Time) (int, error) { return 0, nil }

func (s *memoryStore) oldestPublished(context.Context) (oldest time.Time, err error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, at := range s.published {
		if oldest.IsZero() || at.Before(oldest) {
			oldest = at
		}
	}
	return oldest, nil
}

func (s *memoryStore) republish(_ context.Context, before, now time.Time, limit int) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for id, at := range s.published {
		if n == limit {
			break
		}
		if !at.Before(before) {
			continue
		}
		o := *s.at(id)
		o.PublishAt = now
		s.put(&o)
		n++
	}
	return n, nil
}

func (s *memoryStore) carrier(context.Context) (string, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.broker, nil
}

func (s *memoryStore) setCarrier(_ context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.broker = name
	return nil
}

func (s *memoryStore) counts() map[contract.Status]int64 {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return maps.Clone(s.count)
}

func (s *memoryStore) sample(_ context.Context, n int) ([]uuid.UUID, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	var ids []uuid.UUID
	seen := 0
	s.wait.Scan(func(id string) bool {
		if o, _ := s.orders.Get(id); o.Status == contract.StatusAccepted {
			if seen++; seen%n == 0 {
				ids = append(ids, o.ID)
			}
		}
		return true
	})
	return ids, nil
}

func (s *memoryStore) oldestWaiting(context.Context) (time.Time, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	id, ok := s.wait.Min()
	if !ok {
		return time.Time{}, nil
	}
	o, _ := s.orders.Get(id)
	return o.AcceptedAt, nil
}

func (s *memoryStore) purge(_ context.Context, finishedBefore time.Time, limit int) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	var old []*order
	s.orders.Scan(func(_ string, o *order) bool {
		if !o.AcceptedAt.Before(finishedBefore) || len(old) >= limit {
			return false
		}
		if o.Status.Final() && o.FinishedAt.Before(finishedBefore) {
			old = append(old, o)
		}
		return true
	})
	for _, o := range old {
		recount(s.count, o, nil)
		s.drop(o)
	}
	s.count[statusPurged] += int64(len(old))
	return len(old), nil
}

func (s *memoryStore) ping(context.Context) error { return nil }

func (s *memoryStore) close() error { return nil }

func withoutBody(o *order) *order {
	c := *o
	c.Body = nil
	return &c
}

func dueKeyOf(o *order) dueKey { return timeKey(o.PublishAt) + string(o.ID[:]) }

// timeKey returns the first part of the keys of orders due at that time.
func timeKey(at time.Time) dueKey {
	return string(binary.BigEndian.AppendUint64(nil, uint64(max(0, at.UnixMicro()))))
}
