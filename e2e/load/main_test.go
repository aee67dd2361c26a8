package load_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"sluice/e2e/load"
)

func TestMain(m *testing.M) {
	if os.Getenv(asServer) != "" {
		if err := serveKnown(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

// known is a server of known behaviour behind a network in memory, which works on the fake clock of synctest: time there
// is exact, and no busy machine disturbs it.
type known struct {
	handle func(*known, http.ResponseWriter, *http.Request)
	conns  chan net.Conn
	closed chan struct{}
	server *http.Server
	served sync.WaitGroup
	start  time.Time

	mu      sync.Mutex
	arrived []time.Duration // when requests came, since the start
	bodies  map[string]int  // how often each came
	left    int             // requests whose client had left before they were answered
	open    map[net.Conn]http.ConnState
	maxOpen int
}

func newKnown(t *testing.T, handle func(*known, http.ResponseWriter, *http.Request)) *known {
	t.Helper()
	k := &known{handle: handle, conns: make(chan net.Conn), closed: make(chan struct{}), start: time.Now(), bodies: map[string]int{},
		open: map[net.Conn]http.ConnState{}}
	k.server = &http.Server{Handler: k, ConnState: k.count}
	k.served.Go(func() { _ = k.server.Serve(k) }) // ends when it is closed
	t.Cleanup(func() {
		require.NoError(t, k.server.Shutdown(context.WithoutCancel(t.Context()))) // waits for what is worked on for nobody
		k.served.Wait()
	})
	return k
}

// Accept, Close and Addr make it a net.Listener.
func (k *known) Accept() (net.Conn, error) {
	select {
	case conn := <-k.conns:
		return conn, nil
	case <-k.closed:
		return nil, net.ErrClosed
	}
}

func (k *known) Close() error {
	k.mu.Lock()
	defer k.mu.Unlock()
	select {
	case <-k.closed:
	default:
		close(k.closed)
	}
	return nil
}

func (k *known) Addr() net.Addr { return &net.TCPAddr{} }

func (k *known) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	client, server := net.Pipe()
	select {
	case k.conns <- server:
		return client, nil
	case <-k.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (k *known) count(conn net.Conn, state http.ConnState) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.open[conn] = state; state == http.StateClosed {
		delete(k.open, conn)
	}
	k.maxOpen = max(k.maxOpen, len(k.open))
}

// seen returns the requests whose client had left before they were answered, and the most connections there ever were.
func (k *known) seen() (left, connections int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.left, k.maxOpen
}

// bodyKey is where ServeHTTP puts the body into the context.
type bodyKey struct{}

func (k *known) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(r.Body)
	k.mu.Lock()
	k.arrived = append(k.arrived, time.Since(k.start))
	if err == nil {
		k.bodies[string(body)]++
	}
	k.mu.Unlock()
	k.handle(k, w, r.WithContext(context.WithValue(r.Context(), bodyKey{}, string(body))))
}

// nth returns what is said for the first, second, ... time that an order came.
func (k *known) nth(r *http.Request, each ...int) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return each[k.bodies[r.Context().Value(bodyKey{}).(string)]-1]
}

// pass waits like a server that works for d, whether or not its client is still there.
func (k *known) pass(r *http.Request, d time.Duration) {
	<-time.After(d)
	if r.Context().Err() != nil {
		k.mu.Lock()
		defer k.mu.Unlock()
		k.left++
	}
}

// takes is a server that works for d on each request, however many there are.
func takes(d time.Duration) func(*known, http.ResponseWriter, *http.Request) {
	return func(k *known, _ http.ResponseWriter, r *http.Request) { k.pass(r, d) }
}

// oneAtATime is a server that works for d on each request, on one at a time, first come, first served.
func oneAtATime(d time.Duration) func(*known, http.ResponseWriter, *http.Request) {
	var mu sync.Mutex
	var free time.Time
	return func(k *known, _ http.ResponseWriter, r *http.Request) {
		mu.Lock()
		now := time.Now()
		if free.Before(now) {
			free = now
		}
		free = free.Add(d)
		ready := free.Sub(now)
		mu.Unlock()
		k.pass(r, ready)
	}
}

const url = "http://known.test/orders"

func config(change func(*load.Config)) load.Config {
	cfg := load.DefaultConfig()
	cfg.URL, cfg.Seed = url, 1
	change(&cfg)
	return cfg
}

func run(t *testing.T, k *known, cfg load.Config) load.Result {
	t.Helper()
	result, err := load.Run(t.Context(), cfg, load.Deps{Dial: k.dial})
	require.NoError(t, err)
	return result
}

func plan(t testing.TB, text string) load.Plan {
	t.Helper()
	p, err := load.ParsePlan(text)
	require.NoError(t, err)
	return p
}

// requireNear asks for 2 %.
func requireNear(t *testing.T, want, got float64, what string) {
	t.Helper()
	require.InEpsilon(t, want, got, 0.02, what)
}

// serve is a server on a real network interface.
func serve(t *testing.T, handler http.HandlerFunc) (url string) {
	t.Helper()
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server.URL
}
