package pubsub

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
)

// keyRedelivered is the metadata key that marks a delivery which follows an
// earlier one of the same message.
const keyRedelivered = "sluice_redelivered"

// A message that was nacked comes back after a pause that doubles from
// firstPause to lastPause. Watermill itself has none: a handler that always
// fails would be called again at once, for ever.
const (
	firstPause = 100 * time.Millisecond
	lastPause  = 5 * time.Second
)

var errStopped = errors.New("subscriber is drained or closed")

// Redelivered reports whether this delivery of msg follows an earlier one that
// was not acked. It holds for messages that a Subscriber handed out.
func Redelivered(msg *message.Message) bool {
	return msg.Metadata.Get(keyRedelivered) != ""
}

// lostKey is the key of a context's value that tells whether the broker has
// given the message to somebody else.
type lostKey struct{}

// Lost reports whether the broker no longer counts on this consumer: the
// connection that the message came by is gone, or its lease has run out, and
// another delivery of it is on its way. To begin with it now would mean to do
// it twice. It holds for messages that a Subscriber handed out, until they are
// acked or nacked.
func Lost(msg *message.Message) bool {
	lost, ok := msg.Context().Value(lostKey{}).(func() bool)
	return ok && lost()
}

// Subscriber is a message.Subscriber that bounds how many messages are with its
// consumer, and that can be drained. It is safe for concurrent use.
//
// It takes a message from the library only when it has a free slot to hand it
// out in. A slot is held until the message is acked, or until it was nacked and
// the pause before its redelivery is over: when everything fails, the backlog
// waits at the broker instead of going round.
type Subscriber struct {
	pubsub      *PubSub
	group       string
	maxInFlight int

	draining chan struct{}  // closed by the first Drain: nothing is handed out any more
	takers   sync.WaitGroup // the loops that hand out; mu guards Add against Wait

	mu            sync.Mutex
	stopped       bool // by Drain or Close
	subscriptions []*subscription
	inFlight      int
	idle          chan struct{} // closed when inFlight comes down to 0, nil when nobody waits for that
}

// subscription is one Subscribe.
type subscription struct {
	in     <-chan *message.Message // the library's
	source source
	out    chan *message.Message // the consumer's
	slots  chan struct{}         // holds one element per slot in use
	cancel context.CancelFunc
	done   chan struct{} // closed when out is
}

// source is the broker's side of a subscription.
type source interface {
	// receive is called with each message of the library before it is handed
	// out.
	receive(msg *message.Message) delivery
	// ack and nack settle a delivery; a nacked one comes again, if the
	// subscription is still there to take it.
	ack(d delivery)
	nack(d delivery)
	// release gives back a delivery that never reached the consumer, which is
	// not to count as one.
	release(d delivery)
	// drain says that no further message will be taken, close that the
	// subscription is over. Deliveries may still be settled after either.
	drain()
	close()
}

// delivery is a message on its way to the consumer and back.
type delivery struct {
	msg    *message.Message // the library's
	number int              // 1 for the first delivery of the message

	settled <-chan struct{} // the source's own
	lost    func() bool     // see Lost; nil where that cannot be
}

// Subscribe implements message.Subscriber. The returned channel is closed when
// ctx ends, or the Subscriber or its PubSub closes. Drain leaves it open, since
// a router closes itself, and cancels what is in flight, once all its channels
// are closed. maxInFlight counts for each topic by itself.
func (s *Subscriber) Subscribe(ctx context.Context, topic string) (<-chan *message.Message, error) {
	if s.group == "" {
		return nil, fmt.Errorf("subscribe to %s: consumer group has no name", topic)
	}
	if s.maxInFlight < 1 {
		return nil, fmt.Errorf("subscribe %s to %s: max in flight must be at least 1, is %d", s.group, topic, s.maxInFlight)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.pubsub.join() {
		return nil, fmt.Errorf("subscribe %s to %s: %w", s.group, topic, ErrClosed)
	}
	sub, err := s.subscribe(ctx, topic)
	if err != nil {
		s.pubsub.goroutines.Done()
		return nil, fmt.Errorf("subscribe %s to %s: %w", s.group, topic, err)
	}
	return sub.out, nil
}

// Drain stops the hand-out of messages and waits until every message that was
// handed out is acked or nacked. Nothing is handed out once it has returned.
// What the broker still holds stays there. When ctx ends or the PubSub closes
// before, Drain returns an error that wraps the reason and names the number of
// messages still in flight; it can be called again to go on waiting. A drained
// Subscriber does not start again. Publishing goes on, but a broker that is not
// durable refuses messages that no other group would take.
func (s *Subscriber) Drain(ctx context.Context) error {
	s.mu.Lock()
	s.stopped = true
	if !isClosed(s.draining) {
		close(s.draining)
	}
	subscriptions := slices.Clone(s.subscriptions)
	s.mu.Unlock()

	// The loops leave at once. From here on messages in flight only get fewer.
	s.takers.Wait()
	for _, sub := range subscriptions {
		sub.source.drain()
	}

	var reason error
	idle := s.whenIdle()
	select {
	case <-idle:
	case <-ctx.Done():
		reason = ctx.Err()
	case <-s.pubsub.closing:
		reason = ErrClosed
	}
	if isClosed(idle) {
		return nil // also if ctx was over from the beginning
	}
	return fmt.Errorf("drain %s: %d messages still in flight: %w", s.group, s.InFlight(), reason)
}

// InFlight is the number of messages that are with the consumer: handed out,
// or being handed out, and neither acked nor nacked. A nacked message counts
// until the pause before its redelivery is over.
func (s *Subscriber) InFlight() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.inFlight
}

// Close implements message.Subscriber: it ends all subscriptions and returns
// when their channels are closed. Messages in flight can still be acked. The
// router calls it before its handlers are done, so it does not wait for them;
// Drain does. Closing again does nothing.
func (s *Subscriber) Close() error {
	s.mu.Lock()
	s.stopped = true
	subscriptions := slices.Clone(s.subscriptions)
	s.mu.Unlock()
	for _, sub := range subscriptions {
		sub.cancel()
	}
	for _, sub := range subscriptions {
		<-sub.done
	}
	return nil
}

// subscribe starts a subscription. Its goroutine is announced to the PubSub
// already; mu is held.
func (s *Subscriber) subscribe(ctx context.Context, topic string) (*subscription, error) {
	if s.stopped {
		return nil, errStopped
	}
	ctx, cancel := context.WithCancel(ctx)
	slots := make(chan struct{}, s.maxInFlight)
	in, src, err := s.pubsub.backend.subscribe(ctx, demand{group: s.group, topic: topic, maxInFlight: s.maxInFlight,
		free: func() int { return s.maxInFlight - len(slots) }})
	if err != nil {
		cancel()
		return nil, err
	}
	sub := &subscription{
		in:     in,
		source: src,
		out:    make(chan *message.Message),
		slots:  slots,
		cancel: cancel,
		done:   make(chan struct{}),
	}
	s.subscriptions = append(s.subscriptions, sub)
	s.takers.Add(1)
	go s.run(ctx, sub)
	return sub, nil
}

func (s *Subscriber) run(ctx context.Context, sub *subscription) {
	defer s.pubsub.goroutines.Done()
	defer sub.cancel()
	s.take(ctx, sub)
	s.takers.Done()
	if isClosed(s.draining) {
		<-ctx.Done()
	}
	sub.source.close()
	s.mu.Lock()
	s.subscriptions = slices.DeleteFunc(s.subscriptions, func(other *subscription) bool { return other == sub })
	s.mu.Unlock()
	close(sub.out)
	close(sub.done)
}

// take hands messages out, one for each free slot, until the Subscriber is
// drained, ctx ends or the library closes its channel.
func (s *Subscriber) take(ctx context.Context, sub *subscription) {
	for {
		select {
		case sub.slots <- struct{}{}:
		case <-s.draining:
			return
		case <-ctx.Done():
			return
		}
		select {
		case msg, ok := <-sub.in:
			if !ok || !s.handOut(ctx, sub, msg) {
				return
			}
		case <-s.draining:
			return
		case <-ctx.Done():
			return
		}
	}
}

// handOut offers msg to the consumer, and reports whether it took it. If it did
// not, since a drain or the end of ctx came first, the broker has msg back.
func (s *Subscriber) handOut(ctx context.Context, sub *subscription, msg *message.Message) bool {
	d := sub.source.receive(msg)
	// The consumer gets a message of its own, so that the library learns of a
	// nack when the pause is over and not before.
	handed := message.NewMessage(msg.UUID, msg.Payload)
	handed.Metadata = msg.Metadata
	handed.SetContext(msg.Context())
	if d.lost != nil {
		handed.SetContext(context.WithValue(msg.Context(), lostKey{}, d.lost))
	}
	delete(handed.Metadata, keyRedelivered)
	if d.number > 1 {
		handed.Metadata.Set(keyRedelivered, "true")
	}

	// A select with several open cases picks any of them: ask first.
	if isClosed(s.draining) || isClosed(ctx.Done()) {
		sub.source.release(d)
		return false
	}
	// Counted before it is offered: a consumer that looks sees itself, and a
	// drain cannot miss it.
	s.count(1)
	select {
	case sub.out <- handed:
		s.pubsub.goroutines.Add(1) // never from 0: this goroutine is one of them
		go s.settle(ctx, sub, d, handed)
		return true
	case <-s.draining:
	case <-ctx.Done():
	}
	sub.source.release(d)
	s.count(-1)
	return false
}

// settle waits for the consumer's answer, passes it on to the broker and frees
// the slot. The end of ctx does not stop it: the handler is still at work, and
// a drain waits for it.
func (s *Subscriber) settle(ctx context.Context, sub *subscription, d delivery, handed *message.Message) {
	defer s.pubsub.goroutines.Done()
	select {
	case <-handed.Acked():
		sub.source.ack(d)
	case <-handed.Nacked():
		s.pause(ctx, d.number)
		sub.source.nack(d)
	case <-s.pubsub.closing:
		if !isClosed(handed.Acked()) { // which may have been first
			return // still counted: a Drain must not take it for done
		}
		sub.source.ack(d)
	}
	s.count(-1) // before the slot is free, or the count could pass the limit
	<-sub.slots
}

// pause holds back the given delivery's nack. It ends early when nothing would
// be taken again anyway.
func (s *Subscriber) pause(ctx context.Context, number int) {
	pause := firstPause
	for ; number > 1 && pause < lastPause; number-- {
		pause *= 2
	}
	timer := time.NewTimer(min(pause, lastPause))
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-s.draining:
	case <-ctx.Done():
	}
}

func (s *Subscriber) count(change int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.inFlight += change
	if s.inFlight == 0 && s.idle != nil {
		close(s.idle)
		s.idle = nil
	}
}

// whenIdle returns a channel that closes when nothing is in flight.
func (s *Subscriber) whenIdle() <-chan struct{} {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.idle != nil {
		return s.idle
	}
	idle := make(chan struct{})
	if s.inFlight == 0 {
		close(idle)
		return idle
	}
	s.idle = idle
	return idle
}
