package pubsub

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	wamqp "github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	// amqpPool is how many messages can wait for their confirmation at a time.
	// Each has a channel to itself: the library waits before it sends the next.
	amqpPool = 64
	// publishTimeouts in a row, without a confirmation between them, make the
	// connection a hung one.
	publishTimeouts = 2
	// mourning is how long a queue that has vanished is not made again. At once,
	// and RabbitMQ moves the consumers of the old one to the new one, without
	// telling them, where they get nothing. Left alone it cancels them.
	mourning = 250 * time.Millisecond
)

// amqpSender is Watermill's Publisher on one link.
//
// A message that no queue takes is confirmed by the broker like any other. It is
// sent as mandatory, so that it comes back before it is confirmed, and the
// library's channels are made to tell of that.
type amqpSender struct {
	cfg      AMQPConfig
	link     *amqpLink
	groups   func(topic string) []string
	library  *wamqp.Publisher
	jobs     chan *amqpJob // for the workers
	workers  sync.WaitGroup
	timeouts atomic.Int64 // since the last confirmation
	sequence atomic.Int64

	channels []*amqp.Channel      // the library's pool
	returns  []<-chan amqp.Return // theirs

	mu       sync.Mutex
	declared map[string]bool // topics
	returned map[string]bool // sequence numbers
}

// amqpJob is one message for a worker.
type amqpJob struct {
	topic  string
	number string           // by which it is known if it comes back
	msg    *message.Message // for the library
	done   chan error
}

// publishOn returns what a link is used for to publish on it.
func (b *amqpBroker) publishOn(ready func()) func(context.Context, *amqpLink) error {
	return func(ctx context.Context, link *amqpLink) (err error) {
		sender, err := b.newSender(link)
		if err != nil {
			link.close(false)
			return err
		}
		b.status.up("publish", link)
		b.setSender(sender)
		ready()
		select {
		case <-link.lost:
		case <-ctx.Done():
		}
		err = link.err()
		// The Publisher is not closed: a publish on its way could come upon a
		// channel that was closed in good order, which it does not expect and
		// panics. Its channels end with the connection.
		link.close(err == nil)
		sender.workers.Wait()
		return err
	}
}

func (b *amqpBroker) newSender(link *amqpLink) (*amqpSender, error) {
	s := &amqpSender{
		cfg:      b.cfg,
		link:     link,
		groups:   b.groups,
		jobs:     make(chan *amqpJob),
		declared: make(map[string]bool),
		returned: make(map[string]bool),
	}
	err := link.do(func() (err error) {
		for _, topic := range b.topics() {
			if err := s.declare(topic); err != nil {
				return err
			}
		}
		s.library, err = wamqp.NewPublisherWithConnection(s.cfg.library("", amqpMarshaler{link.touch}, s), link.log, link.wrapper)
		if err != nil {
			return err
		}
		// The pool hands its channels out in turn, and shows each to the
		// topology builder for a topic that is new to it.
		for i := range amqpPool {
			if err := s.library.Publish(strconv.Itoa(i)); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for range amqpPool {
		s.workers.Go(s.work)
	}
	return s, nil
}

// work publishes one message after the other. It is not the caller who does: the
// library cannot be told to stop waiting, only be left alone. And a goroutine
// that lasts has grown its stack once and for all.
func (s *amqpSender) work() {
	for {
		select {
		case job := <-s.jobs:
			job.done <- s.link.do(func() error { return s.send(job) })
		case <-s.link.lost:
			return
		}
	}
}

// ExchangeDeclare implements wamqp.TopologyBuilder. It declares nothing, which
// is done before; it is how the channels of the library's pool are met.
func (s *amqpSender) ExchangeDeclare(channel *amqp.Channel, _ string, _ wamqp.Config) error {
	if len(s.channels) < amqpPool {
		s.channels = append(s.channels, channel)
		// Room for more than one: the library waits until there is some.
		s.returns = append(s.returns, channel.NotifyReturn(make(chan amqp.Return, 4)))
	}
	return nil
}

// BuildTopology implements wamqp.TopologyBuilder. Publishers do not call it.
func (s *amqpSender) BuildTopology(*amqp.Channel, wamqp.BuildTopologyParams, wamqp.Config, watermill.LoggerAdapter) error {
	return nil
}

// publish waits until msg is confirmed, refused, the link is lost or ctx ends.
func (s *amqpSender) publish(ctx context.Context, topic string, msg *message.Message) error {
	number := strconv.FormatInt(s.sequence.Add(1), 10)
	made, err := marshal(msg, number)
	if err != nil {
		return err
	}
	job := &amqpJob{topic: topic, number: number, msg: &message.Message{UUID: msg.UUID}, done: make(chan error, 1)}
	job.msg.SetContext(context.WithValue(context.WithoutCancel(ctx), publishingKey{}, made))
	select {
	case s.jobs <- job:
	case <-s.link.lost:
		return s.link.err()
	case <-ctx.Done():
		return ctx.Err()
	}
	select {
	case err := <-job.done:
		if err == nil {
			s.timeouts.Store(0)
		}
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// timedOut gives up a link on which nothing is confirmed any more, unless the
// broker has said why. It is called once for all messages of a call.
func (s *amqpSender) timedOut() {
	if s.link.blocked() != nil {
		return
	}
	if s.link.silent() || s.timeouts.Add(1) >= publishTimeouts {
		s.link.fail(fmt.Errorf("%w: the broker does not confirm", errLinkLost))
	}
}

func (s *amqpSender) send(job *amqpJob) error {
	topic := job.topic
	if err := s.ensure(topic); err != nil {
		return s.failure(err)
	}
	for range 2 {
		if err := s.library.Publish(topic, job.msg); err != nil {
			return s.failure(err)
		}
		if !s.cameBack(job.number) {
			return nil
		}
		// No queue took it: they are gone, or nobody is known to want it.
		if len(s.groups(topic)) == 0 {
			return ErrNoSubscriber
		}
		select {
		case <-time.After(mourning):
		case <-s.link.lost:
		}
		if err := s.declare(topic); err != nil {
			return s.failure(err)
		}
	}
	return errors.New("no queue takes the message")
}

// failure says what the library's error means. When the broker closed a channel
// of the pool, because an exchange is gone, the pool cannot be trusted any more.
func (s *amqpSender) failure(err error) error {
	if isClosed(s.link.lost) {
		return s.link.err()
	}
	for _, channel := range s.channels {
		if channel.IsClosed() {
			s.link.fail(fmt.Errorf("%w: the broker closed a channel: %w", errLinkLost, err))
			return s.link.err()
		}
	}
	return err
}

// cameBack reports whether the publishing of this number was returned. The
// notice comes before the confirmation, though maybe to another goroutine here.
func (s *amqpSender) cameBack(number string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, returns := range s.returns {
		for len(returns) > 0 { // nobody else receives
			s.returned[(<-returns).CorrelationId] = true
		}
	}
	came := s.returned[number]
	delete(s.returned, number)
	return came
}

// ensure declares a topic that is not in the topology, once.
func (s *amqpSender) ensure(topic string) error {
	s.mu.Lock()
	declared := s.declared[topic]
	s.mu.Unlock()
	if declared {
		return nil
	}
	return s.declare(topic)
}

func (s *amqpSender) declare(topic string) error {
	if err := s.cfg.declare(s.link.wrapper.Connection(), topic, s.groups(topic)...); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.declared[topic] = true
	return nil
}
