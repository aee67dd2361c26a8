package httpserver_test

import (
	"bufio"
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alecthomas/units"
	"github.com/stretchr/testify/require"

	"sluice/platform/httpserver"
)

func TestListenErrorsAreOneClearLine(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { require.NoError(t, taken.Close()) }()
	addr := taken.Addr().String()

	for name, key := range map[string]string{"public": "http.addr", "admin": "http.admin_addr", "backend": "backend"} {
		_, err = httpserver.Listen(name, addr, httpserver.DefaultConfig(), http.NotFoundHandler(), quiet())
		require.EqualError(t, err, "listen on "+addr+" ("+key+"): address already in use; another process has this port")
	}

	_, err = httpserver.Listen("public", "192.0.2.1:0", httpserver.DefaultConfig(), http.NotFoundHandler(), quiet())
	require.ErrorContains(t, err, "listen on 192.0.2.1:0 (http.addr): ")
	require.ErrorContains(t, err, "; this machine does not have that address")

	_, err = httpserver.Listen("public", "127.0.0.1:99999", httpserver.DefaultConfig(), http.NotFoundHandler(), quiet())
	require.EqualError(t, err, "listen on 127.0.0.1:99999 (http.addr): address 99999: invalid port")

	cfg := httpserver.DefaultConfig()
	cfg.TLSCert = filepath.Join(t.TempDir(), "none.pem")
	_, err = httpserver.Listen("public", "127.0.0.1:0", cfg, http.NotFoundHandler(), quiet())
	require.ErrorContains(t, err, "load http.tls_cert and http.tls_key: stat ")
}

func TestChosenPortIsLogged(t *testing.T) {
	var logs logbook
	server := serveLogged(t, httpserver.DefaultConfig(), http.NotFoundHandler(), logs.logger(slog.LevelInfo))
	require.NotContains(t, server.Addr(), ":0")
	require.Contains(t, logs.String(), "server=public addr="+server.Addr())
}

// short is the limit that a test waits for, and yet time enough for what should
// happen within it on a busy machine.
const short = 200 * time.Millisecond

func TestSlowHeader(t *testing.T) {
	cfg := httpserver.DefaultConfig()
	cfg.ReadHeaderTimeout = short
	server := serve(t, cfg, http.NotFoundHandler())

	conn := dial(t, server)
	send(t, conn, "GET / HTTP/1.1\r\nHost: x\r\nX-Slow: ")
	_, err := conn.Read(make([]byte, 1)) // the connection's own deadline is far away
	require.ErrorIs(t, err, io.EOF)
}

func TestIdleConnection(t *testing.T) {
	cfg := httpserver.DefaultConfig()
	cfg.IdleTimeout = short
	server := serve(t, cfg, route("GET /", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))

	conn := dial(t, server)
	send(t, conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	require.Equal(t, http.StatusNoContent, receive(t, conn).StatusCode)
	_, err := conn.Read(make([]byte, 1))
	require.ErrorIs(t, err, io.EOF)
}

// echo answers with the body, or with the problem of reading it.
func echo(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1000))
	if problem, ok := httpserver.ReadProblem(err); ok {
		httpserver.WriteProblem(w, r, problem)
		return
	}
	httpserver.WriteJSON(w, r, http.StatusOK, string(body))
}

func TestSlowBody(t *testing.T) {
	cfg := httpserver.DefaultConfig()
	cfg.ReadHeaderTimeout, cfg.ReadTimeout = short, short

	for name, header := range map[string]string{
		"with a length": "Content-Length: 10\r\n\r\nhalf",
		"chunked":       "Transfer-Encoding: chunked\r\n\r\n4\r\nhalf\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			conn := dial(t, serve(t, cfg, route("POST /", echo)))
			send(t, conn, "POST / HTTP/1.1\r\nHost: x\r\n"+header)
			got := receive(t, conn)
			require.Equal(t, http.StatusRequestTimeout, got.StatusCode)
			require.Equal(t, "/problems/request-timeout", got.problem(t)["type"])
			require.True(t, got.Close)
			_, err := conn.Read(make([]byte, 1))
			require.ErrorIs(t, err, io.EOF)
		})
	}

	t.Run("over HTTP/2", func(t *testing.T) {
		cfg := cfg
		cfg.ReadHeaderTimeout, cfg.ReadTimeout = 5*short, 5*short // they bound the TLS handshake as well
		client, server := serveTLS(t, cfg, route("POST /", echo))
		reader, writer := io.Pipe()
		defer func() { require.NoError(t, writer.Close()) }()
		request, err := http.NewRequestWithContext(t.Context(), "POST", "https://"+server.Addr(), reader)
		require.NoError(t, err)
		response, err := client.Do(request)
		require.NoError(t, err)
		got := read(t, response)
		require.Equal(t, 2, got.ProtoMajor)
		require.Equal(t, http.StatusRequestTimeout, got.StatusCode)
		require.Equal(t, "/problems/request-timeout", got.problem(t)["type"])
	})

	t.Run("a handler may lift the limit", func(t *testing.T) {
		lifted := make(chan struct{})
		conn := dial(t, serve(t, cfg, route("POST /", func(w http.ResponseWriter, r *http.Request) {
			if err := http.NewResponseController(w).SetReadDeadline(time.Time{}); err != nil {
				panic(err)
			}
			<-time.After(2 * cfg.ReadTimeout) // the limit would be over by now
			close(lifted)
			echo(w, r)
		})))
		send(t, conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 8\r\n\r\nhalf")
		waitFor(t, lifted, "the handler")
		send(t, conn, "half")
		require.Equal(t, http.StatusOK, receive(t, conn).StatusCode)
	})
}

func TestReadTimeoutDoesNotBoundTheHandler(t *testing.T) {
	cfg := httpserver.DefaultConfig()
	cfg.ReadHeaderTimeout, cfg.ReadTimeout = short, short
	server := serve(t, cfg, route("POST /", func(w http.ResponseWriter, r *http.Request) {
		_, err := io.ReadAll(r.Body)
		if err == nil {
			select {
			case <-r.Context().Done():
				err = r.Context().Err()
			case <-time.After(2 * cfg.ReadTimeout):
			}
		}
		httpserver.WriteJSON(w, r, http.StatusOK, err == nil)
	}))
	got := do(t, newClient(t), "POST", "http://"+server.Addr(), strings.NewReader("body"))
	require.JSONEq(t, "true", got.body)
}

func TestBadBodies(t *testing.T) {
	server := serve(t, httpserver.DefaultConfig(), route("POST /", echo))

	t.Run("too large, sent in full before the answer is read", func(t *testing.T) {
		for _, size := range []int{2_000, 300_000, 3_000_000} {
			body := struct{ io.Reader }{strings.NewReader(strings.Repeat("x", size))} // no length: chunked
			got := do(t, newClient(t), "POST", "http://"+server.Addr(), body)
			require.Equal(t, http.StatusRequestEntityTooLarge, got.StatusCode)
			require.Equal(t, "The body is larger than 1000 bytes.", got.problem(t)["detail"])
			require.True(t, got.Close)
		}
	})

	t.Run("wrongly chunked", func(t *testing.T) {
		conn := dial(t, server)
		send(t, conn, "POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n")
		got := receive(t, conn)
		require.Equal(t, http.StatusBadRequest, got.StatusCode)
		require.Equal(t, "/problems/incomplete-body", got.problem(t)["type"])
	})

	t.Run("cut off", func(t *testing.T) {
		conn := dial(t, server)
		send(t, conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 10\r\n\r\nhalf")
		require.NoError(t, conn.CloseWrite())
		got := receive(t, conn)
		require.Equal(t, http.StatusBadRequest, got.StatusCode)
		require.Equal(t, "/problems/incomplete-body", got.problem(t)["type"])
	})

	t.Run("given up over HTTP/2", func(t *testing.T) {
		entered, problems := make(chan struct{}), make(chan httpserver.Problem, 1)
		client, server := serveTLS(t, httpserver.DefaultConfig(), route("POST /", func(_ http.ResponseWriter, r *http.Request) {
			close(entered)
			_, err := io.ReadAll(r.Body)
			problem, _ := httpserver.ReadProblem(err)
			problems <- problem
		}))
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		reader, writer := io.Pipe()
		defer func() { require.NoError(t, writer.Close()) }()
		request, err := http.NewRequestWithContext(ctx, "POST", "https://"+server.Addr(), reader)
		require.NoError(t, err)
		go func() {
			<-entered
			cancel()
		}()
		_, err = client.Do(request) //nolint:bodyclose // there is no response
		require.ErrorIs(t, err, context.Canceled)
		require.Equal(t, "incomplete-body", (<-problems).Type)
	})
}

func TestOversizedHeader(t *testing.T) {
	cfg := httpserver.DefaultConfig()
	cfg.MaxHeader = 2 * units.KiB
	server := serve(t, cfg, route("GET /", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) }))

	conn := dial(t, server)
	send(t, conn, "GET / HTTP/1.1\r\nHost: x\r\nX-Some: "+strings.Repeat("x", 1_000)+"\r\n\r\n")
	require.Equal(t, http.StatusNoContent, receive(t, conn).StatusCode)

	conn = dial(t, server)
	send(t, conn, "GET / HTTP/1.1\r\nHost: x\r\nX-Much: "+strings.Repeat("x", 8_000)+"\r\n\r\n")
	require.Equal(t, http.StatusRequestHeaderFieldsTooLarge, receive(t, conn).StatusCode)
}

func TestMalformedRequests(t *testing.T) {
	server := serve(t, httpserver.DefaultConfig(), http.NotFoundHandler())
	for name, text := range map[string]string{
		"no request line":     "hello\r\n\r\n",
		"no host":             "GET / HTTP/1.1\r\n\r\n",
		"two lengths":         "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
		"a space in the name": "GET / HTTP/1.1\r\nHost: x\r\nBad Name: x\r\n\r\n",
	} {
		t.Run(name, func(t *testing.T) {
			conn := dial(t, server)
			send(t, conn, text)
			require.Equal(t, http.StatusBadRequest, receive(t, conn).StatusCode)
		})
	}
}

func TestShutdown(t *testing.T) {
	start := func(t *testing.T, h http.HandlerFunc) (*httpserver.Server, <-chan error) {
		t.Helper()
		server, err := httpserver.Listen("public", "127.0.0.1:0", httpserver.DefaultConfig(), h, quiet())
		require.NoError(t, err)
		served := make(chan error, 1)
		go func() { served <- server.Serve() }()
		return server, served
	}
	type result struct {
		response *http.Response
		err      error
	}
	get := func(client *http.Client, server *httpserver.Server) <-chan result {
		results := make(chan result, 1)
		go func() {
			response, err := client.Get("http://" + server.Addr()) //nolint:bodyclose // the receiver closes it
			results <- result{response, err}
		}()
		return results
	}

	t.Run("lets a request finish and refuses new ones", func(t *testing.T) {
		entered, release := make(chan struct{}), make(chan struct{})
		server, served := start(t, func(w http.ResponseWriter, r *http.Request) {
			close(entered)
			<-release
			httpserver.WriteJSON(w, r, http.StatusOK, r.Context().Err() == nil)
		})
		results := get(newClient(t), server)
		waitFor(t, entered, "the request")

		down := make(chan error, 1)
		go func() { down <- server.Shutdown(t.Context()) }()
		require.NoError(t, <-served)
		_, err := net.Dial("tcp", server.Addr())
		require.ErrorContains(t, err, "refused")
		require.Empty(t, down)

		close(release)
		r := <-results
		require.NoError(t, r.err)
		require.JSONEq(t, "true", read(t, r.response).body, "the request's context must live")
		require.NoError(t, <-down)
		require.NoError(t, server.Shutdown(t.Context()), "idempotent")
	})

	t.Run("tells handlers that wait", func(t *testing.T) {
		entered := make(chan struct{})
		server, served := start(t, func(w http.ResponseWriter, r *http.Request) {
			close(entered)
			<-httpserver.Draining(r.Context())
			httpserver.WriteJSON(w, r, http.StatusAccepted, r.Context().Err() == nil)
		})
		results := get(newClient(t), server)
		waitFor(t, entered, "the request")
		require.NoError(t, server.Shutdown(t.Context()))
		r := <-results
		require.NoError(t, r.err)
		require.Equal(t, http.StatusAccepted, r.response.StatusCode)
		require.JSONEq(t, "true", read(t, r.response).body)
		require.NoError(t, <-served)
	})

	t.Run("is bounded by its context", func(t *testing.T) {
		entered, cancelled := make(chan struct{}), make(chan struct{})
		server, served := start(t, func(_ http.ResponseWriter, r *http.Request) {
			close(entered)
			<-r.Context().Done()
			close(cancelled)
		})
		conn := dial(t, server)
		send(t, conn, "POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\n\r\n") // unread, so net/http does not watch the connection
		waitFor(t, entered, "the request")

		ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
		defer cancel()
		err := server.Shutdown(ctx)
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorContains(t, err, "drain public requests, 1 still in flight: ")
		waitFor(t, cancelled, "the end of the request's context")
		_, err = conn.Read(make([]byte, 1))
		require.Error(t, err)
		require.NoError(t, <-served)
	})

	t.Run("does not wait for connections that have sent nothing", func(t *testing.T) {
		server, served := start(t, func(http.ResponseWriter, *http.Request) {})
		unused := dial(t, server)
		r := <-get(newClient(t), server) // accepted after the unused one
		require.NoError(t, r.err)
		require.Empty(t, read(t, r.response).body)

		ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second) // net/http alone would take 5 to 6
		defer cancel()
		require.NoError(t, server.Shutdown(ctx))
		require.NoError(t, <-served)
		_, err := unused.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
	})

	t.Run("frees the port of a server that never served", func(t *testing.T) {
		server, err := httpserver.Listen("public", "127.0.0.1:0", httpserver.DefaultConfig(), http.NotFoundHandler(), quiet())
		require.NoError(t, err)
		require.NoError(t, server.Shutdown(t.Context()))
		_, err = net.Dial("tcp", server.Addr())
		require.ErrorContains(t, err, "refused")
		require.NoError(t, server.Serve())
	})

	t.Run("elsewhere there is nothing to drain", func(t *testing.T) {
		require.Nil(t, httpserver.Draining(t.Context()))
	})
}

func TestConnectionLimit(t *testing.T) {
	const limit, clients = 2, 6
	var open, most atomic.Int64
	entered, release := make(chan struct{}, clients), make(chan struct{})
	cfg := httpserver.DefaultConfig()
	cfg.MaxConnections = limit
	server := serve(t, cfg, route("GET /", func(w http.ResponseWriter, _ *http.Request) {
		now := open.Add(1)
		for seen := most.Load(); now > seen && !most.CompareAndSwap(seen, now); seen = most.Load() {
		}
		entered <- struct{}{}
		<-release
		open.Add(-1)
		w.WriteHeader(http.StatusNoContent)
	}))

	conns := make([]*net.TCPConn, clients)
	for i := range conns {
		conns[i] = dial(t, server) // the kernel accepts more than the server does
		send(t, conns[i], "GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	}
	for range limit {
		waitFor(t, entered, "a request")
	}
	for range clients {
		release <- struct{}{}
	}
	for _, conn := range conns {
		response, err := http.ReadResponse(bufio.NewReader(conn), nil)
		require.NoError(t, err)
		require.Equal(t, http.StatusNoContent, read(t, response).StatusCode)
	}
	require.EqualValues(t, limit, most.Load())
}

func TestShutdownAtTheConnectionLimit(t *testing.T) {
	cfg := httpserver.DefaultConfig()
	cfg.MaxConnections = 1
	entered, release := make(chan struct{}), make(chan struct{})
	server, err := httpserver.Listen("public", "127.0.0.1:0", cfg, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		close(entered)
		<-release
	}), quiet())
	require.NoError(t, err)
	served := make(chan struct{})
	go func() {
		defer close(served)
		_ = server.Serve() // its error is looked at elsewhere
	}()
	conn := dial(t, server)
	send(t, conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
	waitFor(t, entered, "the request")

	down := make(chan error, 1)
	go func() { down <- server.Shutdown(context.WithoutCancel(t.Context())) }()
	waitFor(t, served, "Serve, which waits for a connection to close")
	close(release)
	require.NoError(t, <-down)
	require.Equal(t, http.StatusOK, receive(t, conn).StatusCode)
}

// serveTLS runs a server with a certificate, and a client that trusts it.
func serveTLS(t *testing.T, cfg httpserver.Config, h http.Handler) (*http.Client, *httpserver.Server) {
	t.Helper()
	cert, key, roots := keyPair(t)
	cfg.TLSCert, cfg.TLSKey = cert, key
	require.NoError(t, cfg.Validate())
	server := serve(t, cfg, h)
	return newClientTrusting(t, roots), server
}

func TestTLS(t *testing.T) {
	protocol := func(w http.ResponseWriter, r *http.Request) { httpserver.WriteJSON(w, r, http.StatusOK, r.Proto) }

	t.Run("serves the public door with HTTP/2", func(t *testing.T) {
		client, server := serveTLS(t, httpserver.DefaultConfig(), route("GET /", protocol))
		got := do(t, client, "GET", "https://"+server.Addr()+"/", nil)
		require.JSONEq(t, `"HTTP/2.0"`, got.body)
		require.Equal(t, http.StatusBadRequest, do(t, client, "GET", "http://"+server.Addr()+"/", nil).StatusCode)
	})

	t.Run("stops gracefully with HTTP/2 too", func(t *testing.T) {
		entered := make(chan struct{})
		client, server := serveTLS(t, httpserver.DefaultConfig(), route("GET /", func(w http.ResponseWriter, r *http.Request) {
			close(entered)
			<-httpserver.Draining(r.Context())
			httpserver.WriteJSON(w, r, http.StatusOK, r.Context().Err() == nil)
		}))
		down := make(chan error, 1)
		go func() {
			<-entered
			down <- server.Shutdown(context.Background())
		}()
		got := do(t, client, "GET", "https://"+server.Addr(), nil)
		require.Equal(t, 2, got.ProtoMajor)
		require.JSONEq(t, "true", got.body)
		require.NoError(t, <-down)
	})

	t.Run("leaves the admin door plain", func(t *testing.T) {
		cfg := httpserver.DefaultConfig()
		cfg.TLSCert, cfg.TLSKey, _ = keyPair(t)
		server, err := httpserver.Listen("admin", "127.0.0.1:0", cfg, route("GET /", protocol), quiet())
		require.NoError(t, err)
		served := make(chan error, 1)
		go func() { served <- server.Serve() }()
		require.JSONEq(t, `"HTTP/1.1"`, do(t, newClient(t), "GET", "http://"+server.Addr(), nil).body)
		require.NoError(t, server.Shutdown(t.Context()))
		require.NoError(t, <-served)
	})

	t.Run("a failed handshake is noise for the debug level", func(t *testing.T) {
		cert, key, _ := keyPair(t)
		cfg := httpserver.DefaultConfig()
		cfg.TLSCert, cfg.TLSKey = cert, key
		var logs logbook
		server := serveLogged(t, cfg, http.NotFoundHandler(), logs.logger(slog.LevelDebug))
		conn := dial(t, server)
		send(t, conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		require.Equal(t, http.StatusBadRequest, receive(t, conn).StatusCode)
		require.Eventually(t, func() bool { return strings.Contains(logs.String(), "TLS handshake error") }, patience, time.Millisecond)
		require.NotRegexp(t, `level=(INFO|WARN|ERROR) .*handshake`, logs.String())
	})

	t.Run("a panic that nobody guards is not noise", func(t *testing.T) {
		var logs logbook
		server := serveLogged(t, httpserver.DefaultConfig(), http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
			panic("unguarded")
		}), logs.logger(slog.LevelInfo))
		conn := dial(t, server)
		send(t, conn, "GET / HTTP/1.1\r\nHost: x\r\n\r\n")
		_, err := conn.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF)
		require.Contains(t, logs.String(), "level=ERROR")
		require.Contains(t, logs.String(), "unguarded")
	})
}
