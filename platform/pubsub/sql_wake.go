package pubsub

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/jackc/pgx/v5"
)

const (
	// pollEvery is how soon messages are found that no notification told of.
	pollEvery = time.Second
	// notifyEvery is the least time between two notifications of a process. The
	// server hands out one at a time, each to every listener.
	notifyEvery = 5 * time.Millisecond
	// listenCheck is how long the listening connection may be silent before it
	// is asked whether it is still there.
	listenCheck = 15 * time.Second
)

// published wakes the consumers of these queues: those of this process at once,
// and those of others soon. Nobody waits for the latter: with the INSERT, the
// notification would take a lock of the whole server for as long as the disk
// takes to commit.
func (b *sqlBroker) published(route sqlRoute) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for s := range b.sources {
		if slices.Contains(route, b.groups[s.group]) {
			s.wake()
		}
	}
	for _, queue := range route {
		b.notify[queue] = struct{}{}
	}
	select {
	case b.dirty <- struct{}{}:
	default:
	}
}

// tell notifies other processes until ctx ends. A notification that is lost is
// made up for by their poll.
func (b *sqlBroker) tell(ctx context.Context) {
	for {
		select {
		case <-b.dirty:
		case <-ctx.Done():
			return
		}
		b.mu.Lock()
		queues := slices.Collect(maps.Keys(b.notify))
		clear(b.notify)
		b.mu.Unlock()

		statement, cancel := context.WithTimeout(ctx, settleTimeout)
		_, _ = b.db.ExecContext(statement, `SELECT pg_notify($1, $2)`, b.names.channel(), b.instance+" "+sqlRoute(queues).String())
		cancel()

		pause := time.NewTimer(notifyEvery)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			return
		}
	}
}

// listen wakes sources when another process has published, until ctx ends.
func (b *sqlBroker) listen(ctx context.Context) {
	who := new(int) // any pointer of its own
	for ctx.Err() == nil {
		err := b.listenOnce(ctx, func() { b.outage.over(who) })
		if ctx.Err() != nil {
			return
		}
		b.outage.begin(who, fmt.Errorf("listen for messages: %w", err))
		timer := time.NewTimer(retryEvery)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
		}
	}
}

// listenOnce listens until the connection fails. It calls listening when it
// has begun to.
func (b *sqlBroker) listenOnce(ctx context.Context, listening func()) error {
	conn, err := pgx.ConnectConfig(ctx, b.connect.Copy())
	if err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), healthTimeout)
		defer cancel()
		_ = conn.Close(ctx) // it only listened
	}()
	if _, err := conn.Exec(ctx, `LISTEN `+b.names.channel()); err != nil {
		return err
	}
	listening()
	b.wakeAll() // for what came before
	for {
		if err := b.hear(ctx, conn); err != nil {
			return err
		}
	}
}

// hear waits for a notification, and makes sure of the connection when none
// comes for long.
func (b *sqlBroker) hear(ctx context.Context, conn *pgx.Conn) error {
	wait, cancel := context.WithTimeout(ctx, listenCheck)
	defer cancel()
	notification, err := conn.WaitForNotification(wait)
	switch {
	case err == nil:
		b.heard(notification.Payload)
		return nil
	case wait.Err() == nil || ctx.Err() != nil:
		return err
	}
	check, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	return conn.Ping(check)
}

func (b *sqlBroker) heard(payload string) {
	instance, text, _ := strings.Cut(payload, " ")
	if instance == b.instance {
		return // published has woken them
	}
	route, err := parseRoute(text)
	if err != nil {
		return // of a later version, or an operator's
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	for s := range b.sources {
		if slices.Contains(route, b.groups[s.group]) {
			s.wake()
		}
	}
}

func (b *sqlBroker) wakeAll() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for s := range b.sources {
		s.wake()
	}
}
