package backend

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/dunglas/httpsfv"
	"github.com/google/uuid"
)

const (
	recentOrders = 1000
	recentBytes  = 4 << 20
)

// order is what one POST says about its order.
type order struct {
	key     key
	id      string
	number  string // "" if it has none
	attempt uint32 // 0 if the caller does not count
	header  http.Header
	body    []byte
}

// readOrder finds out which order is meant: the one of the Idempotency-Key, or of its number if there is no key.
// It keeps header and body.
func readOrder(header http.Header, body []byte) (order, error) {
	o := order{number: header.Get("X-Order-Number"), header: header, body: body}
	if o.number == "" {
		o.number = numberIn(body)
	}
	if attempt, err := strconv.ParseUint(header.Get("X-Attempt"), 10, 32); err == nil {
		o.attempt = uint32(attempt)
	}
	id, err := unquoteKey(header.Get("Idempotency-Key"))
	if err != nil {
		return order{}, err
	}
	o.id = id
	if o.id == "" {
		o.id = o.number
	}
	if o.id == "" {
		return order{}, errors.New("neither an Idempotency-Key nor an order number says which order this is")
	}
	o.key = keyOf(o.id)
	return o, nil
}

func numberIn(body []byte) string {
	var document struct {
		OrderNumber string `json:"orderNumber"`
	}
	// A body that is no JSON, or has no number, is an order without a number: judging orders is not the work of a stand-in.
	if err := json.Unmarshal(body, &document); err != nil {
		return ""
	}
	return document.OrderNumber
}

// unquoteKey accepts the structured-field string that the standard draft asks for, and the bare token that many send.
func unquoteKey(field string) (string, error) {
	if !strings.HasPrefix(field, `"`) {
		return field, nil
	}
	if inner := strings.TrimSuffix(field[1:], `"`); len(inner) == len(field)-2 && !strings.ContainsAny(inner, `"\`) {
		return inner, nil // every key that Sluice sends, without the cost of a parser
	}
	item, err := httpsfv.UnmarshalItem([]string{field})
	id, ok := item.Value.(string)
	if err != nil || !ok {
		return "", errors.New("the Idempotency-Key starts with a quote and is no structured-field string")
	}
	return id, nil
}

// key names an order in 16 bytes: a UUID is its own key, anything else is hashed.
type key [16]byte

func keyOf(id string) key {
	if parsed, ok := canonicalUUID(id); ok {
		return key(parsed)
	}
	sum := sha256.Sum256([]byte(id))
	return key(sum[:16])
}

// canonicalUUID accepts only the way of writing from which the id can be restored to the letter.
func canonicalUUID(id string) (uuid.UUID, bool) {
	if len(id) != 36 || strings.ToLower(id) != id {
		return uuid.UUID{}, false
	}
	parsed, err := uuid.Parse(id)
	return parsed, err == nil
}

// backendID is the stand-in's own name for an order: the same at each call, and nothing to remember.
func (k key) backendID() string {
	return "BE-" + hex.EncodeToString(k[:])
}

// record is what is kept of every order for good. Neither it nor its key holds a pointer, so that a million of them
// cost the garbage collector nothing.
type record struct {
	savedAt int64 // Unix milliseconds, 0 = not saved
	calls   uint32
	attempt uint32
	active  uint32 // calls being served
}

// ledger knows all orders, and the recent ones in full. It is not safe for concurrent use.
type ledger struct {
	records map[key]record
	numbers map[key]key    // order number (as key) to the order that was saved last under it
	oddIDs  map[key]string // ids that are no UUIDs
	recent  map[key]order
	queue   []key // keys of recent, the one to be forgotten next first
	bytes   int   // bodies in recent
}

func newLedger() ledger {
	return ledger{
		records: make(map[key]record),
		numbers: make(map[key]key),
		oddIDs:  make(map[key]string),
		recent:  make(map[key]order, recentOrders),
	}
}

// enter notes the start of a call and tells whether it is a repeat.
func (l *ledger) enter(o order) (repeat bool) {
	r := l.records[o.key]
	repeat = r.savedAt != 0 || r.active > 0
	r.calls++
	r.active++
	r.attempt = o.attempt
	l.records[o.key] = r
	return repeat
}

// leave notes the end of a call and tells whether the order was saved for the first time.
func (l *ledger) leave(o order, saved bool, now time.Time) (first bool) {
	r := l.records[o.key]
	r.active--
	if saved && r.savedAt == 0 {
		first = true
		r.savedAt = now.UnixMilli()
		l.nameOrder(o)
	}
	l.records[o.key] = r
	if r.savedAt != 0 {
		l.remember(o)
	}
	return first
}

func (l *ledger) nameOrder(o order) {
	if o.number != "" {
		l.numbers[keyOf(o.number)] = o.key
	}
	if _, ok := canonicalUUID(o.id); !ok {
		l.oddIDs[o.key] = o.id
	}
}

// remember keeps the latest call of an order in full, and forgets the oldest orders beyond the two limits.
func (l *ledger) remember(o order) {
	old, known := l.recent[o.key]
	if !known {
		l.queue = append(l.queue, o.key)
	}
	l.recent[o.key] = o
	l.bytes += len(o.body) - len(old.body)
	for len(l.queue) > recentOrders || l.bytes > recentBytes {
		oldest := l.queue[0]
		l.queue = l.queue[1:]
		l.bytes -= len(l.recent[oldest].body)
		delete(l.recent, oldest)
	}
}

// find returns what is known of the order that was saved last under a number. Header and body of last are nil if the
// order is not among the recent ones.
func (l *ledger) find(number string) (r record, last order, ok bool) {
	k, ok := l.numbers[keyOf(number)]
	if !ok {
		return record{}, order{}, false
	}
	last, known := l.recent[k]
	if !known {
		last = order{key: k, id: l.oddIDs[k], number: number}
	}
	if last.id == "" {
		last.id = uuid.UUID(k).String()
	}
	return l.records[k], last, true
}
