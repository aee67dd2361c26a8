package dispatch_test

import (
	"bufio"
	"context"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sluice/modules/contract"
)

const created = "HTTP/1.1 201 Created\r\nContent-Length: 2\r\n\r\nok"

// roads are a small order and one that is too large to be sent directly, which
// net/http sends.
func roads() map[string]contract.Submitted {
	small, large := newOrder(), newOrder()
	large.Body = []byte(`"` + strings.Repeat("x", 64<<10) + `"`)
	return map[string]contract.Submitted{"small": small, "large": large}
}

func TestAttemptUsesNoConnectionThatDiedIdle(t *testing.T) {
	for name, last := range map[string]func(*net.TCPConn) bool{
		"closed":                 func(*net.TCPConn) bool { return false },
		"reset":                  reset,
		"with an answer unasked": func(c *net.TCPConn) bool { return write(c, "HTTP/1.1 408 Request Timeout\r\n\r\n") && false },
		"with more than it said": func(c *net.TCPConn) bool { return write(c, "HTTP/1.1 409 Conflict\r\n\r\n") },
	} {
		t.Run(name, func(t *testing.T) {
			// On a busy machine the next attempt can come before the system
			// has told us: in some round of several it comes after.
			saved := false
			for round := 0; !saved && round < 50; round++ {
				backend := newRawBackend(t, func(n int64, conn *net.TCPConn) bool {
					return write(conn, created) && (n > 1 || last(conn))
				})
				client := newClient(t, backend.url, withTimeout(10*time.Second))
				require.Equal(t, contract.TypeSaved, attempt(t, client, newOrder()).Type)
				saved = attempt(t, client, newOrder()).Type == contract.TypeSaved
				require.LessOrEqual(t, backend.requests.Load(), int64(2), "one request for each attempt")
			}
			require.True(t, saved)
		})
	}
}

func TestAttemptKeepsNoConnectionThatMayNotBeUsedAgain(t *testing.T) {
	for name, answer := range map[string]string{
		"that the backend closes": "HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok",
		"of HTTP 1.0":             "HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
		"without a length":        "HTTP/1.1 200 OK\r\n\r\nok",
		"with more than it said":  "HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nokHTTP/1.1 409 Conflict\r\nContent-Length: 0\r\n\r\n",
		"with rubbish behind it":  "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\nrubbish",
	} {
		t.Run(name, func(t *testing.T) {
			connections := make(chan net.Conn, 10)
			backend := newRawBackend(t, func(_ int64, conn *net.TCPConn) bool {
				connections <- conn
				_ = write(conn, answer)
				return name != "without a length" // its end is the end of the connection
			})
			client := newClient(t, backend.url)
			for range 3 {
				outcome := attempt(t, client, newOrder())
				require.Equal(t, contract.TypeSaved, outcome.Type, outcome.Error)
				require.Equal(t, "ok", string(outcome.Body))
			}
			first, second, third := <-connections, <-connections, <-connections
			require.NotSame(t, first, second)
			require.NotSame(t, second, third)
		})
	}
}

func TestAttemptBoundsWhatPrecedesTheAnswer(t *testing.T) {
	for name, endless := range map[string]string{
		"informational answers": "HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
		"header":                "",
		"line":                  "x",
	} {
		t.Run(name, func(t *testing.T) {
			backend := newRawBackend(t, func(_ int64, conn *net.TCPConn) bool {
				if name == "header" {
					_ = write(conn, "HTTP/1.1 200 OK\r\n")
					endless = "X-A: " + strings.Repeat("a", 1000) + "\r\n"
				}
				for many := strings.Repeat(endless, 1000); write(conn, many); { // until the client has enough
				}
				return false
			})
			outcome := attempt(t, newClient(t, backend.url), newOrder())
			require.Equal(t, contract.TypeAttemptFailed, outcome.Type)
			require.Contains(t, outcome.Error, "exceed")
			require.Zero(t, outcome.StatusCode)
		})
	}
}

func TestAttemptTakesAnAnswerThatComesBeforeTheBodyIsSent(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	done := make(chan struct{})
	go func() {
		defer close(done)
		conn, err := listener.Accept()
		if err != nil {
			return
		}
		// It reads no more than the beginning, and leaves the connection open.
		_, _ = conn.Read(make([]byte, 1))
		_ = write(conn, "HTTP/1.1 413 Content Too Large\r\nContent-Length: 0\r\n\r\n")
		<-t.Context().Done()
		_ = conn.Close()
	}()
	t.Cleanup(func() { _ = listener.Close(); <-done })
	order := newOrder()
	order.Body = []byte(`"` + strings.Repeat("x", 32<<20) + `"`)

	outcome := attempt(t, newClient(t, "http://"+listener.Addr().String()), order)

	require.Equal(t, contract.TypeRejected, outcome.Type, outcome.Error)
	require.Equal(t, http.StatusRequestEntityTooLarge, outcome.StatusCode)
}

func TestAStopCutsACallOnAUsedConnection(t *testing.T) {
	for name, order := range roads() {
		t.Run(name, func(t *testing.T) {
			arrived, cut := make(chan struct{}), make(chan struct{})
			backend := newRawBackend(t, func(n int64, conn *net.TCPConn) bool {
				if n == 1 {
					return write(conn, created)
				}
				close(arrived)
				_, _ = conn.Read(make([]byte, 1)) // until the client is gone
				close(cut)
				return false
			})
			client := newClient(t, backend.url)
			require.Equal(t, contract.TypeSaved, attempt(t, client, order).Type)

			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				<-arrived
				cancel()
			}()
			_, err := client.Attempt(ctx, order)
			require.ErrorIs(t, err, context.Canceled)
			<-cut
		})
	}
}

func TestCloseEndsIdleConnections(t *testing.T) {
	for name, order := range roads() {
		t.Run(name, func(t *testing.T) {
			ended := make(chan struct{})
			backend := newRawBackend(t, func(_ int64, conn *net.TCPConn) bool {
				_ = write(conn, created)
				_, _ = conn.Read(make([]byte, 1))
				close(ended)
				return false
			})
			client := newClient(t, backend.url)
			require.Equal(t, contract.TypeSaved, attempt(t, client, order).Type)
			client.Close()
			<-ended
		})
	}
}

// FuzzAnswers has both roads read the same bytes, whatever they are: they must
// agree on what became of the order, and come to an end.
func FuzzAnswers(f *testing.F) {
	for _, answer := range []string{
		created, "", "SSH-2.0", "HTTP/1.1 204 No Content\r\n\r\n", "HTTP/1.1 200 OK\r\n\r\nto the end",
		"HTTP/1.1 100 Continue\r\n\r\n" + created, "HTTP/1.1 101 Switching Protocols\r\n\r\n", "HTTP/1.1 099 Odd\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\nX-T: 1\r\n\r\n",
		"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n2\r\nok\r\n0\r\n\r\n",
		"HTTP/1.1 200 OK\r\nContent-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", "HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
		"HTTP/1.1 503 Busy\r\nRetry-After: 7\r\nContent-Length: 9\r\n\r\nshort", "HTTP/1.0 422 No\r\nContent-Type: text/plain\r\n\r\nwhy",
		"HTTP/1.1 304 Not Modified\r\nContent-Length: 5\r\n\r\n", "HTTP/1.1 205 Reset\r\n\r\nbody", "HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nx",
	} {
		f.Add([]byte(answer))
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(f, err)
	var answer atomic.Pointer[[]byte]
	var connections sync.WaitGroup
	connections.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			connections.Go(func() { answerOnce(conn, *answer.Load()) })
		}
	})
	f.Cleanup(func() {
		_ = listener.Close()
		connections.Wait()
	})

	f.Fuzz(func(t *testing.T, bytes []byte) {
		answer.Store(&bytes)
		got := map[string]contract.Outcome{}
		for name, order := range roads() {
			got[name] = attempt(t, newClient(t, "http://"+listener.Addr().String()), order)
		}
		small, large := got["small"], got["large"]
		require.Equal(t, large.Type, small.Type, "%s, %s", large.Error, small.Error)
		require.Equal(t, large.StatusCode, small.StatusCode)
		require.Equal(t, large.ContentType, small.ContentType)
		require.Equal(t, string(large.Body), string(small.Body))
		require.Equal(t, large.Truncated, small.Truncated)
		require.Equal(t, large.RetryAfter, small.RetryAfter)
	})
}

// answerOnce reads a request, writes the answer and closes the connection.
func answerOnce(conn net.Conn, answer []byte) {
	defer func() { _ = conn.Close() }()
	if request, err := http.ReadRequest(bufio.NewReader(conn)); err == nil {
		_, _ = io.Copy(io.Discard, request.Body)
		_, _ = conn.Write(answer)
	}
}
