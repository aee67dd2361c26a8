package httpserver_test

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sluice/platform/httpserver"
)

// echoLines answers each line as it comes, and says at the end why it is one.
func echoLines(w http.ResponseWriter, r *http.Request) {
	stream, err := httpserver.NewDuplex(w, r)
	if err != nil {
		httpserver.WriteProblem(w, r, httpserver.Problem{Detail: err.Error()})
		return
	}
	defer stream.Close()
	in := bufio.NewReader(stream)
	for {
		stream.Progress()
		line, err := in.ReadString('\n')
		if err != nil {
			problem, known := httpserver.ReadProblem(err)
			switch {
			case errors.Is(err, httpserver.ErrDraining):
				line = "draining"
			case known:
				line = problem.Type
			default:
				line = err.Error()
			}
		}
		if _, writeErr := io.WriteString(stream, line); errors.Join(writeErr, stream.Flush(), err) != nil {
			return
		}
	}
}

// exchange is a request under way.
type exchange struct {
	t     *testing.T
	lines *io.PipeWriter
	in    *bufio.Reader
}

// begin sends the first line.
func begin(t *testing.T, client *http.Client, url string) *exchange {
	t.Helper()
	body, lines := io.Pipe()
	t.Cleanup(func() { _ = lines.Close() }) // or the sender of the body waits for ever
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	request, err := http.NewRequestWithContext(ctx, "POST", url, body)
	require.NoError(t, err)
	go func() { _, _ = io.WriteString(lines, "first\n") }() // fails with the request
	response, err := client.Do(request)
	require.NoError(t, err)
	t.Cleanup(func() { _ = response.Body.Close() }) // it may be broken
	x := &exchange{t, lines, bufio.NewReader(response.Body)}
	x.expect("first\n")
	return x
}

func (x *exchange) say(line string) {
	x.t.Helper()
	_, err := io.WriteString(x.lines, line)
	require.NoError(x.t, err)
	x.expect(line)
}

func (x *exchange) expect(line string) {
	x.t.Helper()
	got := make([]byte, len(line))
	_, err := io.ReadFull(x.in, got)
	require.NoError(x.t, err)
	require.Equal(x.t, line, string(got))
}

// last checks how the answer ends.
func (x *exchange) last(line string) {
	x.t.Helper()
	got, err := io.ReadAll(x.in)
	require.NoError(x.t, err)
	require.Equal(x.t, line, string(got))
}

func TestDuplex(t *testing.T) {
	for name, protocol := range map[string]int{"HTTP/1.1": 1, "HTTP/2": 2} {
		t.Run(name, func(t *testing.T) { testDuplex(t, protocol) })
	}
}

func testDuplex(t *testing.T, protocol int) {
	start := func(t *testing.T, change func(*httpserver.Config)) (*http.Client, string, *httpserver.Server) {
		cfg := httpserver.DefaultConfig()
		change(&cfg)
		handler := route("POST /echo", echoLines)
		if protocol == 1 {
			server := serve(t, cfg, handler)
			return newClient(t), "http://" + server.Addr() + "/echo", server
		}
		client, server := serveTLS(t, cfg, handler)
		return client, "https://" + server.Addr() + "/echo", server
	}
	t.Run("goes on for longer than a request may take, and ends with its body", func(t *testing.T) {
		client, url, _ := start(t, func(c *httpserver.Config) {
			c.ReadHeaderTimeout, c.ReadTimeout, c.WriteTimeout = time.Second, time.Second, time.Second
		})
		x := begin(t, client, url)
		tick := time.NewTicker(250 * time.Millisecond)
		defer tick.Stop()
		for range 8 {
			<-tick.C
			x.say("line\n")
		}
		require.NoError(t, x.lines.Close())
		x.last("EOF")
	})
	t.Run("is cut off when it stands still", func(t *testing.T) {
		client, url, _ := start(t, func(c *httpserver.Config) {
			c.ReadHeaderTimeout, c.ReadTimeout = 200*time.Millisecond, 200*time.Millisecond
		})
		x := begin(t, client, url)
		_, err := io.WriteString(x.lines, "half a line")
		require.NoError(t, err)
		x.last("request-timeout")
	})
	t.Run("reads no more when the server shuts down", func(t *testing.T) {
		client, url, server := start(t, func(*httpserver.Config) {})
		x := begin(t, client, url)
		stopped := make(chan error, 1)
		go func() { stopped <- server.Shutdown(t.Context()) }()
		x.last("draining")
		require.NoError(t, <-stopped)
	})
	t.Run("ends when the client does not read", func(t *testing.T) {
		client, url, server := start(t, func(c *httpserver.Config) { c.WriteTimeout = 200 * time.Millisecond })
		x := begin(t, client, url)
		text := strings.Repeat("x", 1<<20) + "\n"
		for sent := 0; ; sent++ {
			require.Less(t, sent, 256, "it is all read")
			if _, err := io.WriteString(x.lines, text); err != nil {
				break
			}
		}
		require.NoError(t, server.Shutdown(t.Context()), "nothing is in flight")
	})
}

// What is left of a body must not be taken for the next request (request smuggling), and the answer must arrive all the
// same.
func TestABodyThatIsNotReadToItsEndIsTheLastOfItsConnection(t *testing.T) {
	cfg := httpserver.DefaultConfig()
	cfg.ReadHeaderTimeout, cfg.ReadTimeout = 200*time.Millisecond, 200*time.Millisecond
	var smuggled atomic.Int64
	mux := http.NewServeMux()
	mux.HandleFunc("POST /echo", echoLines)
	mux.HandleFunc("GET /", func(http.ResponseWriter, *http.Request) { smuggled.Add(1) })
	server := serve(t, cfg, mux)
	const head = "POST /echo HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
	for name, text := range map[string]struct{ begin, rest, last string }{
		"it comes too late":  {head + "6\r\nfirst\n\r\n", "GET /inner HTTP/1.1\r\nHost: x\r\n\r\n", "request-timeout"},
		"it is malformed":    {head + "6\r\nfirst\n\r\nnonsense\r\n", "GET /inner HTTP/1.1\r\nHost: x\r\n\r\n", "incomplete-body"},
		"it comes to an end": {head + "6\r\nfirst\n\r\n0\r\n\r\n", "", "EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			conn, err := net.Dial("tcp", server.Addr())
			require.NoError(t, err)
			defer func() { require.NoError(t, conn.Close()) }()
			require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
			_, err = io.WriteString(conn, text.begin)
			require.NoError(t, err)
			in := bufio.NewReader(conn)
			response, err := http.ReadResponse(in, nil)
			require.NoError(t, err)
			answer, err := io.ReadAll(response.Body)
			require.NoError(t, errors.Join(err, response.Body.Close()))
			require.Contains(t, string(answer), "first\n")
			require.Contains(t, string(answer), text.last)
			_, _ = io.WriteString(conn, text.rest) // of a connection that may be closed by now
			if text.last == "EOF" {
				_, err = io.WriteString(conn, "GET /next HTTP/1.1\r\nHost: x\r\n\r\n")
				require.NoError(t, err)
				response, err = http.ReadResponse(in, nil)
				require.NoError(t, err)
				require.NoError(t, response.Body.Close())
				require.EqualValues(t, 1, smuggled.Swap(0))
				return
			}
			_, err = in.ReadByte()
			require.ErrorIs(t, err, io.EOF)
			require.Zero(t, smuggled.Load())
		})
	}
}

func TestDuplexWantsAServer(t *testing.T) {
	plain := http.NewServeMux()
	plain.HandleFunc("POST /echo", func(w http.ResponseWriter, r *http.Request) {
		_, err := httpserver.NewDuplex(w, r.WithContext(context.Background())) // of no server
		if err == nil {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		httpserver.WriteProblem(w, r, httpserver.Problem{Detail: err.Error()})
	})
	server := serve(t, httpserver.DefaultConfig(), plain)
	got := do(t, newClient(t), "POST", "http://"+server.Addr()+"/echo", strings.NewReader("x"))
	require.Equal(t, http.StatusInternalServerError, got.StatusCode)
}
