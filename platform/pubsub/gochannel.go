package pubsub

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/ThreeDotsLabs/watermill/pubsub/gochannel"
)

// keyDelivery is the metadata key under which a message carries its number
// through the library. Message ids do not do: they may be empty, and the same
// message can be published twice. Consumers do not see it.
const keyDelivery = "sluice_delivery"

// errGroupStopped fails those who wait for the ack of a group that will not
// come.
var errGroupStopped = errors.New("consumer group stopped before it took the message")

// GoChannelConfig holds the settings of the broker inside the process.
type GoChannelConfig struct {
	// Window is the most messages that a publisher may have published and
	// unfinished, at least 1: each costs two goroutines. Default: 10000.
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

// goChannel is Watermill's GoChannel with consumer groups that are known by
// name, confirmation, and an error where the library drops a message.
type goChannel struct {
	library  *gochannel.GoChannel
	sequence atomic.Uint64
	closing  <-chan struct{} // the PubSub's

	// mu is held for reading while a message goes to the library, so that the
	// groups that are waited for are the groups that get it.
	mu     sync.RWMutex
	topics map[string]map[string]*goSource // by topic, then by group
}

func openGoChannel(closing <-chan struct{}, logger *slog.Logger) *goChannel {
	return &goChannel{
		// No buffer: a message in it would be taken, but in nobody's slot. Not
		// BlockPublishUntilSubscriberAck: it holds a lock of the topic while
		// it waits, so that one message at a time would be on its way.
		library: gochannel.NewGoChannel(gochannel.Config{}, Logger(logger)),
		closing: closing,
		topics:  make(map[string]map[string]*goSource),
	}
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
			forget(waits[i:])
			return fmt.Errorf("confirm message %s on %s: %w", msgs[i].UUID, topic, err)
		}
	}
	return nil
}

// send gives copies of the messages to the library, which does not block. With
// confirm it returns one confirmation for each message.
func (g *goChannel) send(topic string, msgs []*message.Message, confirm bool) ([]*confirmation, error) {
	g.mu.RLock()
	defer g.mu.RUnlock()
	sources := g.topics[topic]
	if !anyTaking(sources) {
		return nil, g.refusal(topic, ErrNoSubscriber)
	}

	copies := make([]*message.Message, len(msgs))
	var waits []*confirmation
	for i, msg := range msgs {
		id := strconv.FormatUint(g.sequence.Add(1), 10)
		copies[i] = msg.Copy()
		copies[i].Metadata.Set(keyDelivery, id)
		if !confirm {
			continue
		}
		w, err := expect(id, sources)
		if err != nil {
			forget(waits)
			return nil, g.refusal(topic, err)
		}
		waits = append(waits, w)
	}
	if err := g.library.Publish(topic, copies...); err != nil {
		forget(waits)
		return nil, g.refusal(topic, err)
	}
	return waits, nil
}

// refusal says why a publish did not happen. Once the PubSub closes, that is
// the reason for all else.
func (g *goChannel) refusal(topic string, err error) error {
	if isClosed(g.closing) {
		err = ErrClosed
	}
	return fmt.Errorf("publish to %s: %w", topic, err)
}

func (g *goChannel) subscribe(ctx context.Context, d demand) (<-chan *message.Message, source, error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if isClosed(g.closing) {
		return nil, nil, ErrClosed
	}
	if _, ok := g.topics[d.topic][d.group]; ok {
		return nil, nil, errors.New("the group is subscribed already, and would get a second copy of each message")
	}
	messages, err := g.library.Subscribe(ctx, d.topic)
	if err != nil {
		return nil, nil, err
	}
	src := &goSource{broker: g, group: d.group, topic: d.topic, ended: ctx.Done(), entries: make(map[string]*entry)}
	if g.topics[d.topic] == nil {
		g.topics[d.topic] = make(map[string]*goSource)
	}
	g.topics[d.topic][d.group] = src
	return messages, src, nil
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

func (g *goChannel) close() error {
	if err := g.library.Close(); err != nil {
		return fmt.Errorf("close go channels: %w", err)
	}
	return nil
}

// goSource is one group's subscription to one topic.
type goSource struct {
	broker *goChannel
	group  string
	topic  string
	ended  <-chan struct{} // closed when the library's subscription ends

	mu      sync.Mutex
	stopped bool // takes no further messages
	entries map[string]*entry
}

// entry is a message that is with the consumer, that was nacked, or that a
// publisher waits for.
type entry struct {
	deliveries int
	out        bool // with the consumer now
	wait       *confirmation
}

func (s *goSource) receive(msg *message.Message) delivery {
	id := msg.Metadata.Get(keyDelivery)
	delete(msg.Metadata, keyDelivery)
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	if e == nil {
		e = &entry{}
		s.entries[id] = e
	}
	e.deliveries++
	e.out = true
	return delivery{msg: msg, id: id, number: e.deliveries}
}

func (s *goSource) ack(d delivery) {
	d.msg.Ack()
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.entries[d.id]; e != nil {
		delete(s.entries, d.id)
		e.wait.settle(nil)
	}
}

func (s *goSource) nack(d delivery) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.entries[d.id]; e != nil {
		e.out = false
		if s.stopped {
			delete(s.entries, d.id)
			e.wait.settle(errGroupStopped)
		}
	}
	d.msg.Nack()
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
	for id, e := range s.entries {
		if !e.out {
			delete(s.entries, id)
			e.wait.settle(errGroupStopped)
		}
	}
}

func (s *goSource) close() {
	s.drain()
	s.broker.remove(s)
}

// taking reports whether a message sent now can reach the consumer. mu is held.
func (s *goSource) taking() bool {
	return !s.stopped && !isClosed(s.ended)
}

func anyTaking(sources map[string]*goSource) bool {
	for _, s := range sources {
		s.mu.Lock()
		taking := s.taking()
		s.mu.Unlock()
		if taking {
			return true
		}
	}
	return false
}

// confirmation is a publisher's wait for the acks of one message.
type confirmation struct {
	id      string
	sources []*goSource // that know of it
	done    chan struct{}

	mu      sync.Mutex
	missing int // acks to come
	settled bool
	err     error // set before done is closed
}

// expect registers a wait for the acks of all groups, before the message is
// sent. It fails when one of them would not take it.
func expect(id string, sources map[string]*goSource) (*confirmation, error) {
	w := &confirmation{id: id, done: make(chan struct{}), missing: len(sources)}
	for group, s := range sources {
		if !s.expect(w) {
			forget([]*confirmation{w})
			return nil, fmt.Errorf("consumer group %s has stopped: %w", group, ErrNoSubscriber)
		}
		w.sources = append(w.sources, s)
	}
	return w, nil
}

func (s *goSource) expect(w *confirmation) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.taking() {
		return false
	}
	s.entries[w.id] = &entry{wait: w}
	return true
}

// forget ends waits whose publishers have given up.
func forget(waits []*confirmation) {
	for _, w := range waits {
		for _, s := range w.sources {
			s.forget(w.id)
		}
	}
}

func (s *goSource) forget(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.entries[id]
	switch {
	case e == nil:
	case e.deliveries == 0:
		delete(s.entries, id)
	default:
		e.wait = nil // the deliveries are still counted
	}
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
