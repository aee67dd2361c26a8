package pubsub

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"sync"
	"sync/atomic"
	"time"

	wamqp "github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	"github.com/ThreeDotsLabs/watermill/message"
)

const (
	// amqpLanes is the most subscriptions of the library on one connection.
	// RabbitMQ allows 2047 channels; each takes a second one for a moment.
	amqpLanes = 1000
	// longestHold is how long a message may wait here for the consumer to take
	// it. RabbitMQ closes the channel of one that is not acked for 30 minutes.
	longestHold = 10 * time.Minute
)

// spareLanes is how many subscriptions there are beyond those that the consumer
// keeps busy. Their messages are at hand when a slot becomes free, without a
// round trip to the broker. A larger prefetch does the same, but ties messages
// to a subscription that may be busy for long while others are idle.
func spareLanes(maxInFlight int) int { return (maxInFlight + 3) / 4 }

// amqpSource is a group's subscription to a topic: as many of the library's
// subscriptions, each with one message at a time, as the consumer takes
// messages, merged into one channel.
type amqpSource struct {
	broker *amqpBroker
	group  string
	topic  string
	ctx    context.Context // the consumer's, which its messages get
	out    chan *message.Message

	drained chan struct{} // closed by drain: nothing more is taken
	once    sync.Once
}

var subscriptions atomic.Int64 // names connections

// subscribe returns when the group's queue exists and keeps messages. It waits
// for a lost connection to come back, but not for long.
func (b *amqpBroker) subscribe(ctx context.Context, d demand) (<-chan *message.Message, source, error) {
	b.expect(d.topic, d.group)
	s := &amqpSource{broker: b, group: d.group, topic: d.topic, ctx: ctx,
		out: make(chan *message.Message), drained: make(chan struct{})}
	name := fmt.Sprintf("%s to %s %d", d.group, d.topic, subscriptions.Add(1))
	ready, refused := make(chan struct{}), make(chan error, 1)
	isReady := sync.OnceFunc(func() { close(ready) })
	for lanes := d.maxInFlight + spareLanes(d.maxInFlight); lanes > 0; lanes -= amqpLanes {
		share := min(lanes, amqpLanes)
		name := fmt.Sprintf("%s.%d", name, lanes)
		b.goroutines.Go(func() {
			err := b.keep(b.background, name, func(ctx context.Context, link *amqpLink) error {
				return s.consume(ctx, link, name, share, isReady)
			}, func(err error) bool { return isClosed(s.drained) || !isClosed(ready) && !curable(err) })
			if err != nil {
				select {
				case refused <- err:
				default:
				}
			}
		})
	}
	timer := time.NewTimer(b.cfg.Timeout)
	defer timer.Stop()
	var err error
	select {
	case <-ready:
		return s.out, s, nil
	case err = <-refused:
	case <-ctx.Done():
		err = ctx.Err()
	case <-b.closing:
		err = ErrClosed
	case <-timer.C:
		err = errors.Join(errors.New("the broker does not answer"), b.status.err())
	}
	s.drain()
	return nil, nil, err
}

// consume has messages taken on a link. It returns nil when nothing more shall
// be taken and all that was taken is settled, and an error when the link is lost.
func (s *amqpSource) consume(ctx context.Context, link *amqpLink, name string, lanes int, ready func()) error {
	err := link.do(func() error {
		return s.broker.cfg.declare(link.wrapper.Connection(), s.topic, s.group)
	})
	if err != nil {
		link.close(false)
		return err
	}
	s.broker.status.up(name, link)
	ready()
	var all sync.WaitGroup
	for range lanes {
		all.Go(func() { s.lane(ctx, link) })
	}
	settled := make(chan struct{})
	go func() { defer close(settled); all.Wait() }()
	select {
	case <-settled:
	case <-link.lost:
	case <-ctx.Done():
		// The library's subscriptions end before its connection does: they
		// read without a lock what the end of the connection changes.
		select {
		case <-settled:
		case <-link.lost:
		case <-time.After(amqpFarewell):
			link.fail(fmt.Errorf("%w: the broker does not answer", errLinkLost))
		}
	}
	err = link.err()
	link.close(err == nil)
	<-settled
	return err
}

// lane is one subscription of the library.
func (s *amqpSource) lane(ctx context.Context, link *amqpLink) {
	var library *wamqp.Subscriber
	var in <-chan *message.Message
	err := link.do(func() (err error) {
		topology := &lateTopology{cfg: s.broker.cfg, group: s.group, connection: link.wrapper.Connection()}
		library, err = wamqp.NewSubscriberWithConnection(s.broker.cfg.library(s.group, amqpMarshaler{link.touch}, topology), link.log, link.wrapper)
		if err != nil {
			return err
		}
		// Not the consumer's context: the library's message must keep its own
		// until the ack is written.
		in, err = library.Subscribe(context.WithoutCancel(s.ctx), s.topic)
		return err
	})
	if err != nil {
		link.fail(fmt.Errorf("%w: subscribe: %w", errLinkLost, err))
		return
	}
	s.forward(ctx, in)
	var closing sync.WaitGroup
	closing.Go(func() { _ = library.Close() }) // which waits for who sends to in
	for msg := range in {
		msg.Nack()
	}
	closing.Wait()
}

// forward offers the library's messages to the consumer, until nothing more
// shall be taken or the library stops.
func (s *amqpSource) forward(ctx context.Context, in <-chan *message.Message) {
	hold := time.NewTimer(longestHold)
	defer hold.Stop()
	for {
		select {
		case msg, ok := <-in:
			if !ok {
				return
			}
			settled := msg.Context().Done() // asked for now, since receive changes it
			hold.Reset(longestHold)
			select {
			case s.out <- msg:
				select {
				case <-settled:
				case <-ctx.Done():
					return
				}
			case <-hold.C:
				msg.Nack()
			case <-settled: // the link is lost
			case <-s.drained:
				msg.Nack()
				return
			case <-ctx.Done():
				msg.Nack()
				return
			}
		case <-s.drained:
			return
		case <-ctx.Done():
			return
		}
	}
}

func (s *amqpSource) receive(msg *message.Message) delivery {
	number, _ := strconv.Atoi(msg.Metadata.Get(keyDelivery))
	delete(msg.Metadata, keyDelivery)
	delete(msg.Metadata, wamqp.MetadataRedeliveredKey)
	settled := msg.Context().Done()
	d := delivery{msg: msg, number: number, settled: settled, lost: func() bool { return isClosed(settled) }}
	msg.SetContext(s.ctx)
	return d
}

func (s *amqpSource) ack(d delivery) {
	d.msg.Ack()
	s.wait(d)
}

func (s *amqpSource) nack(d delivery) {
	d.msg.Nack()
	s.wait(d)
}

// release is a nack: RabbitMQ counts what it has sent, whether or not anybody
// took it.
func (s *amqpSource) release(d delivery) { s.nack(d) }

// wait returns when the answer has been handed to the connection, which writes
// before it closes, or has nowhere to go any more. At the end it does not wait
// for a connection that takes nothing.
func (s *amqpSource) wait(d delivery) {
	select {
	case <-d.settled:
		return
	case <-s.broker.closing:
	}
	farewell := time.NewTimer(amqpFarewell)
	defer farewell.Stop()
	select {
	case <-d.settled:
	case <-farewell.C:
	}
}

// drain gives back what no consumer has taken.
func (s *amqpSource) drain() { s.once.Do(func() { close(s.drained) }) }

func (s *amqpSource) close() { s.drain() }
