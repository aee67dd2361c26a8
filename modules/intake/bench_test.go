package intake

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"

	"sluice/e2e/services"
	"sluice/modules/contract"
	"sluice/platform/httpserver"
	"sluice/platform/pubsub"
)

// BenchmarkAccept measures 202s per second over HTTP from connections of another
// process: of the server that stores (SQLite, and PostgreSQL where there is
// one), and of the same server that reads, checks and answers an order and then
// forgets it. The rounds alternate, since the machine changes its pace. Each connection waits for its answer, and
// a durable one comes after a flush of the disk, so few connections measure the
// disk's latency and many the server.
//
//	go test -run '^$' -bench Accept -benchtime 1x ./modules/intake
func BenchmarkAccept(b *testing.B) {
	const orders, rounds = 40_000, 3
	for _, driver := range []string{DriverSQLite, DriverPostgres} {
		for _, connections := range []int{64, 256, 1024} {
			b.Run(fmt.Sprintf("store=%s/connections=%d", driver, connections), func(b *testing.B) {
				for b.Loop() {
					stored, forgotten := 0.0, 0.0
					for range rounds {
						stored = max(stored, acceptRate(b, driver, load{connections: connections, orders: orders}))
						forgotten = max(forgotten, acceptRate(b, "", load{connections: connections, orders: orders}))
					}
					b.ReportMetric(stored, "durable-202/s")
					b.ReportMetric(forgotten, "no-storage-202/s")
					b.ReportMetric(stored/forgotten, "ratio")
					b.ReportMetric(0, "ns/op") // the time of all rounds together says nothing
				}
			})
		}
	}
}

// BenchmarkBatch measures durable 202s per second of one POST /orders/batch, and
// of single POST /orders over 64 connections, on the same server with the same
// store. The rounds alternate.
//
//	go test -run '^$' -bench Batch -benchtime 1x ./modules/intake
func BenchmarkBatch(b *testing.B) {
	const batch, single, rounds = 200_000, 40_000, 3
	for _, driver := range []string{DriverSQLite, DriverPostgres} {
		b.Run("store="+driver, func(b *testing.B) {
			for b.Loop() {
				together, alone := 0.0, 0.0
				for range rounds {
					together = max(together, acceptRate(b, driver, load{orders: batch}))
					alone = max(alone, acceptRate(b, driver, load{connections: 64, orders: single}))
				}
				b.ReportMetric(together, "batch-202/s")
				b.ReportMetric(alone, "single-202/s")
				b.ReportMetric(together/alone, "ratio")
				b.ReportMetric(0, "ns/op") // the time of all rounds together says nothing
			}
		})
	}
}

// load is what the generator sends: single orders over so many connections, or
// one batch if there are none.
type load struct{ connections, orders int }

// acceptRate returns the 202s per second of a server with that store, or of one
// without any if driver is empty.
func acceptRate(b *testing.B, driver string, l load) float64 {
	b.Helper()
	logger := slog.New(slog.DiscardHandler)
	bus, err := pubsub.Open(b.Context(), pubsub.DefaultConfig(), nil, logger)
	require.NoError(b, err)
	// A consumer that never comes to an end: the relay fills its window, and
	// then there is only the accepting of orders.
	_, err = bus.Subscriber(contract.GroupDispatch, 64).Subscribe(b.Context(), contract.TopicSubmitted)
	require.NoError(b, err)

	storeCfg := DefaultStoreConfig()
	storeCfg.Driver, storeCfg.DSN = driver, filepath.Join(b.TempDir(), "orders.db")
	switch driver {
	case "":
		storeCfg.Driver = DriverMemory
	case DriverPostgres:
		storeCfg.DSN = services.Postgres(b)
	}
	m, err := Open(b.Context(), DefaultConfig(), storeCfg, DefaultRetryConfig(), benchDeps(bus, logger))
	require.NoError(b, err)
	mux := http.NewServeMux()
	if driver == "" {
		m.handle(mux, "POST /orders", func(w http.ResponseWriter, r *http.Request) {
			held := room{bodies: m.bodies}
			defer held.release()
			if o, ok := m.readOrder(w, r, &held); ok {
				w.Header().Set("Location", location(o))
				m.writeOrder(w, r, http.StatusAccepted, o)
			}
		})
	} else {
		m.Routes(mux)
	}
	server, err := httpserver.Listen("public", "127.0.0.1:0", httpserver.DefaultConfig(), httpserver.Handler(mux, logger), logger)
	require.NoError(b, err)
	ctx, stop := context.WithCancel(b.Context())
	var running sync.WaitGroup
	running.Go(func() { _ = m.Run(ctx) })
	running.Go(func() { _ = server.Serve() })
	defer func() {
		stop()
		require.NoError(b, server.Shutdown(context.WithoutCancel(ctx)))
		running.Wait()
		require.NoError(b, bus.Close())
		require.NoError(b, m.Close())
	}()

	client := exec.Command(os.Args[0])
	client.Env = append(os.Environ(), fmt.Sprintf("%s=%s %d %d", generatorVariable, server.Addr(), l.connections, l.orders))
	out, err := client.CombinedOutput()
	require.NoError(b, err, string(out))
	seconds, err := strconv.ParseFloat(strings.TrimSpace(string(out)), 64)
	require.NoError(b, err, string(out))
	return float64(l.orders) / seconds
}

// BenchmarkWrite measures what a store can write, without HTTP: insertions by
// many callers, through the group commit. flushers is the number of groups
// written at the same time.
//
//	go test -run '^$' -bench Write -benchtime 50000x ./modules/intake
func BenchmarkWrite(b *testing.B) {
	for _, callers := range []int{64, 1024} {
		for _, flushers := range []int{1, 2, 4, 8} {
			b.Run(fmt.Sprintf("store=postgres/callers=%d/flushers=%d", callers, flushers), func(b *testing.B) {
				s := openPostgres(b, services.Postgres(b))
				defer func() { require.NoError(b, s.close()) }()
				benchWrite(b, flushing{s, flushers}, callers)
			})
		}
		b.Run(fmt.Sprintf("store=sqlite/callers=%d", callers), func(b *testing.B) {
			s, err := openSQLiteStore(b.Context(), filepath.Join(b.TempDir(), "orders.db"), slog.New(slog.DiscardHandler))
			require.NoError(b, err)
			defer func() { require.NoError(b, s.close()) }()
			benchWrite(b, s, callers)
		})
	}
}

// flushing is a store with another number of flushers.
type flushing struct {
	store
	n int
}

func (f flushing) flushers() int { return f.n }

func benchWrite(b *testing.B, s store, callers int) {
	b.Helper()
	w := newWriter(s, func([]*change) {})
	defer w.close()
	var next atomic.Int64
	var calls sync.WaitGroup
	b.ResetTimer()
	for range callers {
		calls.Go(func() {
			for i := next.Add(1); i <= int64(b.N); i = next.Add(1) {
				o := testOrder(strconv.FormatInt(i, 10))
				o.Body = benchBody
				if err := w.do(b.Context(), &change{insert: o}); err != nil {
					b.Error(err)
					return
				}
			}
		})
	}
	calls.Wait()
	b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "orders/s")
}

var benchBody = []byte(strings.Repeat("x", 250))

func benchDeps(bus *pubsub.PubSub, logger *slog.Logger) Deps {
	return Deps{
		Logger:         logger,
		TracerProvider: sdktrace.NewTracerProvider(sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.NeverSample()))),
		MeterProvider:  metricnoop.NewMeterProvider(),
		Propagator:     propagation.TraceContext{},
		Bus: Bus{Publisher: bus.Publisher(), Subscriber: bus.Subscriber(contract.GroupIntake, 1), Poison: bus.Publisher(),
			Window: bus.Window(), System: bus.Name(), Redelivered: func(*message.Message) bool { return false }},
	}
}

// generatorVariable makes the test binary a load generator: its value is an
// address, a number of connections and a number of orders. The seconds that it
// took are printed.
const generatorVariable = "SLUICE_TEST_GENERATE"

// generate posts orders as fast as the answers come, with as little work of its
// own as can be, since it shares the machine with what it measures.
func generate(task string) error {
	var addr string
	var connections, orders int
	if _, err := fmt.Sscanf(task, "%s %d %d", &addr, &connections, &orders); err != nil {
		return err
	}
	tag := strconv.FormatInt(time.Now().UnixNano(), 36)
	started := time.Now()
	if connections == 0 {
		err := generateBatch(addr, tag, orders)
		fmt.Println(time.Since(started).Seconds())
		return err
	}
	errs := make(chan error, connections)
	for c := range connections {
		go func() { errs <- generateOn(addr, tag, c, connections, orders) }()
	}
	for range connections {
		if err := <-errs; err != nil {
			return err
		}
	}
	fmt.Println(time.Since(started).Seconds())
	return nil
}

const generatedOrder = `{"orderNumber":"%s-%d","customerId":"c-1001","currency":"EUR","items":[{"sku":"tea-green-100","quantity":2,"unitPrice":4.5},{"sku":"cup","quantity":1,"unitPrice":12.25}],"note":"ring twice"}`

// generateBatch sends all orders in one request and reads the answers
// meanwhile. It speaks HTTP/1.0, for which the answer has no chunks: it is
// all that comes after the header.
func generateBatch(addr, tag string, orders int) error {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // all answers are read by then
	sent := make(chan error, 1)
	go func() { sent <- sendBatch(conn, tag, orders) }()
	answers := bufio.NewReaderSize(conn, 64<<10)
	if line, err := answers.ReadSlice('\n'); err != nil || !strings.Contains(string(line), " 200 ") {
		return fmt.Errorf("answer is %q, error %w", line, err)
	}
	for accepted := 0; accepted < orders; {
		line, err := answers.ReadSlice('\n')
		switch {
		case err != nil:
			return fmt.Errorf("after %d answers: %w", accepted, err)
		case bytes.Contains(line, []byte(`,"status":202,`)):
			accepted++
		case line[0] == '{':
			return fmt.Errorf("answer %q", line)
		}
	}
	return <-sent
}

func sendBatch(conn net.Conn, tag string, orders int) error {
	length := 0
	for i := range orders {
		length += len(generatedOrder) - len("%s%d") + len(tag) + len(strconv.Itoa(i)) + len("\n")
	}
	out := bufio.NewWriterSize(conn, 64<<10)
	// What has failed once fails again.
	_, _ = fmt.Fprintf(out, "POST /orders/batch HTTP/1.0\r\nContent-Type: application/x-ndjson\r\nContent-Length: %d\r\n\r\n", length)
	for i := range orders {
		_, _ = fmt.Fprintf(out, generatedOrder+"\n", tag, i)
	}
	return out.Flush()
}

func generateOn(addr, tag string, first, step, orders int) error {
	conn, err := net.Dial("tcp", addr)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // all answers are read by then
	answers := bufio.NewReader(conn)
	for i := first; i < orders; i += step {
		body := fmt.Sprintf(generatedOrder, tag, i)
		if _, err := fmt.Fprintf(conn, "POST /orders HTTP/1.1\r\nHost: sluice\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body); err != nil {
			return err
		}
		if err := skipAnswer(answers); err != nil {
			return err
		}
	}
	return nil
}

// skipAnswer reads one answer, which must be a 202 with a Content-Length.
func skipAnswer(r *bufio.Reader) error {
	length := -1
	for first := true; ; first = false {
		line, err := r.ReadSlice('\n')
		if err != nil {
			return err
		}
		text := strings.TrimSpace(string(line))
		switch {
		case first && !strings.HasPrefix(text, "HTTP/1.1 202"):
			return fmt.Errorf("answer is %q", text)
		case text == "":
			_, err := io.CopyN(io.Discard, r, int64(length))
			return err
		}
		if value, ok := strings.CutPrefix(text, "Content-Length: "); ok {
			if length, err = strconv.Atoi(value); err != nil {
				return err
			}
		}
	}
}

// BenchmarkOutcome measures the CPU time, in this process, of what a saved order
// costs its store after it was accepted: to be claimed, and to take its outcome
// over, in groups of 64.
//
//	go test -run '^$' -bench Outcome -benchtime 20000x ./modules/intake
func BenchmarkOutcome(b *testing.B) {
	b.Run("store=sqlite", func(b *testing.B) {
		s, err := openSQLiteStore(b.Context(), filepath.Join(b.TempDir(), "orders.db"), slog.New(slog.DiscardHandler))
		require.NoError(b, err)
		defer func() { require.NoError(b, s.close()) }()
		benchOutcome(b, s)
	})
	b.Run("store=postgres", func(b *testing.B) {
		s := openPostgres(b, services.Postgres(b))
		defer func() { require.NoError(b, s.close()) }()
		benchOutcome(b, s)
	})
}

func benchOutcome(b *testing.B, s store) {
	b.Helper()
	const group = 64
	inserts := make([]*change, 0, b.N)
	for i := range b.N {
		o := testOrder(strconv.Itoa(i))
		o.Body, o.TraceParent = benchBody, "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
		inserts = append(inserts, &change{insert: o})
	}
	for chunk := range slices.Chunk(inserts, groupSize) {
		require.NoError(b, s.write(b.Context(), chunk))
	}
	retry := DefaultRetryConfig()
	var claiming, writing time.Duration
	b.ResetTimer()
	for left := b.N; left > 0; {
		before := cpuTime(b)
		orders, err := s.claim(b.Context(), now(), time.Time{}, group, relayBytes, func(uuid.UUID) bool { return false })
		require.NoError(b, err)
		require.NotEmpty(b, orders)
		claimed := cpuTime(b)
		changes := make([]*change, 0, len(orders))
		for _, o := range orders {
			out := contract.Outcome{Type: contract.TypeSaved, OrderID: o.ID.String(), Attempt: 1, StartedAt: time.Now(), Duration: 51234 * time.Microsecond,
				StatusCode: http.StatusCreated, ContentType: "application/json", Body: []byte(`{"id":"4711"}`)}
			changes = append(changes, outcomeOf(o.ID, out, retry))
		}
		require.NoError(b, s.write(b.Context(), changes))
		claiming, writing = claiming+claimed-before, writing+cpuTime(b)-claimed
		left -= len(orders)
	}
	b.ReportMetric(float64(claiming.Microseconds())/float64(b.N), "claim-µs")
	b.ReportMetric(float64(writing.Microseconds())/float64(b.N), "outcome-µs")
	b.ReportMetric(0, "ns/op")
}

// cpuTime returns what this process has used.
func cpuTime(b *testing.B) time.Duration {
	b.Helper()
	var used syscall.Rusage
	require.NoError(b, syscall.Getrusage(syscall.RUSAGE_SELF, &used))
	return time.Duration(used.Utime.Nano() + used.Stime.Nano())
}
