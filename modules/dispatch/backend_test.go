package dispatch_test

import (
	"bufio"
	"errors"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/stretchr/testify/require"
)

// newBackend serves a handler on loopback until the end of the test.
func newBackend(t *testing.T, h http.HandlerFunc) *httptest.Server {
	t.Helper()
	srv := httptest.NewServer(h)
	t.Cleanup(srv.Close)
	return srv
}

// countingBackend is newBackend that counts the connections made to it.
func countingBackend(t *testing.T, h http.HandlerFunc) (srv *httptest.Server, connections *atomic.Int64) {
	t.Helper()
	connections = new(atomic.Int64)
	srv = httptest.NewUnstartedServer(h)
	srv.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	srv.Start()
	t.Cleanup(srv.Close)
	return srv, connections
}

// rawBackend reads requests off bare connections, so that a test decides what
// becomes of the bytes.
type rawBackend struct {
	url      string
	requests atomic.Int64
}

// newRawBackend calls answer for each request that was read completely, n
// counting from 1 over all connections. The connection is closed when answer
// returns false.
func newRawBackend(t *testing.T, answer func(n int64, conn *net.TCPConn) bool) *rawBackend {
	t.Helper()
	listener, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	require.NoError(t, err)
	b := &rawBackend{url: "http://" + listener.Addr().String() + "/orders"}

	var (
		wg    sync.WaitGroup
		mu    sync.Mutex
		conns []net.Conn // guarded by mu
	)
	wg.Go(func() {
		for {
			conn, err := listener.AcceptTCP()
			if err != nil {
				return // closed by the clean-up
			}
			mu.Lock()
			conns = append(conns, conn)
			mu.Unlock()
			wg.Go(func() { b.serve(conn, answer) })
		}
	})
	t.Cleanup(func() {
		_ = listener.Close()
		mu.Lock()
		for _, conn := range conns {
			_ = conn.Close() // most are closed already
		}
		mu.Unlock()
		wg.Wait()
	})
	return b
}

func (b *rawBackend) serve(conn *net.TCPConn, answer func(int64, *net.TCPConn) bool) {
	defer func() { _ = conn.Close() }() // may have been closed by answer
	reader := bufio.NewReader(conn)
	for {
		r, err := http.ReadRequest(reader)
		if err != nil {
			return
		}
		if _, err := io.Copy(io.Discard, r.Body); err != nil {
			return
		}
		if !answer(b.requests.Add(1), conn) {
			return
		}
	}
}

func write(conn net.Conn, text string) bool {
	_, err := io.WriteString(conn, text)
	return err == nil
}

// reset closes a connection the hard way: the other side reads ECONNRESET.
func reset(conn *net.TCPConn) bool {
	return errors.Join(conn.SetLinger(0), conn.Close()) != nil
}
