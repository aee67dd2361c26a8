package pubsub

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/ThreeDotsLabs/watermill/message"
)

// errGroupStopped fails those who wait for the ack of a group that will not
// come.
var errGroupStopped = errors.New("consumer group stopped before it took the message")

// GoChannelConfig holds the settings of the broker inside the process.
type GoChannelConfig struct {
	// Window is the most messages that a publisher may have published and
	// unfinished, at least 1: they are held in memory. Default: 10000.
	Window int `koanf:"window"`
}

func defaultGoChannelConfig() GoChannelConfig {
	return GoChannelConfig{Window: 10_000}
}

func (c GoChannelConfig) validate() error {
	if c.Window < 1 {
		return fmt.Errorf("pubsub.gochannel.window: must be at least 1, is %d", c.Window)
	}
	return nil
}

// goChannel is a broker inside the process: a queue for each consumer group,
// first come, first served, with confirmation, and an error where nobody would
// take a message. It stands where Watermill's GoChannel could, which spends two
// goroutines, two copies and most of its time on every message that waits
// (ADR 19).
type goChannel struct {
	closing <-chan struct{} // the PubSub's
	feeders sync.WaitGroup

	// mu is held for reading while messages are queued, so that the groups
	// that are waited for are the groups that get them.
	mu     sync.RWMutex
	topics map[string]map[string]*goSource // by topic, then by group
}

func openGoChannel(closing <-chan struct{}) *goChannel {
	return &goChannel{closing: closing, topics: make(map[string]map[string]*goSource)}
}

func (g *goChannel) publish(topic string, msgs []*message.Message) error {
	_, err := g.send(topic, msgs, false)
	return err
}

func (g *goChannel) confirm(topic string, msgs []*message.Message) error {
	waits, err := g.send(topic, msgs, true)
	if err != nil {
		return err
	}
	for i, w := range waits {
		if err := w.wait(msgs[i].Context(), g.closing); err != nil {
			return fmt.Errorf("confirm message %s on %s: %w", msgs[i].UUID, topic, err)
		}
	}
	return nil
}

// send queues copies of the messages for each group; it does not block. With
// confirm it returns one confirmation for each message.
func (g *goChannel) send(topic string, msgs []*message.Message, confirm bool) ([]*confirmation, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	sources := g.topics[topic]
	if err := canTake(sources, confirm); err != nil {
		if isClosed(g.closing) {
			err = ErrClosed // which is why the groups stopped
		}
		return nil, fmt.Errorf("publish to %s: %w", topic, err)
	}
	var waits []*confirmation
	for _, msg := range msgs {
		var w *confirmation
		if confirm {
			w = &confirmation{done: make(chan struct{}), missing: len(sources)}
			waits = append(waits, w)
		}
		content := contentOf(msg)
		for _, s := range sources {
			s.push(&entry{content: content, wait: w})
		}
	}
	return waits, nil
}

// canTake says why a message sent now would reach none of the groups or, if all
// are wanted, not all of them.
func canTake(sources map[string]*goSource, all bool) error {
	taking := 0
	for group, s := range sources {
		switch {
		case s.taking():
			taking++
		case all:
			return fmt.Errorf("consumer group %s has stopped: %w", group, ErrNoSubscriber)
		}
	}
	if taking == 0 {
		return ErrNoSubscriber
	}
	return nil
}

func (g *goChannel) subscribe(ctx context.Context, d demand) (<-chan *message.Message, source, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if isClosed(g.closing) {
		return nil, nil, ErrClosed
	}
	if _, ok := g.topics[d.topic][d.group]; ok {
		return nil, nil, errors.New("the group is subscribed already, and its messages would go to either of the two")
	}
	src := &goSource{broker: g, group: d.group, topic: d.topic, ended: ctx.Done(),
		arrived: make(chan struct{}, 1), offered: make(map[*message.Message]*entry)}
	if g.topics[d.topic] == nil {
		g.topics[d.topic] = make(map[string]*goSource)
	}
	g.topics[d.topic][d.group] = src
	out := make(chan *message.Message)
	g.feeders.Go(func() { src.feed(ctx, out) })
	return out, src, nil
}

func (g *goChannel) remove(src *goSource) {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.topics[src.topic], src.group)
	if len(g.topics[src.topic]) == 0 {
		delete(g.topics, src.topic)
	}
}

func (g *goChannel) health(context.Context) error {
	if isClosed(g.closing) {
		return ErrClosed
	}
	return nil
}

// close waits for the feeders, whose subscriptions have ended.
func (g *goChannel) close() error {
	g.feeders.Wait()
	return nil
}

// content is what every delivery of a message is made of, for all groups. It is
// never changed.
type content struct {
	uuid     string
	payload  message.Payload
	metadata []field
}

// field is one element of a message's metadata. A list of them is cheaper to
// make and to keep than a map.
type field struct{ key, value string }

func contentOf(msg *message.Message) *content {
	c := &content{uuid: msg.UUID, payload: msg.Payload, metadata: make([]field, 0, len(msg.Metadata))}
	for key, value := range msg.Metadata {
		c.metadata = append(c.metadata, field{key, value})
	}
	return c
}

// message makes a message whose ack nobody waits for.
func (c *content) message(ctx context.Context) *message.Message {
	metadata := make(message.Metadata, len(c.metadata)+1) // the mark of a redelivery
	for _, f := range c.metadata {
		metadata[f.key] = f.value
	}
	msg := &message.Message{UUID: c.uuid, Payload: c.payload, Metadata: metadata}
	msg.SetContext(ctx)
	return msg
}

// goSource is one group's subscription to one topic: its queue, and what of it
// is with the consumer.
type goSource struct {
	broker  *goChannel
	group   string
	topic   string
	ended   <-chan struct{} // closed when the subscription ends
	arrived chan struct{}   // holds an element when the queue may not be empty

	mu      sync.Mutex
	stopped bool // takes no further messages
	queue   []*entry
	offered map[*message.Message]*entry // by the message that the feeder made of it
}

// entry is a message of one group, from its publication to its ack.
type entry struct {
	content    *content
	wait       *confirmation // nil when nobody waits for the ack
	deliveries int
	out        bool // with the consumer now
}

// feed offers what is queued, the oldest first, until ctx ends.
func (s *goSource) feed(ctx context.Context, out chan<- *message.Message) {
	for {
		if msg := s.next(ctx); msg != nil {
			select {
			case out <- msg:
				continue
			case <-ctx.Done():
				return
			}
		}
		select {
		case <-s.arrived:
		case <-ctx.Done():
			return
		}
	}
}

func (s *goSource) next(ctx context.Context) *message.Message {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.queue) == 0 {
		return nil
	}
	e := s.queue[0]
	s.queue[0] = nil // or the array would keep it
	s.queue = s.queue[1:]
	msg := e.content.message(ctx)
	s.offered[msg] = e
	return msg
}

// push queues a message, unless it would stay there.
func (s *goSource) push(e *entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		e.wait.settle(errGroupStopped)
		return
	}
	s.queue = append(s.queue, e)
	select {
	case s.arrived <- struct{}{}:
	default:
	}
}

func (s *goSource) receive(msg *message.Message) delivery {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.offered[msg]
	e.deliveries++
	e.out = true
	return delivery{msg: msg, number: e.deliveries}
}

func (s *goSource) ack(d delivery) {
	s.settled(d).wait.settle(nil)
}

func (s *goSource) nack(d delivery) {
	e := s.settled(d)
	e.out = false
	s.push(e)
}

// settled is the entry of a delivery that is over.
func (s *goSource) settled(d delivery) *entry {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.offered[d.msg]
	delete(s.offered, d.msg)
	return e
}

// release is a nack: the subscription has ended or is drained, and the message
// is lost or goes to nobody.
func (s *goSource) release(d delivery) { s.nack(d) }

// drain fails the publishers that wait for messages which will not be taken.
// Those whose message is with the consumer go on waiting.
func (s *goSource) drain() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stopped = true
	for _, e := range s.queue {
		e.wait.settle(errGroupStopped)
	}
	s.queue = nil
	for msg, e := range s.offered {
		if !e.out {
			delete(s.offered, msg)
			e.wait.settle(errGroupStopped)
		}
	}
}

func (s *goSource) close() {
	s.drain()
	s.broker.remove(s)
}

// taking reports whether a message sent now can reach the consumer.
func (s *goSource) taking() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.stopped && !isClosed(s.ended)
}

// confirmation is a publisher's wait for the acks of one message.
type confirmation struct {
	done chan struct{}

	mu      sync.Mutex
	missing int // acks to come
	settled bool
	err     error // set before done is closed
}

// settle takes the answer of one group. The first error is final.
func (w *confirmation) settle(err error) {
	if w == nil {
		return // nobody waits
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.missing--
	if w.settled || err == nil && w.missing > 0 {
		return
	}
	w.settled = true
	w.err = err
	close(w.done)
}

// wait blocks until all groups have acked, or one stopped, or ctx ends, or the
// PubSub closes.
func (w *confirmation) wait(ctx context.Context, closing <-chan struct{}) error {
	select {
	case <-w.done:
	case <-ctx.Done():
	case <-closing:
	}
	// More than one may have come by now, and acks count first.
	switch {
	case isClosed(w.done) && w.err == nil:
		return nil
	case isClosed(closing):
		return ErrClosed // which is why the groups stop
	case isClosed(w.done):
		return w.err
	default:
		return ctx.Err()
	}
}
