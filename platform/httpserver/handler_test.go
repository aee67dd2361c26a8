package httpserver_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"

	"sluice/platform/httpserver"
)

func TestRouterMissesAreProblems(t *testing.T) {
	mux := http.NewServeMux()
	found := func(w http.ResponseWriter, r *http.Request) { httpserver.WriteJSON(w, r, http.StatusOK, r.Pattern) }
	mux.HandleFunc("GET /orders/{id}", found)
	mux.HandleFunc("POST /orders", found)
	mux.HandleFunc("GET /docs/", found)
	mux.HandleFunc("GET /plain", func(w http.ResponseWriter, _ *http.Request) {
		http.Error(w, "plain", http.StatusNotFound)
	})
	server := serve(t, httpserver.DefaultConfig(), httpserver.Handler(mux, quiet()))
	base := "http://" + server.Addr()
	client := newClient(t)

	t.Run("a path that nobody serves is 404", func(t *testing.T) {
		got := do(t, client, "GET", base+"/nowhere", nil)
		require.Equal(t, http.StatusNotFound, got.StatusCode)
		p := got.problem(t)
		require.Equal(t, "/problems/not-found", p["type"])
		require.Equal(t, "Not found", p["title"])
		require.Equal(t, "/nowhere", p["instance"])
	})

	t.Run("nothing of the router's own text is left", func(t *testing.T) {
		recorder := httptest.NewRecorder() // unlike net/http it takes more than Content-Length
		httpserver.Handler(mux, quiet()).ServeHTTP(recorder, httptest.NewRequest("GET", "/nowhere", nil))
		require.True(t, json.Valid(recorder.Body.Bytes()), recorder.Body)
	})

	t.Run("another method is 405 and says which are allowed", func(t *testing.T) {
		for _, method := range []string{"DELETE", "OPTIONS", "PATCH"} {
			got := do(t, client, method, base+"/orders/1", nil)
			require.Equal(t, http.StatusMethodNotAllowed, got.StatusCode)
			require.Equal(t, "GET, HEAD", got.Header.Get("Allow"))
			require.Equal(t, "/problems/method-not-allowed", got.problem(t)["type"])
		}
	})

	t.Run("HEAD of a miss has the header only", func(t *testing.T) {
		got := do(t, client, "HEAD", base+"/nowhere", nil)
		require.Equal(t, http.StatusNotFound, got.StatusCode)
		require.Equal(t, "application/problem+json", got.Header.Get("Content-Type"))
		require.Positive(t, got.ContentLength)
		require.Empty(t, got.body)

		got = do(t, client, "HEAD", base+"/orders", nil)
		require.Equal(t, http.StatusMethodNotAllowed, got.StatusCode)
		require.Equal(t, "POST", got.Header.Get("Allow"))
	})

	t.Run("HEAD of a GET route is served", func(t *testing.T) {
		got := do(t, client, "HEAD", base+"/orders/1", nil)
		require.Equal(t, http.StatusOK, got.StatusCode)
		require.Positive(t, got.ContentLength)
		require.Empty(t, got.body)
	})

	t.Run("a hit is not touched", func(t *testing.T) {
		got := do(t, client, "GET", base+"/orders/1", nil)
		require.Equal(t, http.StatusOK, got.StatusCode)
		require.JSONEq(t, `"GET /orders/{id}"`, got.body)

		got = do(t, client, "GET", base+"/plain", nil)
		require.Equal(t, http.StatusNotFound, got.StatusCode)
		require.Equal(t, "plain\n", got.body)
	})

	t.Run("redirects of the router stay", func(t *testing.T) {
		got := do(t, client, "GET", base+"/docs", nil)
		require.Equal(t, http.StatusTemporaryRedirect, got.StatusCode)
		require.Equal(t, "/docs/", got.Header.Get("Location"))
	})

	t.Run("a target that is no path is 400", func(t *testing.T) {
		conn := dial(t, server)
		send(t, conn, "GET * HTTP/1.1\r\nHost: x\r\n\r\n")
		got := receive(t, conn)
		require.Equal(t, http.StatusBadRequest, got.StatusCode)
		require.Equal(t, "/problems/bad-request", got.problem(t)["type"])
	})

	t.Run("OPTIONS of the server as a whole is net/http's", func(t *testing.T) {
		conn := dial(t, server)
		send(t, conn, "OPTIONS * HTTP/1.1\r\nHost: x\r\n\r\n")
		require.Equal(t, http.StatusOK, receive(t, conn).StatusCode)
	})
}

func TestPatternIsSeenOutside(t *testing.T) {
	inner := route("GET /orders/{id}", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })
	request := httptest.NewRequest("GET", "/orders/1", nil)
	inner.ServeHTTP(httptest.NewRecorder(), request)
	require.Equal(t, "GET /orders/{id}", request.Pattern)
}

func TestPanics(t *testing.T) {
	var logs logbook
	mux := http.NewServeMux()
	mux.HandleFunc("GET /before", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Location", "/orders/1")
		w.Header().Set("Content-Length", "3")
		panic("secret of the house")
	})
	mux.HandleFunc("GET /after", func(w http.ResponseWriter, _ *http.Request) {
		_, err := io.WriteString(w, "half an answer")
		if err == nil {
			err = http.NewResponseController(w).Flush()
		}
		panic(errors.Join(errors.New("after the header"), err))
	})
	mux.HandleFunc("GET /flushed", func(w http.ResponseWriter, _ *http.Request) {
		flusher, ok := w.(http.Flusher)
		if ok {
			flusher.Flush()
		}
		panic("after the flush")
	})
	mux.HandleFunc("GET /hint", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusEarlyHints)
		panic("after a hint")
	})
	mux.HandleFunc("GET /abort", func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })

	handler := httpserver.Handler(mux, logs.logger(slog.LevelInfo))
	span := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{0xab}, SpanID: trace.SpanID{1}})
	server := serve(t, httpserver.DefaultConfig(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handler.ServeHTTP(w, r.WithContext(trace.ContextWithSpanContext(r.Context(), span)))
	}))
	base := "http://" + server.Addr()
	client := newClient(t)

	t.Run("before the header it is a 500 that shows nothing", func(t *testing.T) {
		got := do(t, client, "GET", base+"/before", nil)
		require.Equal(t, http.StatusInternalServerError, got.StatusCode)
		require.Equal(t, "/problems/internal-error", got.problem(t)["type"])
		require.NotContains(t, got.body, "secret")
		require.Empty(t, got.Header.Values("Location"))
	})

	t.Run("it is logged with stack and trace id", func(t *testing.T) {
		require.Contains(t, logs.String(), `panic="secret of the house"`)
		require.Contains(t, logs.String(), "handler_test.go")
		require.Contains(t, logs.String(), "trace_id="+span.TraceID().String())
	})

	t.Run("a hint is not the header yet", func(t *testing.T) {
		require.Equal(t, http.StatusInternalServerError, do(t, client, "GET", base+"/hint", nil).StatusCode)
	})

	t.Run("after the header the connection is aborted", func(t *testing.T) {
		response, err := client.Get(base + "/after")
		require.NoError(t, err)
		body, err := io.ReadAll(response.Body)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		require.Equal(t, "half an answer", string(body))
		require.NoError(t, response.Body.Close())
		require.Contains(t, logs.String(), "after the header")

		response, err = client.Get(base + "/flushed")
		require.NoError(t, err)
		_, err = io.ReadAll(response.Body)
		require.ErrorIs(t, err, io.ErrUnexpectedEOF)
		require.NoError(t, response.Body.Close())
	})

	t.Run("an abort on purpose passes, unlogged", func(t *testing.T) {
		_, err := client.Get(base + "/abort") //nolint:bodyclose // there is no response
		require.ErrorIs(t, err, io.EOF)
		require.NotContains(t, logs.String(), "path=/abort")
	})
}

func TestHandlersCanStream(t *testing.T) {
	server := serve(t, httpserver.DefaultConfig(), route("POST /", func(w http.ResponseWriter, r *http.Request) {
		control := http.NewResponseController(w)
		err := errors.Join(control.EnableFullDuplex(), control.Flush())
		buffer := make([]byte, 4)
		for err == nil {
			if _, err = io.ReadFull(r.Body, buffer); err == nil {
				_, err = w.Write(buffer)
			}
			if err == nil {
				err = control.Flush()
			}
		}
		if !errors.Is(err, io.EOF) {
			panic(err)
		}
	}))

	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	reader, writer := io.Pipe()
	request, err := http.NewRequestWithContext(ctx, "POST", "http://"+server.Addr(), reader)
	require.NoError(t, err)
	response, err := newClient(t).Do(request) // the header comes before the body was sent
	require.NoError(t, err)
	for _, line := range []string{"one.", "two.", "six."} {
		_, err := io.WriteString(writer, line)
		require.NoError(t, err)
		echo := make([]byte, len(line))
		_, err = io.ReadFull(response.Body, echo)
		require.NoError(t, err)
		require.Equal(t, line, string(echo))
	}
	require.NoError(t, writer.Close())
	require.Empty(t, read(t, response).body)
}

func BenchmarkHandler(b *testing.B) {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) })
	for name, handler := range map[string]http.Handler{"mux": mux, "handler": httpserver.Handler(mux, quiet())} {
		b.Run(name, func(b *testing.B) {
			request := httptest.NewRequest("POST", "/orders", strings.NewReader(""))
			recorder := httptest.NewRecorder()
			b.ReportAllocs()
			for b.Loop() {
				handler.ServeHTTP(recorder, request)
			}
		})
	}
}
