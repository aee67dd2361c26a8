// Package pubsub opens the message broker that the configuration names and
// makes every broker behave alike: messages are handed out up to a limit, a
// nacked message comes back after a pause and marked as redelivered, and a
// subscriber can be drained before the router is closed.
//
// It is Watermill's Publisher and Subscriber with what the libraries behind
// them lack, and it knows nothing of orders. The modules use it through
// message.Router; whoever wires them opens it, drains its subscribers, closes
// the router, and closes it last.
package pubsub

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
)

// BackendGoChannel is the broker inside the process: fast, and forgetful.
const BackendGoChannel = "gochannel"

// ErrClosed is wrapped by everything that a closed PubSub refuses. From a
// confirmed publisher it means that the messages may or may not have been
// processed.
var ErrClosed = errors.New("pubsub is closed")

// ErrNoSubscriber is wrapped by the errors of a publish to a topic of a broker
// that keeps nothing, when no consumer group is there to take the messages.
var ErrNoSubscriber = errors.New("no subscriber takes the messages of this topic")

// longestPublish bounds how long a Publish may take: who publishes may hold
// messages by a lease, and must know when it is over.
const longestPublish = 10 * time.Second

// Config says which broker to use.
type Config struct {
	// Backend names the broker: "amqp", "gochannel" or "sql". Default: "gochannel".
	Backend string `koanf:"backend"`
	// AMQP holds the settings of the backend "amqp".
	AMQP AMQPConfig `koanf:"amqp"`
	// GoChannel holds the settings of the backend "gochannel".
	GoChannel GoChannelConfig `koanf:"gochannel"`
	// SQL holds the settings of the backend "sql".
	SQL SQLConfig `koanf:"sql"`
}

// DefaultConfig needs no broker to be installed.
func DefaultConfig() Config {
	return Config{Backend: BackendGoChannel, AMQP: defaultAMQPConfig(), GoChannel: defaultGoChannelConfig(), SQL: defaultSQLConfig()}
}

// Validate returns every fault at once, each starting with its key, or nil.
// Settings of a backend that is not in use are not looked at.
func (c Config) Validate() error {
	switch c.Backend {
	case BackendAMQP:
		return c.AMQP.validate()
	case BackendGoChannel:
		return c.GoChannel.validate()
	case BackendSQL:
		return c.SQL.validate()
	default:
		return errUnknownBackend(c.Backend)
	}
}

// Topology names the consumer groups of each topic whose messages a durable
// broker must keep from the first one on, whether or not one of their processes
// is running. Groups that are not in it are kept from their first Subscribe on.
type Topology map[string][]string

// PubSub is an open broker. It is safe for concurrent use.
type PubSub struct {
	name    string
	place   string
	window  int
	durable bool
	backend backend

	closing    chan struct{}  // closed by Close: nobody waits for anything any more
	goroutines sync.WaitGroup // those of all subscribers

	mu          sync.Mutex
	closed      bool
	subscribers []*Subscriber
}

// backend is what a broker brings along.
type backend interface {
	// publish returns when the broker has the messages.
	publish(topic string, msgs []*message.Message) error
	// confirm returns when the messages need their sender no longer, or with
	// an error when the context of one of them ends or the backend closes.
	confirm(topic string, msgs []*message.Message) error
	// subscribe gives the library's messages for a group, until ctx ends. The
	// channel must not be buffered: what is in it is taken.
	subscribe(ctx context.Context, d demand) (<-chan *message.Message, source, error)
	health(ctx context.Context) error
	// close waits for the library. The PubSub's closing, which makes waiting
	// publishers return, is closed before, and nothing is acked after.
	close() error
}

// demand is what a subscription wants of the broker.
type demand struct {
	group, topic string
	maxInFlight  int        // most messages with the consumer at a time
	free         func() int // how many more it has room for now
}

// Open connects to the broker that cfg names and sees to it that it keeps the
// messages of the topology; ctx bounds how long that may take, and nothing
// after it. The caller must Close what Open returns.
func Open(ctx context.Context, cfg Config, topology Topology, logger *slog.Logger) (*PubSub, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("open pubsub %s: %w", cfg.Backend, err)
	}
	p := &PubSub{name: cfg.Backend, place: cfg.Backend, closing: make(chan struct{})}
	switch cfg.Backend {
	case BackendAMQP:
		broker, err := openAMQP(ctx, cfg.AMQP, topology, p.closing, logger)
		if err != nil {
			return nil, fmt.Errorf("open pubsub %s: %w", cfg.Backend, err)
		}
		p.durable = true
		p.backend = broker
		p.place = broker.place()
	case BackendGoChannel: // keeps nothing, so it has nothing to prepare
		p.window = cfg.GoChannel.Window
		p.backend = openGoChannel(p.closing)
	case BackendSQL:
		broker, err := openSQL(ctx, cfg.SQL, topology, p.closing, logger)
		if err != nil {
			return nil, fmt.Errorf("open pubsub %s: %w", cfg.Backend, err)
		}
		p.durable = true
		p.backend = broker
		p.place = broker.place()
	default:
		return nil, errUnknownBackend(cfg.Backend)
	}
	return p, nil
}

// Name is the backend's name in the configuration.
func (p *PubSub) Name() string { return p.name }

// System names the broker in traces: the attribute messaging.system of
// OpenTelemetry's semantic conventions.
func (p *PubSub) System() string {
	switch p.name {
	case BackendAMQP:
		return "rabbitmq"
	case BackendSQL:
		return "postgresql"
	default:
		return p.name
	}
}

// Place names the broker and where in it the messages are, without the host: a
// broker that moves to another one, or is called by another name, takes its
// messages along.
func (p *PubSub) Place() string { return p.place }

// Window is the most messages that a publisher may have published and
// unfinished at a time, 0 for no limit. A broker with a window holds its
// backlog in the memory of this process.
func (p *PubSub) Window() int { return p.window }

// Durable reports whether messages outlive the process. Where they do not,
// everything unfinished must be published again after a start.
func (p *PubSub) Durable() bool { return p.durable }

// Publisher returns a publisher that blocks until the broker has the messages.
// With a broker that is not durable, a topic without a subscriber is an error
// that wraps ErrNoSubscriber. It may be shared; its Close does nothing, because
// Watermill's router closes the publishers of its handlers while other handlers
// still need them.
func (p *PubSub) Publisher() message.Publisher {
	return publisher(p.backend.publish)
}

// Confirmed returns a publisher that blocks until the messages are out of
// danger, so that whatever they were made of may be forgotten. With a durable
// broker that is when the broker has them; otherwise it is when every consumer
// group of the topic has acked them. It gives up when the context of a message
// ends, when a group stops before it was handed its message, and when the
// PubSub closes; after such an error the messages may or may not have been, or
// yet be, processed. Any number of calls can wait at the same time. Its Close
// does nothing.
func (p *PubSub) Confirmed() message.Publisher {
	return publisher(p.backend.confirm)
}

// Subscriber returns a subscriber of a consumer group. Each group gets one copy
// of every message of a topic. At most maxInFlight messages of a topic, at
// least 1, are with the consumer at a time; all others stay with the broker.
func (p *PubSub) Subscriber(group string, maxInFlight int) *Subscriber {
	s := &Subscriber{
		pubsub:      p,
		group:       group,
		maxInFlight: maxInFlight,
		draining:    make(chan struct{}),
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.subscribers = append(p.subscribers, s)
	return s
}

// Health returns nil while the broker can be used.
func (p *PubSub) Health(ctx context.Context) error {
	return p.backend.health(ctx)
}

// Close ends all subscriptions and waiting publishers, and waits for the
// goroutines behind them. It does not wait for messages in flight: drain the
// subscribers and close the router first. Messages that a broker which is not
// durable still holds are gone. Closing again does nothing.
func (p *PubSub) Close() error {
	p.mu.Lock()
	if p.closed {
		p.mu.Unlock()
		return nil
	}
	p.closed = true
	subscribers := p.subscribers
	p.mu.Unlock()

	close(p.closing)
	errs := make([]error, 0, len(subscribers)+1)
	for _, s := range subscribers {
		errs = append(errs, s.Close())
	}
	p.goroutines.Wait() // the backend has all acks that there are
	errs = append(errs, p.backend.close())
	return errors.Join(errs...)
}

// join announces a goroutine that Close has to wait for. It reports false when
// it is too late for that.
func (p *PubSub) join() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return false
	}
	p.goroutines.Add(1)
	return true
}

// publisher makes a message.Publisher of a function.
type publisher func(topic string, msgs []*message.Message) error

// Publish implements message.Publisher.
func (p publisher) Publish(topic string, msgs ...*message.Message) error {
	if len(msgs) == 0 {
		return nil
	}
	return p(topic, msgs)
}

// Close implements message.Publisher. The PubSub is closed by who opened it.
func (p publisher) Close() error { return nil }

func errUnknownBackend(name string) error {
	backends := []string{BackendAMQP, BackendGoChannel, BackendSQL}
	slices.Sort(backends)
	return fmt.Errorf("pubsub.backend: must be one of %s, is %q", strings.Join(backends, ", "), name)
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
