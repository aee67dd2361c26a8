package intake

import (
	"context"
	"time"

	"sluice/modules/contract"
	"sluice/platform/group"
)

// groupSize is the most changes in one transaction. It bounds how long one
// flush can take, and with it how long the next caller waits.
const groupSize = 1024

// writer is the one road to the store's write: it makes groups of concurrent
// changes and tells the rest of the module what was committed.
type writer struct {
	group *group.Group[*change]
}

// newWriter returns a writer that calls committed after each transaction,
// before the callers of do go on. It does so on as many goroutines as the store
// has flushers.
func newWriter(s store, committed func([]*change)) *writer {
	return &writer{group: group.New(group.Config[*change]{Size: groupSize, Flushers: s.flushers(), Flush: func(ctx context.Context, changes []*change) error {
		if err := s.write(ctx, changes); err != nil {
			return err
		}
		committed(changes)
		return nil
	}})}
}

// do makes the changes durable and fills in their results. It waits for the
// commit; if ctx ends first, they may still happen, and their results must not
// be read.
func (w *writer) do(ctx context.Context, changes ...*change) error {
	return w.group.Do(ctx, changes...)
}

// submit is do without the waiting: what it returns waits.
func (w *writer) submit(ctx context.Context, c *change) (submission, error) {
	return w.group.Add(ctx, c)
}

// submission is a change on its way to the disk.
type submission = group.Pending[*change]

// close waits for the last group.
func (w *writer) close() { w.group.Close() }

// committed is called by the writer after every transaction.
func (m *Module) committed(changes []*change) {
	wake := false
	for _, c := range changes {
		switch {
		case c.insert != nil && c.changed:
			m.stats.accepted(1)
			wake = wake || !c.insert.Direct
		case c.update != nil && c.changed:
			wake = m.updated(c) || wake
		}
	}
	if wake {
		m.relay.nudge()
	}
	m.outlook.look(time.Now())
}

// updated follows one committed update, and reports whether there is something
// for the relay to do.
func (m *Module) updated(c *change) bool {
	m.waiters.notify(c.id, c.found)
	if c.found == nil {
		return false
	}
	if c.found.Status.Final() {
		m.stats.finished(c.found.Status)
	}
	if c.found.Status == contract.StatusSaved {
		return false
	}
	return !c.found.PublishAt.IsZero()
}
