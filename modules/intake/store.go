package intake

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/google/uuid"

	"sluice/modules/contract"
)

// store keeps orders. Every implementation passes the same suite.
//
// All writes of a process go through write, in groups: what write was given
// is durable when it returns nil, and none of it happened when it returns an
// error. Methods are safe for concurrent use.
type store interface {
	// write applies the changes in one transaction: insertions first, then
	// marks, then updates (those of first attempts before the others), each
	// kind in the order given.
	write(ctx context.Context, changes []*change) error
	// flushers is how many calls of write at the same time suit the store.
	flushers() int

	// holds reports whether o would not be inserted, since another order has its
	// number or its idempotency key.
	holds(ctx context.Context, o *order) (bool, error)
	// get returns the order without its body, or errNotFound.
	get(ctx context.Context, id uuid.UUID) (*order, error)
	// list returns orders without bodies, newest first: at most q.limit, and no
	// more once the page is full (pageBytes), but at least one if there is one.
	// It loads hardly more than that.
	list(ctx context.Context, q query) (page, error)
	// floor returns the id of the n-th order that list looks at when it is asked
	// for no number, or uuid.Nil if it looks at fewer. With that as q.floor it
	// looks at no more.
	floor(ctx context.Context, q query, n int) (uuid.UUID, error)

	// claim returns orders that the relay is to publish at time now, with their
	// bodies and all else that their messages are made of, longest due first,
	// except those that skip returns true for: at most limit, and no more once
	// their bodies have reached size bytes (but at least one).
	//
	// A store that several processes share gives each order to one of them: it
	// is due again at the time until, unless it was marked, changed or renewed
	// before. With a zero until, and where the process is alone, nothing is
	// put off.
	claim(ctx context.Context, now, until time.Time, limit, size int, skip func(uuid.UUID) bool) ([]*order, error)
	// renew puts off claimed orders until another time, which may be now, to
	// give them back. What has got another attempt since is left alone.
	renew(ctx context.Context, claimed []mark, until time.Time) error
	// nextDue returns when the first order becomes due after now, or the zero
	// time.
	nextDue(ctx context.Context, now time.Time) (time.Time, error)
	// recover makes orders due whose direct call died with its process, as far
	// as that is certain, and returns how many. All others become due by
	// themselves, when the call must have ended.
	recover(ctx context.Context, now time.Time) (int, error)

	// oldestPublished returns the earliest time at which an unfinished order
	// was marked as published, or the zero time.
	oldestPublished(ctx context.Context) (time.Time, error)
	// republish makes at most limit unfinished orders due now that were marked
	// as published before the given time, and returns how many.
	republish(ctx context.Context, before, now time.Time, limit int) (int, error)
	// carrier names the broker that has the published orders, "" at first.
	carrier(ctx context.Context) (string, error)
	setCarrier(ctx context.Context, name string) error

	// counts returns the number of orders in each state, and beside them those
	// of statusPurged, statusDirect and statusDirectFinal. It does no I/O.
	counts() map[contract.Status]int64
	// sample returns the ids of every n-th order that waits for its first
	// attempt, oldest first. It looks at all of them, but at nothing else.
	sample(ctx context.Context, n int) ([]uuid.UUID, error)
	// oldestWaiting returns when the oldest unfinished order was accepted, or
	// the zero time.
	oldestWaiting(ctx context.Context) (time.Time, error)
	// purge deletes at most limit orders that finished before the given time
	// and returns how many it deleted.
	purge(ctx context.Context, finishedBefore time.Time, limit int) (int, error)
	// ping reports whether orders can be read and written.
	ping(ctx context.Context) error
	// close waits for what is under way. The store cannot be used afterwards.
	close() error
}

// change is one thing to write: an insertion (insert is set), a mark (marks is
// set), or an update of order id (update is set).
type change struct {
	// insert adds an order, unless its number or its idempotency key is taken
	// within its owner's orders. Then found is the order that holds the key
	// or, if the key is free, the number. If that is the same order, it is
	// adopted (order.adopt), and takes a key (order.takesKey), unless another
	// process changes it at this moment.
	insert *order

	// marks notes that the relay has published orders, all of them before
	// publishedAt.
	marks       []mark
	publishedAt time.Time

	// update changes the order id. It must depend on the order only: it may
	// be called more than once. The order is passed without its body. found is
	// the order as it is afterwards, nil if there is none; changed says that
	// the update did not leave it as it was.
	id     uuid.UUID
	update func(*order) verdict
	// first says that update is the outcome of the order's first attempt. Until
	// then all orders are alike in what an outcome looks at, so a store may
	// give update a blank one instead of reading the order; then found is
	// that. What becomes of it counts only if the order is stored as accepted,
	// never attempted and not direct, which it is once in its life; if not,
	// update is called again, with the order as it is.
	first bool

	found   *order
	changed bool
}

// blank is an order of the queue as it is until its first attempt has ended, as
// far as the outcome of that depends on it.
func blank(id uuid.UUID) *order { return &order{ID: id, Status: contract.StatusAccepted} }

// perform lets the change have the order that it is about, nil if there is none,
// fills in its results, and adds to the counts what it changed in them. What is
// to be done with the order is the store's to do.
func (c *change) perform(o *order, counts map[contract.Status]int64) verdict {
	if o == nil {
		return leave
	}
	before := order{Status: o.Status, Direct: o.Direct}
	v := c.update(o)
	switch v {
	case leave:
	case save:
		c.changed = true
		recount(counts, &before, o)
	case remove:
		c.changed = true
		recount(counts, &before, nil)
		return remove
	}
	found := *o
	c.found = &found
	return v
}

// mark identifies a publication: that of an order after so many attempts, or
// that of the news that it is dead. A mark that comes late, after the next
// attempt has been scheduled, therefore wipes nothing out.
type mark struct {
	id       uuid.UUID
	attempts int
	dead     bool // the news: a replay makes the order due and counts no attempt
}

const (
	// statusPurged stands in the counts for orders that are not there any more.
	// With them, the counts tell how many orders have been accepted and finished.
	statusPurged contract.Status = "purged"
	// statusDirect stands for orders that are direct, and statusDirectFinal for
	// those that ever became final as such. They are in the counts of their
	// status as well; with these they can be told from the orders of the queue.
	statusDirect      contract.Status = "direct"
	statusDirectFinal contract.Status = "direct final"
)

// recount takes what became of an order over into the counts. Before is nil if
// there was none, after if there is none any more.
func recount(counts map[contract.Status]int64, before, after *order) {
	if before != nil {
		counts[before.Status]--
		if before.Direct {
			counts[statusDirect]--
		}
	}
	if after != nil {
		counts[after.Status]++
		if after.Direct {
			counts[statusDirect]++
		}
	}
	if before != nil && after != nil && before.Direct && after.Status.Final() {
		counts[statusDirectFinal]++
	}
}

var (
	// errNotFound is returned by store.get.
	errNotFound = errors.New("no such order")
	// errTooSlow is returned by store.list and store.floor after listTimeout.
	errTooSlow = errors.New("took too long")
)

// openStore opens the store that the configuration names.
func openStore(ctx context.Context, cfg StoreConfig, logger *slog.Logger) (store, error) {
	switch cfg.Driver {
	case DriverMemory:
		return newMemoryStore(), nil
	case DriverSQLite:
		return openSQLiteStore(ctx, cfg.DSN, logger)
	case DriverPostgres:
		return openPostgresStore(ctx, cfg.DSN, logger)
	default:
		return nil, errUnknownDriver(cfg.Driver)
	}
}
