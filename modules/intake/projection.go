package intake

import (
	"context"
	"errors"
	"log/slog"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"

	"sluice/modules/contract"
	"sluice/platform/telemetry"
)

const (
	projectPauseMin = 50 * time.Millisecond
	projectPauseMax = 2 * time.Second
	// projectPatience is how long an outcome is held that cannot be stored.
	// Then it goes back to the broker: another process may be able to.
	projectPatience = 15 * time.Second
)

// project takes an outcome over into its order. It returns when that is
// durable, so an acknowledged outcome is a stored one. While the store cannot
// be written it holds the message and tries again: to nack at once would only
// bring the message back at once.
func (m *Module) project(msg *message.Message) error {
	if contract.IsMarker(msg) {
		return m.passed(msg)
	}
	out, err := contract.DecodeOutcome(msg)
	if err != nil {
		return err
	}
	if out.Type == contract.TypeDead {
		return nil // our own news, published for others
	}
	id, err := uuid.Parse(out.OrderID)
	if err != nil {
		return errors.Join(contract.ErrUndecodable, err)
	}
	return insist(msg.Context(), func(ctx context.Context) error { return m.finish(ctx, id, out) }, func(err error) {
		m.logger.Error("cannot store an outcome; it is held and tried again", "order_id", id, "trace_id", telemetry.TraceID(msg.Context()), "error", err)
	})
}

// passed takes a marker over that has come back.
func (m *Module) passed(msg *message.Message) error {
	marker, err := contract.DecodeMarker(msg)
	if err != nil {
		return err
	}
	return insist(msg.Context(), func(ctx context.Context) error { return m.sweeper.passed(ctx, marker) }, func(err error) {
		m.logger.Error("cannot look for lost orders; tried again", "error", err)
	})
}

// insist calls do until it succeeds, for as long as an outcome is held, or until
// ctx ends.
func insist(ctx context.Context, do func(context.Context) error, complain func(error)) error {
	began := time.Now()
	for pause := projectPauseMin; ; pause = min(2*pause, projectPauseMax) {
		err := do(ctx)
		if err == nil || ctx.Err() != nil || time.Since(began) > projectPatience {
			return err
		}
		complain(err)
		wait(ctx, pause, nil)
		if ctx.Err() != nil {
			return err
		}
	}
}

// finish applies the outcome and tells of the end of an order.
func (m *Module) finish(ctx context.Context, id uuid.UUID, out contract.Outcome) error {
	c := outcomeOf(id, out, m.retry)
	if err := m.writer.do(ctx, c); err != nil {
		return err
	}
	m.relay.finished(id, out.Attempt)
	if out.Type != contract.TypeAttemptFailed {
		m.outlook.attempted(out.Duration)
	}
	if c.found == nil {
		m.logger.Warn("an outcome arrived for an order that does not exist; the database may be older than the broker's messages",
			"order_id", id, "trace_id", telemetry.TraceID(ctx), "outcome", out.Type)
		return nil
	}
	if c.changed {
		m.tell(ctx, c.found, out, telemetry.TraceID(ctx))
	}
	return nil
}

// outcomeOf returns the change that takes an outcome over into its order. If it
// is that of the first attempt, the change may find no more of the order than
// its id and what the outcome made of it.
func outcomeOf(id uuid.UUID, out contract.Outcome, retry RetryConfig) *change {
	return &change{id: id, first: out.Attempt == 1, update: func(o *order) verdict { return o.apply(out, now(), retry) }}
}

// tell logs what an outcome made of its order.
func (m *Module) tell(ctx context.Context, o *order, out contract.Outcome, traceID string) {
	switch {
	case o.Status == contract.StatusDead:
		m.logger.WarnContext(ctx, "order is dead: its last attempt failed; replay it with POST /admin/orders/{id}/replay",
			"order_id", o.ID, "trace_id", traceID, "attempts", o.Attempts, "error", out.Error)
	case m.logger.Enabled(ctx, slog.LevelDebug): // asked first, since there is one for each order
		m.logger.DebugContext(ctx, "outcome stored", "status", o.Status, "order_id", o.ID, "trace_id", traceID, "attempts", o.Attempts)
	}
}

// now is the time as orders keep it.
func now() time.Time { return time.Now().UTC().Truncate(time.Microsecond) }
