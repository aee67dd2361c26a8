package pubsub

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"
	"golang.org/x/sync/errgroup"
)

// BackendAMQP is RabbitMQ: messages outlive the process, and any number of
// processes share the work of a consumer group.
const BackendAMQP = "amqp"

// Types of queue.
const (
	QueueQuorum  = "quorum"
	QueueClassic = "classic"
)

// AMQPConfig holds the settings of the backend "amqp".
type AMQPConfig struct {
	// URL is the broker's address, amqp:// or amqps://, with user, password and
	// virtual host. Default: amqp://guest:guest@localhost:5672/.
	URL string `koanf:"url"`
	// Prefix begins the names of all exchanges and queues. Default: sluice.
	Prefix string `koanf:"prefix"`
	// QueueType is quorum, which survives the loss of a broker node, or
	// classic. It cannot be changed while the queues exist. Default: quorum.
	QueueType string `koanf:"queue_type"`
	// Timeout bounds a publish, from the call to the broker's confirmation, and
	// the making of a connection. Default: 10s.
	Timeout time.Duration `koanf:"timeout"`
	// TLSCA is a PEM file with the authorities that the broker's certificate
	// is checked against, for amqps. Default: those of the system.
	TLSCA string `koanf:"tls_ca"`
	// TLSCert and TLSKey are PEM files with which the client shows who it is,
	// for amqps. Default: none.
	TLSCert string `koanf:"tls_cert"`
	TLSKey  string `koanf:"tls_key"`
}

func defaultAMQPConfig() AMQPConfig {
	return AMQPConfig{
		URL:       "amqp://guest:guest@localhost:5672/",
		Prefix:    "sluice",
		QueueType: QueueQuorum,
		Timeout:   10 * time.Second,
	}
}

var errUnconfirmed = errors.New("not confirmed by the broker")

// longestPrefix leaves most of the 255 bytes of an AMQP name to topic and group.
const longestPrefix = 100

// validate returns every fault at once, or nil. Errors do not repeat the URL,
// which may hold a password.
func (c AMQPConfig) validate() error {
	var faults []error
	fault := func(key, format string, args ...any) {
		faults = append(faults, fmt.Errorf("pubsub.amqp.%s: %s", key, fmt.Sprintf(format, args...)))
	}
	if _, err := amqp.ParseURI(c.URL); err != nil {
		fault("url", "must be an address such as amqp://user:password@host:5672/vhost, or amqps://")
	}
	if c.Prefix == "" || len(c.Prefix) > longestPrefix || strings.HasPrefix(c.Prefix, "amq.") {
		fault("prefix", "must have 1 to %d bytes and not begin with amq., is %q", longestPrefix, c.Prefix)
	}
	if types := []string{QueueClassic, QueueQuorum}; !slices.Contains(types, c.QueueType) {
		fault("queue_type", "must be one of %s, is %q", strings.Join(types, ", "), c.QueueType)
	}
	if c.Timeout <= 0 || c.Timeout > longestPublish {
		fault("timeout", "must be above 0s and at most 10s, is %s", c.Timeout)
	}
	if (c.TLSCert == "") != (c.TLSKey == "") {
		fault("tls_cert", "needs pubsub.amqp.tls_key, and the other way round")
	}
	if c.TLSCA+c.TLSCert+c.TLSKey != "" && !c.encrypted() {
		fault("url", "must begin with amqps:// where a file for TLS is given")
	}
	return errors.Join(faults...)
}

// encrypted reports whether the URL asks for TLS. Schemes may be in capitals
// (RFC 3986, section 3.1).
func (c AMQPConfig) encrypted() bool {
	scheme, _, _ := strings.Cut(c.URL, ":")
	return strings.EqualFold(scheme, "amqps")
}

// tls reads the files. It returns nil where the connection is not encrypted.
func (c AMQPConfig) tls(host string) (*tls.Config, error) {
	if !c.encrypted() {
		return nil, nil
	}
	config := &tls.Config{ServerName: host, MinVersion: tls.VersionTLS12}
	if c.TLSCA != "" {
		pem, err := os.ReadFile(c.TLSCA)
		if err != nil {
			return nil, fmt.Errorf("pubsub.amqp.tls_ca: %w", err)
		}
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("pubsub.amqp.tls_ca: no certificate in %s", c.TLSCA)
		}
	}
	if c.TLSCert != "" {
		pair, err := tls.LoadX509KeyPair(c.TLSCert, c.TLSKey)
		if err != nil {
			return nil, fmt.Errorf("pubsub.amqp.tls_cert, pubsub.amqp.tls_key: %w", err)
		}
		config.Certificates = []tls.Certificate{pair}
	}
	return config, nil
}

// amqpBroker is RabbitMQ through Watermill's AMQP Publisher and Subscriber, with
// connections that are replaced as a whole when they are lost.
//
// One connection publishes, and each subscription has at least one of its own:
// a broker that is short of memory or disk stops reading from connections that
// publish, and acks must go on.
type amqpBroker struct {
	cfg     AMQPConfig
	uri     string // for the library, always amqp://
	tls     *tls.Config
	closing <-chan struct{} // the PubSub's
	logger  *slog.Logger
	status  *amqpStatus

	// background is the life of the goroutines: it ends with close, not with
	// the context of whoever made them start.
	background context.Context
	cancel     context.CancelFunc
	goroutines sync.WaitGroup

	mu       sync.Mutex
	topology map[string][]string // groups by topic, those of Open and those that came later
	sender   *amqpSender         // nil while there is no connection to publish on
	changed  chan struct{}       // closed, and made anew, when sender changes
}

// openAMQP returns when the broker is connected and keeps the messages of the
// topology. It waits for a broker that is away until ctx ends; what waiting
// cannot mend, such as a wrong password, is an error at once.
func openAMQP(ctx context.Context, cfg AMQPConfig, topology Topology, closing <-chan struct{}, logger *slog.Logger) (*amqpBroker, error) {
	b, err := newAMQP(cfg, topology, closing, logger)
	if err != nil {
		return nil, err
	}
	ready, refused := make(chan struct{}), make(chan error, 1)
	b.goroutines.Go(func() {
		refused <- b.keep(b.background, "publish", b.publishOn(sync.OnceFunc(func() { close(ready) })), func(err error) bool {
			return !isClosed(ready) && !curable(err)
		})
	})
	select {
	case <-ready:
		return b, nil
	case err = <-refused:
	case <-ctx.Done():
		err = errors.Join(ctx.Err(), b.status.err())
	}
	_ = b.close()
	return nil, fmt.Errorf("connect to %s: %w", b.status.address, err)
}

func newAMQP(cfg AMQPConfig, topology Topology, closing <-chan struct{}, logger *slog.Logger) (*amqpBroker, error) {
	uri, err := amqp.ParseURI(cfg.URL)
	if err != nil {
		return nil, cfg.validate()
	}
	config, err := cfg.tls(uri.Host)
	if err != nil {
		return nil, err
	}
	b := &amqpBroker{
		cfg:      cfg,
		uri:      plainURI(cfg.URL),
		tls:      config,
		closing:  closing,
		logger:   logger,
		status:   &amqpStatus{logger: logger, address: fmt.Sprintf("%s:%d%s", uri.Host, uri.Port, vhost(uri))},
		topology: make(map[string][]string, len(topology)),
		changed:  make(chan struct{}),
	}
	for topic, groups := range topology {
		b.topology[topic] = slices.Clone(groups)
	}
	b.background, b.cancel = context.WithCancel(context.Background())
	return b, nil
}

// place names what has the messages: PubSub.Place.
func (b *amqpBroker) place() string {
	uri, _ := amqp.ParseURI(b.cfg.URL) // newAMQP did the same
	return fmt.Sprintf("%s %s %s", BackendAMQP, vhost(uri), b.cfg.Prefix)
}

func vhost(uri amqp.URI) string { return "/" + strings.TrimPrefix(uri.Vhost, "/") }

// plainURI is the URL as if there were no TLS, which amqpLink puts below the
// library, where it can see the frames.
func plainURI(address string) string {
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "amqps" {
		return address
	}
	u.Scheme = "amqp"
	if u.Port() == "" {
		u.Host = net.JoinHostPort(u.Hostname(), "5671")
	}
	return u.String()
}

// publish sends the messages together, each on a channel of the pool, and waits
// for the broker's word on every one. What a lost connection leaves in doubt is
// sent again on the next one, as long as the time limit lasts: a message can
// arrive twice so, but it is not lost.
func (b *amqpBroker) publish(topic string, msgs []*message.Message) error {
	err := b.publishAll(time.Now().Add(b.cfg.Timeout), topic, msgs)
	if errors.Is(err, errUnconfirmed) {
		b.mu.Lock()
		sender := b.sender
		b.mu.Unlock()
		sender.timedOut()
	}
	return err
}

func (b *amqpBroker) publishAll(deadline time.Time, topic string, msgs []*message.Message) error {
	if len(msgs) == 1 {
		return b.publishOne(deadline, topic, msgs[0])
	}
	var sending errgroup.Group
	sending.SetLimit(amqpPool)
	for _, msg := range msgs {
		sending.Go(func() error { return b.publishOne(deadline, topic, msg) })
	}
	return sending.Wait()
}

// confirm is publish: who has the broker's confirmation may forget the message.
func (b *amqpBroker) confirm(topic string, msgs []*message.Message) error {
	return b.publish(topic, msgs)
}

func (b *amqpBroker) publishOne(deadline time.Time, topic string, msg *message.Message) error {
	if isClosed(b.closing) {
		return fmt.Errorf("publish to %s: %w", topic, ErrClosed)
	}
	ctx, cancel := context.WithDeadline(msg.Context(), deadline)
	defer cancel()
	defer context.AfterFunc(b.background, cancel)()
	err := b.tryPublish(ctx, topic, msg)
	switch {
	case err == nil:
		return nil
	case isClosed(b.closing):
		err = ErrClosed
	case msg.Context().Err() != nil:
		err = msg.Context().Err()
	case ctx.Err() != nil:
		err = fmt.Errorf("%w within %s: %w", errUnconfirmed, b.cfg.Timeout, errors.Join(err, b.status.err()))
	}
	return fmt.Errorf("publish message %s to %s: %w", msg.UUID, topic, err)
}

// tryPublish goes on until the message is confirmed, refused, or ctx ends.
func (b *amqpBroker) tryPublish(ctx context.Context, topic string, msg *message.Message) error {
	for {
		sender, err := b.waitForSender(ctx)
		if err != nil {
			return err
		}
		err = sender.publish(ctx, topic, msg)
		if err == nil || !errors.Is(err, errLinkLost) {
			return err
		}
	}
}

// waitForSender returns the connection to publish on, once there is one that
// the broker does not block.
func (b *amqpBroker) waitForSender(ctx context.Context) (*amqpSender, error) {
	for {
		b.mu.Lock()
		sender, changed := b.sender, b.changed
		b.mu.Unlock()
		if sender != nil && !isClosed(sender.link.lost) {
			return sender, sender.link.blocked()
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (b *amqpBroker) setSender(sender *amqpSender) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.sender = sender
	close(b.changed)
	b.changed = make(chan struct{})
}

// expect adds a group to the topology: from now on its queue is made again
// wherever it is missed.
func (b *amqpBroker) expect(topic, group string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !slices.Contains(b.topology[topic], group) {
		b.topology[topic] = append(slices.Clone(b.topology[topic]), group)
	}
}

func (b *amqpBroker) groups(topic string) []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.topology[topic]
}

func (b *amqpBroker) topics() []string {
	b.mu.Lock()
	defer b.mu.Unlock()
	topics := make([]string, 0, len(b.topology))
	for topic := range b.topology {
		topics = append(topics, topic)
	}
	return topics
}

// health says what is known and asks nobody, so it never waits: the connections
// are watched by heartbeats.
func (b *amqpBroker) health(context.Context) error {
	if isClosed(b.closing) {
		return ErrClosed
	}
	return b.status.err()
}

func (b *amqpBroker) close() error {
	b.cancel()
	b.goroutines.Wait()
	return nil
}

// curable reports whether time can mend an error of a connection attempt.
func curable(err error) bool {
	var refusal *amqp.Error
	if !errors.As(err, &refusal) {
		var certificate *tls.CertificateVerificationError
		return !errors.As(err, &certificate)
	}
	switch refusal.Code {
	case amqp.AccessRefused, amqp.NotAllowed, amqp.PreconditionFailed, amqp.InvalidPath:
		return false
	default:
		return true
	}
}
