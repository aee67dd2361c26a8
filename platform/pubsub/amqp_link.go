package pubsub

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ThreeDotsLabs/watermill"
	wamqp "github.com/ThreeDotsLabs/watermill-amqp/v3/pkg/amqp"
	amqp "github.com/rabbitmq/amqp091-go"
)

const (
	// amqpHeartbeat is how often a sign of life is due from either side. The
	// library gives a connection up after three of them without one.
	amqpHeartbeat = 5 * time.Second
	// A connection that was lost is made again after a pause that doubles from
	// firstRedial to lastRedial.
	firstRedial = 50 * time.Millisecond
	lastRedial  = 3 * time.Second
	// amqpFarewell bounds how long the broker may take to let go in good order.
	amqpFarewell = 2 * time.Second
)

// errLinkLost is wrapped by what fails because its connection has ended.
var errLinkLost = errors.New("connection lost")

// amqpLink is one connection, from its making to its end.
//
// Watermill's ConnectionWrapper can reconnect by itself. That is not used: while
// it does, it replaces a channel that its Publisher and Subscriber read without
// a lock; it cannot be closed before the broker is back; and its Publisher's
// pool loses channels. A link lives as long as its connection and is then
// replaced by a new one, wrapper, Publisher, Subscribers and all.
type amqpLink struct {
	wrapper *wamqp.ConnectionWrapper
	conn    *amqpConn
	log     watermill.LoggerAdapter
	lost    chan struct{} // closed by fail

	gate    sync.RWMutex // held for reading while a call is in the library
	touched atomic.Int64 // see touch

	mu        sync.Mutex
	reason    error  // why it was lost
	blockedBy string // why the broker takes no messages, "" if it does
}

// connect makes a connection. It takes no longer than the time limit, and gives
// up with ctx, also in the middle of the handshake.
func (b *amqpBroker) connect(ctx context.Context, purpose string) (*amqpLink, error) {
	ctx, cancel := context.WithTimeout(ctx, b.cfg.Timeout)
	defer cancel()
	properties := amqp.NewConnectionProperties()
	properties.SetClientConnectionName("sluice " + purpose)
	link := &amqpLink{lost: make(chan struct{})}
	link.log = &amqpLog{LoggerAdapter: Logger(b.logger), link: link, said: make(map[string]time.Time)}
	stop := func() bool { return true }
	wrapper, err := wamqp.NewConnection(wamqp.ConnectionConfig{
		AmqpURI: b.uri,
		AmqpConfig: &amqp.Config{
			Heartbeat:  amqpHeartbeat,
			Properties: properties,
			Dial: func(_, address string) (net.Conn, error) {
				if link.conn != nil {
					// The library is about to reconnect, on a goroutine
					// that has nothing else to do and would not end.
					link.fail(errLinkLost)
					runtime.Goexit()
				}
				conn, err := link.dial(ctx, address, b.tls)
				if err == nil {
					stop = context.AfterFunc(ctx, link.conn.cut)
				}
				return conn, err
			},
		},
	}, link.log)
	stop()
	if err != nil {
		if link.conn != nil {
			link.conn.cut()
			link.conn.wait()
		}
		return nil, err
	}
	link.wrapper = wrapper
	go link.watchBlocked(wrapper.Connection().NotifyBlocked(make(chan amqp.Blocking, 1)))
	return link, nil
}

func (l *amqpLink) dial(ctx context.Context, address string, config *tls.Config) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	if deadline, ok := ctx.Deadline(); ok {
		_ = conn.SetDeadline(deadline) // the library lifts it after its handshake
	}
	if config != nil {
		secured := tls.Client(conn, config)
		if err := secured.HandshakeContext(ctx); err != nil {
			_ = conn.Close()
			return nil, err
		}
		conn = secured
	}
	l.conn = newAMQPConn(conn, l)
	return l.conn, nil
}

// watchBlocked ends with the connection.
func (l *amqpLink) watchBlocked(notices <-chan amqp.Blocking) {
	for notice := range notices {
		l.mu.Lock()
		l.blockedBy = ""
		if notice.Active {
			l.blockedBy = notice.Reason
		}
		l.mu.Unlock()
	}
}

// blocked returns an error while the broker takes no messages.
func (l *amqpLink) blocked() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.blockedBy == "" {
		return nil
	}
	return fmt.Errorf("the broker takes no messages: %s", l.blockedBy)
}

// do calls f, which calls the library, unless the link has ended.
func (l *amqpLink) do(f func() error) error {
	if isClosed(l.lost) {
		return l.err()
	}
	l.gate.RLock()
	defer l.gate.RUnlock()
	if isClosed(l.lost) {
		return l.err()
	}
	return f()
}

// touch is called on the goroutines that use the library, after they have read
// its state, and fail before the library changes that state: the order that the
// library itself does not establish.
func (l *amqpLink) touch() { l.touched.Add(1) }

// fail ends the link for all who use it; whoever keeps it closes it then.
func (l *amqpLink) fail(reason error) {
	l.touched.Load()
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.reason == nil {
		l.reason = reason
		close(l.lost)
	}
}

func (l *amqpLink) err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.reason
}

// close ends the connection and returns when nothing of it is left. Gracefully
// means that what was written before reaches the broker, if it listens.
func (l *amqpLink) close(graceful bool) {
	l.fail(errLinkLost)
	if graceful {
		cut := time.AfterFunc(amqpFarewell, l.conn.cut)
		defer cut.Stop()
	} else {
		l.conn.cut()
	}
	l.gate.Lock() // until the calls that are in the library are out of it
	defer l.gate.Unlock()
	_ = l.wrapper.Close()
	l.conn.cut()
	l.conn.wait()
}

// silent reports whether the broker has said nothing for longer than it may.
func (l *amqpLink) silent() bool {
	return time.Since(time.Unix(0, l.conn.heard.Load())) > amqpHeartbeat
}

// keep makes a connection, has it used, and makes another one when use returns
// an error, until use returns nil, ctx ends, or giveUp says so.
func (b *amqpBroker) keep(ctx context.Context, name string, use func(context.Context, *amqpLink) error, giveUp func(error) bool) error {
	defer b.status.forget(name)
	for pause := firstRedial; ; pause = min(2*pause, lastRedial) {
		link, err := b.connect(ctx, name)
		if err == nil {
			began := time.Now()
			err = use(ctx, link)
			if err == nil {
				return nil
			}
			if time.Since(began) > lastRedial {
				pause = firstRedial
			}
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if giveUp(err) {
			return err
		}
		b.status.down(name, err)
		select {
		case <-time.After(pause/2 + rand.N(pause)):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// amqpStatus knows which connections there are, and logs an outage once, however
// many of them it takes.
type amqpStatus struct {
	logger  *slog.Logger
	address string // host, port and virtual host

	mu    sync.Mutex
	links map[string]*amqpLink // by name
	downs map[string]error     // why a connection is not there
}

func (s *amqpStatus) down(name string, reason error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.downs) == 0 {
		s.logger.Warn("no connection to the message broker, trying until there is one", "address", s.address, "error", reason)
		s.downs = make(map[string]error)
	}
	s.downs[name] = reason
	delete(s.links, name)
}

func (s *amqpStatus) up(name string, link *amqpLink) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.links == nil {
		s.links = make(map[string]*amqpLink)
	}
	s.links[name] = link
	if _, was := s.downs[name]; !was {
		return
	}
	delete(s.downs, name)
	if len(s.downs) == 0 {
		s.logger.Info("connected to the message broker again", "address", s.address)
	}
}

// forget is for a connection that is not wanted any more.
func (s *amqpStatus) forget(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.links, name)
	delete(s.downs, name)
}

func (s *amqpStatus) err() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, name := range slices.Sorted(maps.Keys(s.downs)) {
		return fmt.Errorf("no connection to %s: %w", s.address, s.downs[name])
	}
	for _, name := range slices.Sorted(maps.Keys(s.links)) {
		link := s.links[name]
		switch blocked := link.blocked(); {
		case blocked != nil:
			return blocked
		case isClosed(link.lost):
			return fmt.Errorf("no connection to %s: %w", s.address, link.err())
		case link.silent():
			return fmt.Errorf("%s does not answer", s.address)
		}
	}
	return nil
}

// amqpLog keeps an outage from being told once for each channel: after the end
// of the link, which is logged elsewhere, errors are news for debugging only,
// and before it, each kind is told once in a while.
type amqpLog struct {
	watermill.LoggerAdapter
	link *amqpLink

	mu   sync.Mutex
	said map[string]time.Time
}

const sayAgain = 10 * time.Second

func (l *amqpLog) Error(msg string, err error, fields watermill.LogFields) {
	if isClosed(l.link.lost) || l.repeats(msg) {
		l.Debug(msg, fields.Add(watermill.LogFields{"error": err}))
		return
	}
	l.LoggerAdapter.Error(msg, err, fields)
}

func (l *amqpLog) repeats(msg string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	if time.Since(l.said[msg]) < sayAgain {
		return true
	}
	l.said[msg] = time.Now()
	return false
}

// With implements watermill.LoggerAdapter.
func (l *amqpLog) With(watermill.LogFields) watermill.LoggerAdapter { return l }
