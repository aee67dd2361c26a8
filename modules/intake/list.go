package intake

import (
	"context"
	"errors"
	"strings"
	"time"

	"github.com/google/uuid"

	"sluice/modules/contract"
)

// query selects orders for a list.
type query struct {
	owner  string
	status contract.Status // "" = any
	number string          // "" = any
	before uuid.UUID       // only older ones; uuid.Nil = from the newest on
	floor  uuid.UUID       // only this one and newer ones; uuid.Nil = down to the oldest
	limit  int
}

// page is what a list returns.
type page struct {
	orders []*order
	next   uuid.UUID // the list goes on with orders before this one; uuid.Nil = it ends here
	size   int       // of what the backend has said of orders, and of what is remembered of attempts
}

// take adds the next order, or notes that it belongs to the next page. It
// reports whether to go on.
func (p *page) take(o *order, limit int) bool {
	if n := len(p.orders); n == limit || p.size >= pageBytes {
		p.next = p.orders[n-1].ID
		return false
	}
	p.orders = append(p.orders, o)
	p.size += len(o.BackendBody) + len(o.Problem) + o.historySize
	return true
}

const (
	// pageBytes is the size at which a page is full, whatever its limit: one
	// answer of the backend can be thousands of times as long as another.
	pageBytes = 1 << 20
	// listReach is how many orders are looked at for one page, at most. An index
	// for every list would make every outcome dearer; so some pass over orders
	// that are not theirs.
	listReach = 100_000
	// maxLists is how many lists a process reads at once: fewer than a store has
	// connections for reading, which the relay and the reads of single orders
	// share.
	maxLists = 2
	// listTimeout is how long a list waits for its turn, and how long it may take
	// then.
	listTimeout = 5 * time.Second
)

// list reads a page when it is its turn.
func (m *Module) list(ctx context.Context, q query) (page, error) {
	waiting, cancel := context.WithTimeout(ctx, listTimeout)
	defer cancel()
	if err := m.lists.Acquire(waiting, 1); err != nil {
		return page{}, errors.Join(errTooSlow, err)
	}
	defer m.lists.Release(1)
	return findPage(ctx, m.store, q, listReach)
}

// findPage reads a page, for which it looks at no more orders than reach; the
// page is then short, or even empty, and the list goes on where it ended. Most
// pages are full after a few, so it does not reach that far at first.
func findPage(ctx context.Context, s store, q query, reach int) (page, error) {
	if q.number != "" { // which has few orders, all in one place
		return s.list(ctx, q)
	}
	for n := min(4*(q.limit+1), reach); ; n = reach {
		var err error
		if q.floor, err = s.floor(ctx, q, n); err != nil {
			return page{}, err
		}
		clear(q.floor[6:]) // it can be the order of another name: its millisecond is enough
		found, err := s.list(ctx, q)
		if err != nil || found.next != uuid.Nil {
			return found, err
		}
		if q.floor == uuid.Nil || n == reach {
			found.next = q.floor
			return found, nil
		}
	}
}

// pageStatement finds the orders of a page and the one after it, newest first, in
// the SQL that both databases have in common. It goes along an index.
func (q query) pageStatement(columns string) (statement string, args []any) {
	where, args := []string{"owner = ?"}, []any{q.owner}
	// A range of ids, even of all of them, makes planners go along the ids rather
	// than sort. Where a number leads to a few orders it would lead elsewhere.
	if q.before != uuid.Nil || q.number == "" {
		where, args = append(where, "id < ?"), append(args, q.below())
	}
	if q.floor != uuid.Nil {
		where, args = append(where, "id >= ?"), append(args, q.floor[:])
	}
	if q.status != "" {
		where, args = append(where, "status = ?"), append(args, string(q.status))
	}
	if q.number != "" {
		where, args = append(where, "number = ?"), append(args, q.number)
	}
	if index, _ := q.index(); index != "" {
		where = append(where, index)
	}
	return `SELECT ` + columns + ` FROM orders WHERE ` + strings.Join(where, " AND ") + ` ORDER BY id DESC LIMIT ?`, append(args, q.limit+1)
}

// floorStatement finds the n-th order from the start of the page on in the index
// that pageStatement goes along, unless that is the one of numbers.
func (q query) floorStatement(n int) (statement string, args []any) {
	where, args := []string{"id < ?"}, []any{q.below()}
	index, column := q.index()
	switch column {
	case "owner":
		where, args = append(where, index, "owner = ?"), append(args, q.owner)
	case "status":
		where, args = append(where, index, "status = ?"), append(args, string(q.status))
	}
	return `SELECT id FROM orders WHERE ` + strings.Join(where, " AND ") + ` ORDER BY id DESC LIMIT 1 OFFSET ?`, append(args, n-1)
}

// index returns what the partial index holds that suits the list, repeated in the
// statement so that the planner sees that it fits, and its first column. Without
// one, the ids will do.
func (q query) index() (holds, column string) {
	switch {
	case q.number != "":
		return "", ""
	case q.status == contract.StatusAccepted, q.status == contract.StatusRetrying:
		return "finished_at IS NULL", "status"
	case q.status == contract.StatusRejected, q.status == contract.StatusDead:
		return "status IN ('rejected', 'dead')", "status"
	case q.owner != "":
		return "owner <> ''", "owner"
	default:
		return "", ""
	}
}

// below returns the id that those of the list are below.
func (q query) below() []byte {
	if q.before == uuid.Nil {
		return uuid.Max[:]
	}
	return q.before[:]
}
