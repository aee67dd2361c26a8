package database

import (
	"context"
	"fmt"
	"time"

	"github.com/jackc/pgx/v5"
)

// Listener is told what arrives on a channel of the server (LISTEN, NOTIFY).
type Listener struct {
	// Channel is its name.
	Channel string
	// Listening is called with the connection when that has begun to listen,
	// and then again and again, Every so often. An error ends the connection.
	Listening func(ctx context.Context, conn *pgx.Conn) error
	Every     time.Duration
	// Heard is called with each payload, the process's own included.
	Heard func(payload string)
}

// Listen listens on a connection of its own, beside those of Read and Write,
// until the connection fails, or ctx ends. It always returns an error. What is
// sent to the channel while nobody listens is lost.
func (db *Postgres) Listen(ctx context.Context, l Listener) error {
	conn, err := pgx.ConnectConfig(ctx, db.listen.Copy())
	if err != nil {
		return fmt.Errorf("connect: %w", oneLine(err))
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), postgresConnectTimeout)
		defer cancel()
		_ = conn.Close(ctx) // it only listened
	}()
	if _, err := conn.Exec(ctx, `LISTEN `+pgx.Identifier{l.Channel}.Sanitize()); err != nil {
		return fmt.Errorf("listen to %s: %w", l.Channel, err)
	}
	for {
		if err := l.check(ctx, conn); err != nil {
			return fmt.Errorf("listen to %s: %w", l.Channel, err)
		}
		if err := l.hear(ctx, conn); err != nil {
			return fmt.Errorf("listen to %s: %w", l.Channel, err)
		}
	}
}

func (l Listener) check(ctx context.Context, conn *pgx.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, postgresReadTimeout)
	defer cancel()
	return l.Listening(ctx, conn)
}

// hear takes what arrives until the next check.
func (l Listener) hear(ctx context.Context, conn *pgx.Conn) error {
	turn, cancel := context.WithTimeout(ctx, l.Every)
	defer cancel()
	for {
		n, err := conn.WaitForNotification(turn)
		switch {
		case err == nil:
			l.Heard(n.Payload)
		case turn.Err() != nil && ctx.Err() == nil:
			return nil
		default:
			return err
		}
	}
}
