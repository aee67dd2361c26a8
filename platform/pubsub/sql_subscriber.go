package pubsub

import (
	"context"
	"database/sql"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	librarysql "github.com/ThreeDotsLabs/watermill-sql/v3/pkg/sql"
	"github.com/ThreeDotsLabs/watermill/message"
)

// neverLate is the library's limit between the hand-out and the ack of a
// message, which we ack at once. It must have one.
const neverLate = 24 * time.Hour

// librarysTopic is a name that the library takes; ours may have any characters.
// The adapter knows the table.
const librarysTopic = "queue"

// undeleted is how many acked messages may wait to be deleted, if maxInFlight
// is not more, before no more are claimed. A crash repeats them.
const undeleted = 100

// sqlSource is one subscription: the messages that it has claimed, from then on
// until their rows are deleted or given back.
//
// Three goroutines work for it. The library's loop claims (sqlClaims). forward
// commits each claim and hands its messages to the Subscriber. keep extends the
// leases and writes what became of the messages (sql_keeper.go).
type sqlSource struct {
	broker *sqlBroker
	group  sqlGroup
	limit  int // messages that are claimed and not settled
	claims *sqlClaims
	out    chan *message.Message

	changed chan struct{} // holds an element when a claim may have become possible
	work    chan struct{} // holds an element when there is something to write

	mu      sync.Mutex
	stopped bool // takes no further messages
	closed  bool // the subscription is over
	gone    bool // nothing is written any more
	more    bool // there may be messages that are due
	beaten  time.Time
	held    map[*message.Message]*sqlHold // those whose lease is to be extended
	taken   int                           // of held, those that are claimed, and neither acked nor nacked
	pending []*sqlHold                    // of taken, those that nobody has received
	acked   []*sqlHold                    // of held, those that are to be deleted
	nacked  []*sqlHold                    // to be made due again
	unused  []*sqlHold                    // to be made due again as if they had not been claimed
}

// sqlHold is a row that is leased.
type sqlHold struct {
	id      int64
	attempt int
	msg     *message.Message // the Subscriber's
	state   sqlState
}

type sqlState int

const (
	statePending sqlState = iota // waits for the Subscriber
	stateOut                     // with the Subscriber
	stateSettled                 // acked, nacked or released
)

func newSQLSource(b *sqlBroker, group sqlGroup, limit int) *sqlSource {
	s := &sqlSource{
		broker:  b,
		group:   group,
		limit:   limit,
		out:     make(chan *message.Message),
		changed: make(chan struct{}, 1),
		work:    make(chan struct{}, 1),
		more:    true,
		beaten:  time.Now(),
		held:    make(map[*message.Message]*sqlHold),
	}
	s.claims = &sqlClaims{DB: b.db, source: s}
	return s
}

// forward hands claimed messages out until ctx ends.
func (s *sqlSource) forward(ctx context.Context, library *librarysql.Subscriber) {
	defer close(s.out)
	defer s.broker.outage.over(s)
	for ctx.Err() == nil {
		s.session(ctx, library)
	}
	s.stop()
}

// session is one subscription of the library. It ends with ctx, though not in
// the middle of a claim, whose messages nobody would have until their lease is
// over; and it ends when a claim takes too long: the library would wait for ever
// for a server that cannot be reached and does not say so.
func (s *sqlSource) session(ctx context.Context, library *librarysql.Subscriber) {
	session, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	watchdog := time.AfterFunc(time.Hour, cancel)
	defer watchdog.Stop()
	defer context.AfterFunc(ctx, func() { watchdog.Reset(lastClaimTimeout) })()
	s.claims.watchdog, s.claims.ended, s.claims.end = watchdog, ctx.Done(), cancel
	in, err := library.Subscribe(session, librarysTopic)
	if err != nil { // it refuses names of topics, but not this one
		s.broker.outage.begin(s, err)
		<-ctx.Done()
		return
	}
	var claim *sql.Tx
	for {
		next, offer, out := s.next()
		select {
		case msg, ok := <-in:
			if !ok {
				return
			}
			if tx, _ := librarysql.TxFromContext(msg.Context()); tx != claim {
				claim = tx
				s.commit(ctx, tx)
			}
			msg.Ack()
		case out <- offer:
			s.handedOut(next)
		}
	}
}

// commit ends the transaction of a claim. The library would end it when all of
// its messages are handed out and acked, and would hand them out whether or not
// they were claimed in the end. Now the lease protects them, and the library's
// own commit finds nothing to do.
func (s *sqlSource) commit(ctx context.Context, tx *sql.Tx) {
	claimed := s.claims.take()
	if err := tx.Commit(); err != nil {
		// They may be claimed or not. If they are, their lease runs out: to
		// give them back now might take them from somebody else.
		s.claims.failed(err)
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range claimed {
		h.msg.SetContext(ctx)
		s.held[h.msg] = h
	}
	s.taken += len(claimed)
	s.pending = append(s.pending, claimed...)
	if s.stopped {
		s.releasePending()
	}
}

// next is the message to offer, and where: nowhere, if there is none.
func (s *sqlSource) next() (*sqlHold, *message.Message, chan<- *message.Message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pending) == 0 {
		return nil, nil, nil
	}
	return s.pending[0], s.pending[0].msg, s.out
}

func (s *sqlSource) handedOut(h *sqlHold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.pending) > 0 && s.pending[0] == h { // a drain may have emptied it
		s.pending = s.pending[1:]
	}
}

func (s *sqlSource) receive(msg *message.Message) delivery {
	s.mu.Lock()
	defer s.mu.Unlock()
	h := s.held[msg]
	h.state = stateOut
	return delivery{msg: msg, number: h.attempt, lost: s.lost}
}

// lost reports whether the leases may have run out.
func (s *sqlSource) lost() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return time.Since(s.beaten) > lease
}

// ack does not wait for the database: the row is deleted soon. Should we crash
// before, the message comes again.
func (s *sqlSource) ack(d delivery) { s.settle(d, &s.acked) }

func (s *sqlSource) nack(d delivery) { s.settle(d, &s.nacked) }

func (s *sqlSource) release(d delivery) { s.settle(d, &s.unused) }

func (s *sqlSource) settle(d delivery, to *[]*sqlHold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if h := s.held[d.msg]; h != nil && h.state != stateSettled {
		s.move(h, to)
	}
}

// move puts a message where its row is written from. mu is held.
func (s *sqlSource) move(h *sqlHold, to *[]*sqlHold) {
	if s.gone {
		return
	}
	h.state = stateSettled
	s.taken--
	*to = append(*to, h)
	if to != &s.acked { // an acked one stays leased until it is deleted
		delete(s.held, h.msg)
	}
	poke(s.work)
	poke(s.changed)
}

// drain gives back what nobody has received. A claim that is under way is given
// back when it is committed.
func (s *sqlSource) drain() { s.stop() }

func (s *sqlSource) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = true
	s.releasePending()
}

// releasePending needs mu.
func (s *sqlSource) releasePending() {
	for _, h := range s.pending {
		if h.state == statePending {
			s.move(h, &s.unused)
		}
	}
	s.pending = nil
}

// close says that the subscription is over. keep goes on for as long as there
// are messages with the consumer.
func (s *sqlSource) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	poke(s.work)
}

// wake says that messages may have come.
func (s *sqlSource) wake() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.more = true
	poke(s.changed)
}

// room is how many messages may be claimed now. mu is held.
func (s *sqlSource) room() int {
	switch {
	case s.stopped:
		return 0
	case len(s.acked) > max(s.limit, undeleted):
		return 0
	case len(s.held) > 0 && time.Since(s.beaten) > lease/2:
		// After an outage: first our own leases, or we would claim the
		// messages that are with our own consumer, or that it has acked.
		return 0
	default:
		return s.limit - s.taken
	}
}

func poke(c chan<- struct{}) {
	select {
	case c <- struct{}{}:
	default: // who is to come has been told already
	}
}

// sqlClaims drives the library's loop: it is the database that the loop begins
// its transactions on, which is where it waits, and the adapter that says how
// to claim. Only that loop and its forwarder use it.
type sqlClaims struct {
	*sql.DB
	source   *sqlSource
	watchdog *time.Timer     // ends the session when a claim takes too long
	ended    <-chan struct{} // closed when no more is to be claimed
	end      func()          // ends the session
	table    sqlQueue

	cursor sqlCursor // the source's mu guards it
	asked  int       // how many messages the claim is for

	mu      sync.Mutex
	claimed []*sqlHold // by the claim that is not committed
	got     int        // how many these were
	last    int64      // the last one's id
	err     error      // of the commit
}

// BeginTx waits until there may be messages and there is room for them.
func (c *sqlClaims) BeginTx(ctx context.Context, opts *sql.TxOptions) (*sql.Tx, error) {
	c.watchdog.Stop()
	c.reset()
	if err := c.await(ctx); err != nil {
		c.end()
		return nil, err
	}
	c.watchdog.Reset(claimTimeout)
	queue, err := c.source.broker.queue(ctx, c.source.group)
	if err != nil {
		return nil, err
	}
	c.table = queue
	return c.DB.BeginTx(ctx, opts)
}

// await blocks until a claim makes sense. Its error is that none ever will.
func (c *sqlClaims) await(ctx context.Context) error {
	for {
		if isClosed(c.ended) || ctx.Err() != nil {
			return context.Canceled
		}
		wait := c.wait()
		if wait <= 0 {
			return nil
		}
		timer := time.NewTimer(wait)
		select {
		case <-c.source.changed:
		case <-timer.C:
		case <-c.ended:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// wait is how long there is nothing to do, if nothing changes.
func (c *sqlClaims) wait() time.Duration {
	s := c.source
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.room() < 1 {
		return time.Hour
	}
	if s.more {
		return 0
	}
	return time.Until(c.cursor.sweepAt)
}

// SelectQuery claims as many messages as there is room for, oldest first. The
// ids are found by a query of their own: as a join, they could be looked up
// more than once, and more rows claimed than asked for.
func (c *sqlClaims) SelectQuery(string, string, librarysql.OffsetsAdapter) librarysql.Query {
	s := c.source
	s.mu.Lock()
	defer s.mu.Unlock()
	s.more = false // before the claim: what comes during it counts
	c.asked = max(1, s.room())
	from := c.cursor.start(time.Now())
	table := s.broker.names.queue(c.table)
	return librarysql.Query{Query: `WITH claimed AS (
		UPDATE ` + table + ` SET attempt = attempt + 1, lease_until = ` + leaseEnd + `
		WHERE id = ANY (ARRAY(
			SELECT id FROM ` + table + ` WHERE id > $1 AND lease_until <= clock_timestamp()
			ORDER BY id LIMIT $2 FOR UPDATE SKIP LOCKED))
		RETURNING id, attempt, uuid, metadata, payload)
		SELECT id, attempt, uuid, metadata, payload FROM claimed ORDER BY id`, Args: []any{from, c.asked}}
}

// UnmarshalMessage is called with each row of the claim, before the first one is
// handed on. Its row has no offset, so that the library has nothing to ack.
func (c *sqlClaims) UnmarshalMessage(row librarysql.Scanner) (librarysql.Row, error) {
	var id int64
	var attempt int
	var name, metadata, payload []byte
	if err := row.Scan(&id, &attempt, &name, &metadata, &payload); err != nil {
		return librarysql.Row{}, err
	}
	msg := message.NewMessage(string(name), payload)
	msg.Metadata = decodeMetadata(metadata)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.claimed = append(c.claimed, &sqlHold{id: id, attempt: attempt, msg: msg})
	c.got, c.last = c.got+1, id
	// The library gets one of its own: it changes the context.
	return librarysql.Row{Msg: message.NewMessage(msg.UUID, nil)}, nil
}

// take returns what the last claim gave, and forgets it.
func (c *sqlClaims) take() []*sqlHold {
	c.mu.Lock()
	defer c.mu.Unlock()
	claimed := c.claimed
	c.claimed = nil
	return claimed
}

// reset forgets the last claim, and what it gave if that came to nothing.
func (c *sqlClaims) reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.claimed, c.got, c.last, c.err = nil, 0, 0, nil
}

// failed notes that a claim was not committed, which the library ignores.
func (c *sqlClaims) failed(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
}

func (c *sqlClaims) outcome() (got int, last int64, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.got, c.last, c.err
}

// HandleError is called after each claim. It is the library's BackoffManager,
// and says how long to pause; BeginTx does the waiting for messages.
func (c *sqlClaims) HandleError(_ watermill.LoggerAdapter, _ bool, err error) time.Duration {
	c.watchdog.Stop()
	got, last, commitErr := c.outcome()
	if err = errors.Join(err, commitErr); err != nil {
		c.recover(err)
		return retryEvery
	}
	s := c.source
	s.broker.outage.over(s)
	s.mu.Lock()
	defer s.mu.Unlock()
	full := got > 0 && got == c.asked
	c.cursor.claimed(time.Now(), last, full)
	s.more = s.more || full
	return 0
}

// recover does what can be done about a claim that failed.
func (c *sqlClaims) recover(err error) {
	s := c.source
	s.mu.Lock()
	c.cursor.failed(time.Now())
	s.mu.Unlock()
	s.broker.outage.begin(s, fmt.Errorf("claim messages: %w", err))
	if isUndefinedTable(err) {
		err = s.broker.repair(s.broker.life)
		if err != nil {
			s.broker.outage.begin(s, err)
		}
	}
	s.wake()
}

// The rest of what the library asks for is not needed: tables are made before,
// and messages are acked by their own statements.
func (*sqlClaims) InsertQuery(string, message.Messages) (librarysql.Query, error) {
	return librarysql.Query{}, nil
}
func (*sqlClaims) SchemaInitializingQueries(string) []librarysql.Query { return nil }
func (*sqlClaims) SubscribeIsolationLevel() sql.IsolationLevel         { return sql.LevelReadCommitted }
func (*sqlClaims) AckMessageQuery(string, librarysql.Row, string) librarysql.Query {
	return librarysql.Query{}
}
func (*sqlClaims) ConsumedMessageQuery(string, librarysql.Row, string, []byte) librarysql.Query {
	return librarysql.Query{}
}
func (*sqlClaims) NextOffsetQuery(string, string) librarysql.Query            { return librarysql.Query{} }
func (*sqlClaims) BeforeSubscribingQueries(string, string) []librarysql.Query { return nil }
