package pubsub

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// leaseEnd is when a lease that begins or is extended now will end. Only the
// database's clock counts: those of two processes may differ by more than a
// lease.
var leaseEnd = fmt.Sprintf("clock_timestamp() + interval '%d milliseconds'", lease.Milliseconds())

// What is written about rows that we hold. Each statement names the attempt: a
// row whose lease ran out, and which somebody else has claimed, is left alone.
func (s *sqlSource) extendStatement(table string) string {
	return `UPDATE ` + table + ` SET lease_until = ` + leaseEnd + ` WHERE id = ANY ($1) AND attempt = $2`
}

func (s *sqlSource) deleteStatement(table string) string {
	return `DELETE FROM ` + table + ` WHERE id = ANY ($1) AND attempt = $2`
}

func (s *sqlSource) nackStatement(table string) string {
	return `UPDATE ` + table + ` SET lease_until = '-infinity' WHERE id = ANY ($1) AND attempt = $2`
}

// releaseStatement makes it as if the message had not been claimed.
func (s *sqlSource) releaseStatement(table string) string {
	return `UPDATE ` + table + ` SET lease_until = '-infinity', attempt = attempt - 1 WHERE id = ANY ($1) AND attempt = $2`
}

// keep extends leases and writes what became of messages, until the
// subscription is over and its last message settled, or ctx ends.
func (s *sqlSource) keep(ctx context.Context) {
	defer s.broker.remove(s)
	defer s.broker.outage.over(s.work)
	heartbeat := time.NewTicker(heartbeatEvery)
	defer heartbeat.Stop()
	// What is begun when the broker closes is brought to its end, if that does
	// not take too long.
	writing, cancel := context.WithCancel(context.WithoutCancel(ctx))
	defer cancel()
	defer context.AfterFunc(ctx, func() { time.AfterFunc(flushTimeout, cancel) })()
	tidy := time.NewTicker(tidyEvery)
	defer tidy.Stop()
	var again <-chan time.Time // after a failure
	for {
		var err error
		select {
		case <-heartbeat.C:
			err = s.extend(writing)
		case <-tidy.C:
			if s.busy() { // soon it may not be for a moment
				tidy.Reset(tidyAgain)
				continue
			}
			tidy.Reset(tidyEvery)
			s.tidy(writing)
		case <-again:
			err = s.extend(writing) // no claim is made before
		case <-s.work:
		case <-ctx.Done():
			s.finish(writing)
			return
		}
		again = nil
		if err = errors.Join(err, s.write(writing)); err != nil {
			s.broker.outage.begin(s.work, err)
			again = time.After(retryEvery)
			continue
		}
		s.broker.outage.over(s.work)
		if s.over() {
			return
		}
	}
}

// over reports whether nothing will have to be written any more.
func (s *sqlSource) over() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed && s.taken == 0 && len(s.acked)+len(s.nacked)+len(s.unused) == 0
}

// finish is the end with messages still out, when the broker closes. They are
// due again at once, for the next process, and marked as redelivered. It gives
// up when ctx ends.
func (s *sqlSource) finish(ctx context.Context) {
	s.mu.Lock()
	for _, h := range s.held {
		if h.state != stateSettled {
			s.move(h, &s.nacked)
		}
	}
	s.closed, s.gone = true, true
	s.mu.Unlock()

	for {
		err := s.write(ctx)
		if err == nil {
			return
		}
		pause := time.NewTimer(retryEvery)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			s.broker.logger.Error("acked messages could not be deleted and will come again", "error", oneLine(err))
			return
		}
	}
}

// extend extends the lease of everything that is held, whether it waits for the
// consumer, is with it, or waits to be deleted.
func (s *sqlSource) extend(ctx context.Context) error {
	s.mu.Lock()
	holds := make([]*sqlHold, 0, len(s.held))
	for _, h := range s.held {
		holds = append(holds, h)
	}
	s.mu.Unlock()
	begun := time.Now()
	if err := s.exec(ctx, s.extendStatement, holds); err != nil {
		return fmt.Errorf("extend leases: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.beaten = begun
	poke(s.changed)
	return nil
}

// write deletes what was acked and makes due what was given back. What could
// not be written is tried again with the next write.
func (s *sqlSource) write(ctx context.Context) error {
	s.mu.Lock()
	acked, nacked, unused := s.acked, s.nacked, s.unused
	s.acked, s.nacked, s.unused = nil, nil, nil
	s.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, settleTimeout) // for all together: heartbeats must go on
	defer cancel()

	var errs []error
	if err := s.exec(ctx, s.deleteStatement, acked); err != nil {
		errs = append(errs, fmt.Errorf("delete acked messages: %w", err))
		s.putBack(acked, &s.acked)
	} else {
		s.deleted(acked)
	}
	if err := s.exec(ctx, s.nackStatement, nacked); err != nil {
		errs = append(errs, fmt.Errorf("give back nacked messages: %w", err))
		s.putBack(nacked, &s.nacked)
	} else {
		s.due(nacked)
	}
	// Not tried again: the error may hide a success, and the attempt number
	// may be another holder's by now. The lease runs out.
	if err := s.exec(ctx, s.releaseStatement, unused); err != nil {
		errs = append(errs, fmt.Errorf("give back messages: %w", err))
	} else {
		s.due(unused)
	}
	return errors.Join(errs...)
}

func (s *sqlSource) putBack(holds []*sqlHold, to *[]*sqlHold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	*to = append(holds, *to...)
}

func (s *sqlSource) deleted(holds []*sqlHold) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range holds {
		delete(s.held, h.msg)
	}
	poke(s.changed)
}

// due makes the next claim find these rows, which lie behind the cursor.
func (s *sqlSource) due(holds []*sqlHold) {
	if len(holds) == 0 {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, h := range holds {
		s.claims.cursor.rewind(h.id)
	}
	s.more = true
	poke(s.changed)
}

// exec runs a statement for rows: once, unless their attempts differ.
func (s *sqlSource) exec(ctx context.Context, statement func(table string) string, holds []*sqlHold) error {
	if len(holds) == 0 {
		return nil
	}
	ids := make(map[int][]int64) // by attempt
	for _, h := range holds {
		ids[h.attempt] = append(ids[h.attempt], h.id)
	}
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	queue, err := s.broker.queue(ctx, s.group)
	if err != nil {
		return err
	}
	text := statement(s.broker.names.queue(queue))
	for attempt, ids := range ids {
		if _, err := s.broker.db.ExecContext(ctx, text, ids, attempt); err != nil && !isUndefinedTable(err) {
			return err // where there is no table, there are no rows to write
		}
	}
	return nil
}

const (
	// tidyEvery is how often a queue is looked at that may be larger than what
	// is in it.
	tidyEvery = 5 * time.Second
	// tidyAgain is when one is looked at again whose messages were being handled
	// just then.
	tidyAgain = 50 * time.Millisecond
	// tidyFrom is the size in bytes that a queue may keep for its next messages.
	tidyFrom = 4 << 20
	// tidyTimeout bounds how long others wait for a queue that is being tidied.
	tidyTimeout = 200 * time.Millisecond
)

// busy reports whether there are messages that are claimed.
func (s *sqlSource) busy() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.held) > 0
}

// tidy gives the disk back that an empty queue takes up. Vacuum makes deleted
// rows free for new ones, but an index whose entries only ever grow keeps its
// size. It does nothing while anything is in the table or on its way into it,
// and gives up when that does not show at once; the next time will do.
func (s *sqlSource) tidy(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	if err := s.truncateIfEmpty(ctx); err != nil {
		s.broker.logger.Debug("a queue was not tidied", "group", s.group.name, "topic", s.group.topic, "error", oneLine(err))
	}
}

func (s *sqlSource) truncateIfEmpty(ctx context.Context) error {
	queue, err := s.broker.queue(ctx, s.group)
	if err != nil {
		return err
	}
	table := s.broker.names.queue(queue)
	var large bool
	if err := s.broker.db.QueryRowContext(ctx, `SELECT pg_total_relation_size($1::regclass) > $2`, table, tidyFrom).Scan(&large); err != nil || !large {
		return err
	}
	tx, err := s.broker.db.BeginTx(ctx, nil)
	if err != nil {
		return err
	}
	defer func() { _ = tx.Rollback() }() // does nothing after the commit
	// Who publishes has a lock until the commit, so nothing is on its way when
	// we have ours. To see that there is no row can mean to step over all that
	// are dead, and nobody shall wait for that.
	limit := fmt.Sprintf("'%dms'", tidyTimeout.Milliseconds())
	if _, err := tx.ExecContext(ctx, `SET LOCAL lock_timeout = `+limit+`; SET LOCAL statement_timeout = `+limit+`; LOCK TABLE `+table+` IN ACCESS EXCLUSIVE MODE`); err != nil {
		return err
	}
	var empty bool
	if err := tx.QueryRowContext(ctx, `SELECT NOT EXISTS (SELECT FROM `+table+`)`).Scan(&empty); err != nil || !empty {
		return err
	}
	if _, err := tx.ExecContext(ctx, `TRUNCATE `+table); err != nil {
		return err
	}
	return tx.Commit()
}
