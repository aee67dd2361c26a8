package pubsub_test

import (
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
	"sluice/platform/pubsub"
)

func amqpBroker() durableBroker {
	return durableBroker{
		name:   pubsub.BackendAMQP,
		config: func(t *testing.T) pubsub.Config { return amqpConfig(t) },
		upstream: func(cfg pubsub.Config) string {
			u, _ := url.Parse(cfg.AMQP.URL)
			return u.Host
		},
		through: func(cfg pubsub.Config, proxy *services.Proxy) pubsub.Config {
			cfg.AMQP.URL = proxy.Rewrite(cfg.AMQP.URL)
			return cfg
		},
		impatient: func(cfg pubsub.Config, timeout time.Duration) pubsub.Config {
			cfg.AMQP.Timeout = timeout
			return cfg
		},
		waiting: func(t *testing.T, cfg pubsub.Config, topic, group string) int {
			var waiting int
			onChannel(t, cfg.AMQP, func(ch *amqp.Channel) {
				queue, err := ch.QueueDeclarePassive(queueName(cfg.AMQP, topic, group), true, false, false, false, nil)
				require.NoError(t, err)
				waiting = queue.Messages
			})
			return waiting
		},
		purge: func(t *testing.T, cfg pubsub.Config, topic, group string) {
			onChannel(t, cfg.AMQP, func(ch *amqp.Channel) {
				_, err := ch.QueuePurge(queueName(cfg.AMQP, topic, group), false)
				require.NoError(t, err)
			})
		},
		remove: func(t *testing.T, cfg pubsub.Config, topic, group string) {
			onChannel(t, cfg.AMQP, func(ch *amqp.Channel) {
				_, err := ch.QueueDelete(queueName(cfg.AMQP, topic, group), false, false, false)
				require.NoError(t, err)
			})
		},
	}
}

// amqpConfig is a RabbitMQ with nothing under the prefix. What the tests of this
// package declare is deleted at the end.
func amqpConfig(t testing.TB) pubsub.Config {
	t.Helper()
	address, prefix := services.AMQP(t)
	cfg := pubsub.DefaultConfig()
	cfg.Backend = pubsub.BackendAMQP
	cfg.AMQP.URL, cfg.AMQP.Prefix = address, prefix
	t.Cleanup(func() { deleteAll(t, cfg.AMQP) })
	return cfg
}

func deleteAll(t testing.TB, cfg pubsub.AMQPConfig) {
	t.Helper()
	topics := []string{"topic", "other topic", "busy", "quiet", "another topic", "orders", "outcomes", "drained topic", "poison"}
	groups := []string{"g", "first", "second", "dispatch", "intake", "drained", "poison"}
	onChannel(t, cfg, func(ch *amqp.Channel) {
		for _, topic := range topics {
			require.NoError(t, ch.ExchangeDelete(cfg.Prefix+"."+topic, false, false))
			for _, group := range groups {
				_, err := ch.QueueDelete(queueName(cfg, topic, group), false, false, false)
				require.NoError(t, err)
			}
		}
	})
}

func queueName(cfg pubsub.AMQPConfig, topic, group string) string {
	return cfg.Prefix + "." + topic + ":" + group
}

func onChannel(t testing.TB, cfg pubsub.AMQPConfig, f func(*amqp.Channel)) {
	t.Helper()
	conn, err := amqp.Dial(cfg.URL)
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close()) }()
	ch, err := conn.Channel()
	require.NoError(t, err)
	f(ch)
}

func TestAMQPConfig(t *testing.T) {
	valid := func() pubsub.Config {
		cfg := pubsub.DefaultConfig()
		cfg.Backend = pubsub.BackendAMQP
		return cfg
	}
	require.NoError(t, valid().Validate())

	t.Run("all faults are told at once, without the password", func(t *testing.T) {
		cfg := valid()
		cfg.AMQP = pubsub.AMQPConfig{URL: "http://user:hunter2@host", Prefix: "amq.x", QueueType: "mirrored", Timeout: -1, TLSCert: "cert.pem"}
		require.EqualError(t, cfg.Validate(), strings.Join([]string{
			"pubsub.amqp.url: must be an address such as amqp://user:password@host:5672/vhost, or amqps://",
			`pubsub.amqp.prefix: must have 1 to 100 bytes and not begin with amq., is "amq.x"`,
			`pubsub.amqp.queue_type: must be one of classic, quorum, is "mirrored"`,
			"pubsub.amqp.timeout: must be above 0s and at most 10s, is -1ns",
			"pubsub.amqp.tls_cert: needs pubsub.amqp.tls_key, and the other way round",
			"pubsub.amqp.url: must begin with amqps:// where a file for TLS is given",
		}, "\n"))
	})

	t.Run("files that cannot be used are errors at once", func(t *testing.T) {
		cfg := valid()
		cfg.AMQP.URL, cfg.AMQP.TLSCA = "amqps://127.0.0.1:1/", filepath.Join(t.TempDir(), "missing.pem")
		require.NoError(t, cfg.Validate())
		_, err := pubsub.Open(t.Context(), cfg, nil, slog.New(slog.DiscardHandler))
		require.ErrorContains(t, err, "pubsub.amqp.tls_ca: ")

		require.NoError(t, os.WriteFile(cfg.AMQP.TLSCA, []byte("no certificate"), 0o600))
		_, err = pubsub.Open(t.Context(), cfg, nil, slog.New(slog.DiscardHandler))
		require.ErrorContains(t, err, "no certificate in ")
	})
}

// What no waiting can mend is an error at once.
func TestAMQPRefusedAtTheStart(t *testing.T) {
	refused := func(t *testing.T, cfg pubsub.Config, topology pubsub.Topology, want string) {
		t.Helper()
		log := new(logBuffer)
		_, err := pubsub.Open(t.Context(), cfg, topology, slog.New(slog.NewTextHandler(log, nil)))
		require.ErrorContains(t, err, want)
		require.NotContains(t, err.Error(), "hunter2")
		require.Empty(t, log.String(), "logged or returned, not both")
	}

	t.Run("a wrong password", func(t *testing.T) {
		cfg := amqpConfig(t)
		cfg.AMQP.URL = strings.Replace(cfg.AMQP.URL, "guest:guest", "guest:hunter2", 1)
		refused(t, cfg, nil, "username or password not allowed")
	})

	t.Run("a virtual host that is not there", func(t *testing.T) {
		cfg := amqpConfig(t)
		cfg.AMQP.URL += "nowhere"
		refused(t, cfg, nil, "nowhere")
	})

	t.Run("a queue that exists with another type", func(t *testing.T) {
		cfg := amqpConfig(t)
		topology := pubsub.Topology{"topic": {"g"}}
		require.NoError(t, open(t, cfg, topology).Close())
		cfg.AMQP.QueueType = pubsub.QueueClassic
		refused(t, cfg, topology, "topic:g")
	})
}

func TestAMQPClassicQueues(t *testing.T) {
	cfg := amqpConfig(t)
	cfg.AMQP.QueueType = pubsub.QueueClassic
	p := open(t, cfg, nil)
	out := subscribe(t, p.Subscriber("g", 2), "topic")
	publishMany(t, p, "topic", 1)
	receive(t, out).Nack()
	msg := receive(t, out)
	require.True(t, pubsub.Redelivered(msg))
	msg.Ack()
}

// Trap: a marshaler that refuses a header has the message requeued at once and
// for ever.
func TestAMQPTakesMessagesOfOthers(t *testing.T) {
	cfg := amqpConfig(t)
	p := open(t, cfg, nil)
	out := subscribe(t, p.Subscriber("g", 1), "topic")
	onChannel(t, cfg.AMQP, func(ch *amqp.Channel) {
		require.NoError(t, ch.PublishWithContext(t.Context(), cfg.AMQP.Prefix+".topic", "any", false, false, amqp.Publishing{
			MessageId: "theirs",
			Headers: amqp.Table{"text": "text", "bytes": []byte("bytes"), "number": int64(7), "yes": true, "nothing": nil,
				"x-death": []any{amqp.Table{"count": int64(1)}}},
			Body: []byte("payload"),
		}))
	})
	msg := receive(t, out)
	require.Equal(t, "theirs", msg.UUID)
	require.Equal(t, "payload", string(msg.Payload))
	require.Equal(t, message.Metadata{"text": "text", "bytes": "bytes", "number": "7", "yes": "true", "nothing": "<nil>",
		"x-death": "[map[count:1]]"}, msg.Metadata)
	msg.Ack()
}

// Trap: what passes a limit of the protocol costs the connection.
func TestAMQPRefusesWhatTheProtocolCannotCarry(t *testing.T) {
	p := open(t, amqpConfig(t), nil)
	out := subscribe(t, p.Subscriber("g", 1), "topic")
	for _, metadata := range []message.Metadata{
		{strings.Repeat("k", 256): "long key"},
		{"key": strings.Repeat("v", 200_000)},
	} {
		msg := newMessage("1", "")
		msg.Metadata = metadata
		require.ErrorContains(t, p.Publisher().Publish("topic", msg), "bytes")
	}
	large := newMessage("large", strings.Repeat("x", 5<<20))
	require.NoError(t, p.Publisher().Publish("topic", large))
	msg := receive(t, out)
	require.True(t, large.Equals(msg))
	msg.Ack()
}

// Trap: the broker confirms what no queue takes.
func TestAMQPSaysWhenNobodyTakesAMessage(t *testing.T) {
	cfg := amqpConfig(t)
	p := open(t, cfg, pubsub.Topology{"topic": {"g"}})
	require.ErrorIs(t, p.Publisher().Publish("orders", newMessage("1", "")), pubsub.ErrNoSubscriber)

	broker := amqpBroker()
	t.Run("and makes a known queue again", func(t *testing.T) {
		broker.remove(t, cfg, "topic", "g")
		publishMany(t, p, "topic", 200)
		require.Equal(t, 200, broker.waiting(t, cfg, "topic", "g"))
	})

	t.Run("and a known exchange", func(t *testing.T) {
		onChannel(t, cfg.AMQP, func(ch *amqp.Channel) {
			require.NoError(t, ch.ExchangeDelete(cfg.AMQP.Prefix+".topic", false, false))
		})
		publishMany(t, p, "topic", 200)
		require.GreaterOrEqual(t, broker.waiting(t, cfg, "topic", "g"), 400)
	})
}

// A broker of its own may be stopped, killed and blocked.
func TestAMQPOutages(t *testing.T) {
	if testing.Short() {
		t.Skip("starts a RabbitMQ")
	}
	broker := services.OwnRabbitMQ(t)
	cfg := pubsub.DefaultConfig()
	cfg.Backend = pubsub.BackendAMQP
	cfg.AMQP.URL, cfg.AMQP.Timeout = broker.URL, 2*time.Second
	topology := pubsub.Topology{"topic": {"g"}}
	log := new(logBuffer)
	p, err := pubsub.Open(t.Context(), cfg, topology, slog.New(slog.NewTextHandler(log, nil)))
	require.NoError(t, err)
	t.Cleanup(func() { require.NoError(t, p.Close()) })
	out := subscribe(t, p.Subscriber("g", 64), "topic")
	healthy := func() bool { return p.Health(t.Context()) == nil }
	collect := func(n int) {
		t.Helper()
		seen := make(map[string]bool)
		for len(seen) < n {
			seen[receiveAcked(t, out)] = true
		}
	}

	t.Run("stopped and started", func(t *testing.T) {
		publishMany(t, p, "topic", 200)
		broker.Control("stop_app")
		require.Error(t, p.Health(t.Context()))
		broker.Control("start_app")
		collect(200)
		require.Eventually(t, healthy, patience, time.Millisecond)
		require.LessOrEqual(t, log.lines(), 6, log.String())
	})

	t.Run("killed and started", func(t *testing.T) {
		publishMany(t, p, "topic", 200)
		broker.Kill()
		require.Eventually(t, func() bool { return !healthy() }, patience, time.Millisecond)
		require.Error(t, p.Publisher().Publish("topic", newMessage("1", "")))
		broker.Start()
		collect(200)
		require.Eventually(t, healthy, patience, time.Millisecond)
	})

	t.Run("short of memory", func(t *testing.T) {
		publishMany(t, p, "topic", 200)
		broker.Control("set_vm_memory_high_watermark", "0")
		// The alarm takes a moment, and the broker tells those who publish.
		require.Eventually(t, func() bool { return p.Publisher().Publish("topic", newMessage("1", "")) != nil }, patience, time.Millisecond)
		began := time.Now()
		require.ErrorContains(t, p.Publisher().Publish("topic", newMessage("2", "")), "low on memory")
		require.Less(t, time.Since(began), time.Second, "the reason is known")
		require.ErrorContains(t, p.Health(t.Context()), "low on memory")
		collect(200) // acks go on

		broker.Control("set_vm_memory_high_watermark", "0.6")
		require.Eventually(t, healthy, patience, time.Millisecond)
		require.NoError(t, p.Publisher().Publish("topic", newMessage("after", "")))
		for receiveAcked(t, out) != "after" {
		}
	})
}
