package intake

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"

	"sluice/modules/contract"
)

const (
	// markerAfter is how long an order may be silent before markers are sent.
	markerAfter = 10 * time.Second
	// While none comes back, because the queue is long, is gone, or nobody
	// reads it, the time between two markers doubles up to markerPauseMax.
	markerPauseMin = 10 * time.Second
	markerPauseMax = 160 * time.Second
	// markerSlow is how long a publish takes at a broker that is well.
	markerSlow = time.Second
	// forgetfulSweep is how often orders are looked for that another broker was
	// carrying.
	forgetfulSweep = time.Minute
	// lastPatience is how long a stop waits for the last outcomes.
	lastPatience = 2 * time.Second
	// clockSkew is how far the clocks of processes that share a store may be
	// apart without an order being taken for lost that is not.
	clockSkew = 2 * time.Second
)

// sweeper makes orders due again whose messages the broker has lost: a queue
// was purged or deleted, a limit of deliveries was reached, a disk was restored.
//
// Queues are read in order, more or less, so it sends a marker behind the
// orders. When that is back, the orders published before it have been handed
// out. It gives them patience to end their attempt, and sends another marker,
// which comes back behind their outcomes: who is silent then was lost. Whatever
// the length of the queue, nothing that honestly waits in it is published again.
type sweeper struct {
	store     store
	relay     *relay
	publisher message.Publisher
	logger    *slog.Logger
	stats     *stats
	patience  time.Duration // between the return of a marker and the sending of the next
	forgetful bool          // the broker keeps nothing, and the relay knows what it has

	mu       sync.Mutex
	returned time.Time // when the marker came back that sentAt is of
	sentAt   time.Time
	pause    time.Duration // before the next marker
	last     string        // names the last marker of this process
	lastBack chan struct{} // closed when that is back
}

func newSweeper(s store, r *relay, st *stats, deps Deps) *sweeper {
	return &sweeper{
		store: s, relay: r, publisher: deps.Bus.Publisher, logger: deps.Logger, stats: st,
		patience:  deps.Silence,
		forgetful: deps.Bus.Window > 0,
		pause:     markerPauseMin,
		last:      uuid.NewString(),
		lastBack:  make(chan struct{}),
	}
}

// run sends markers until ctx ends. With a broker that keeps nothing there is no
// need: what is marked as published is another one's, and nobody's concern there
// any more.
func (s *sweeper) run(ctx context.Context) {
	for s.forgetful && ctx.Err() == nil {
		wait(ctx, forgetfulSweep, nil)
		n, err := republish(ctx, s.store, now())
		switch {
		case ctx.Err() != nil:
		case err != nil:
			s.logger.Warn("cannot look for orders that another broker was carrying; tried again later", "error", err)
		case n > 0:
			s.logger.Info("orders that another broker was carrying are handed to this one", "orders", n)
			s.relay.nudge()
		}
	}
	for ctx.Err() == nil {
		wait(ctx, s.between(), nil)
		if ctx.Err() != nil {
			return
		}
		if err := s.send(ctx); err != nil && ctx.Err() == nil {
			s.logger.Warn("cannot look for lost orders; tried again later", "error", err)
		}
	}
}

// between returns the time until the next marker, and doubles the one after.
func (s *sweeper) between() time.Duration {
	s.mu.Lock()
	defer s.mu.Unlock()
	pause := s.pause
	s.pause = min(2*s.pause, markerPauseMax)
	return pause
}

// send publishes a marker, if there are silent orders.
func (s *sweeper) send(ctx context.Context) error {
	oldest, err := s.store.oldestPublished(ctx)
	if err != nil {
		return err
	}
	marker := contract.Marker{SentAt: now()}
	if oldest.IsZero() || marker.SentAt.Sub(oldest) < markerAfter {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.pause = markerPauseMin
		return nil
	}
	s.mu.Lock()
	if !s.returned.IsZero() && marker.SentAt.Sub(s.returned) >= s.patience {
		marker.LostBefore = s.sentAt.Add(-clockSkew)
	}
	s.mu.Unlock()
	msg, err := marker.Message()
	if err != nil {
		return err
	}
	msg.SetContext(ctx)
	err = s.publisher.Publish(contract.TopicSubmitted, msg)
	if err != nil || time.Since(marker.SentAt) > markerSlow {
		// Where markers cannot be published, outcomes cannot either: they may
		// be held back, and markers overtake them.
		s.mu.Lock()
		defer s.mu.Unlock()
		if !s.returned.IsZero() {
			s.returned = now()
		}
	}
	return err
}

// passed takes over a marker that has come back, sent by this process or by
// another one.
func (s *sweeper) passed(ctx context.Context, m contract.Marker) error {
	if m.Last != "" {
		s.mu.Lock()
		defer s.mu.Unlock()
		if m.Last == s.last {
			close(s.lastBack)
			s.last = uuid.NewString() // it may be delivered again
		}
		return nil
	}
	if !m.LostBefore.IsZero() {
		n, err := republish(ctx, s.store, m.LostBefore)
		if err != nil {
			return err
		}
		if n > 0 {
			s.stats.lost(n)
			s.logger.Warn("orders were lost on their way through the broker and are handed to it again; was a queue purged or deleted?", "orders", n)
			s.relay.nudge()
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	// The one that has been back longest is the first to be of use, and after
	// its patience and the return of its second the next. Other seconds of the
	// same one may still be in the queue.
	if s.returned.IsZero() || !m.LostBefore.Before(s.sentAt.Add(-clockSkew)) {
		s.returned, s.sentAt = now(), m.SentAt
		s.pause = markerPauseMin
	}
	return nil
}

// await returns when all outcomes have been handed out that were published
// before, or a while later: another process may have taken the marker.
func (s *sweeper) await(ctx context.Context) error {
	if s.forgetful {
		return nil // then an outcome is published when it is stored
	}
	ctx, cancel := context.WithTimeout(ctx, lastPatience)
	defer cancel()
	s.mu.Lock()
	marker := contract.Marker{SentAt: now(), Last: s.last}
	s.mu.Unlock()
	msg, err := marker.Message()
	if err != nil {
		return err
	}
	msg.SetContext(ctx)
	if err := s.publisher.Publish(contract.TopicOutcome, msg); err != nil {
		return fmt.Errorf("publish the last marker: %w", err)
	}
	select {
	case <-s.lastBack:
	case <-ctx.Done():
	}
	return nil
}
