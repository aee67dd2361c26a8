package httpserver

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"

	"go.opentelemetry.io/otel/trace"
)

// Handler serves next, with problem documents for what net/http would answer as
// plain text: 404 and 405 (with Allow) of a mux, and 500 for a panic, which
// is logged with its stack and shown to nobody. A panic after the header was
// sent aborts the connection, so that the client does not take half an answer
// for a whole one. http.ErrAbortHandler passes through.
//
// The ResponseWriter that handlers get can be flushed, and unwrapped by
// [http.ResponseController]. The request is handed on as it is: what the mux
// notes in it (Pattern, path values) is seen by whoever wraps this handler.
//
// A route that is traced by itself has a Handler of its own inside the span,
// where a panic still has a trace id.
func Handler(next http.Handler, logger *slog.Logger) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := &response{ResponseWriter: w, request: r}
		defer answer.recover(logger)
		next.ServeHTTP(answer, r)
	})
}

// response remembers whether the header is out, and puts a problem in the place
// of the mux's own errors.
//
// Replacing them here costs a hit nothing. Asking mux.Handler beforehand would
// match every request twice.
type response struct {
	http.ResponseWriter
	request *http.Request
	written bool // the header is out
	missed  bool // the problem is out, the mux's plain text is to be dropped
}

// Unwrap is for http.ResponseController.
func (w *response) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *response) WriteHeader(status int) {
	// The mux leaves the pattern empty when it answers by itself, and no route
	// can have an empty one. Its redirects are not errors and stay.
	if !w.written && status >= 400 && w.request.Pattern == "" {
		w.written, w.missed = true, true
		WriteProblem(w.ResponseWriter, w.request, missProblem(status, w.request.Method, w.Header().Get("Allow")))
		return
	}
	// 1xx are not the answer yet, except 101 after which there is no other.
	w.written = w.written || status >= 200 || status == http.StatusSwitchingProtocols
	w.ResponseWriter.WriteHeader(status)
}

func (w *response) Write(p []byte) (int, error) {
	if w.missed {
		return len(p), nil
	}
	w.written = true
	return w.ResponseWriter.Write(p)
}

// Flush is for handlers and libraries that ask for an http.Flusher.
func (w *response) Flush() { _ = w.FlushError() } // Flusher has no error

// FlushError is for http.ResponseController. A flush sends the header.
func (w *response) FlushError() error {
	w.written = true
	return http.NewResponseController(w.ResponseWriter).Flush()
}

// recover turns a panic of the handler into an answer. It is to be deferred.
func (w *response) recover(logger *slog.Logger) {
	cause := recover()
	if cause == nil {
		return
	}
	if err, ok := cause.(error); ok && errors.Is(err, http.ErrAbortHandler) {
		panic(http.ErrAbortHandler) // net/http's way to abort the connection
	}
	ctx := w.request.Context()
	attrs := []slog.Attr{
		slog.String("method", w.request.Method),
		slog.String("path", w.request.URL.Path),
		slog.String("panic", fmt.Sprint(cause)),
		slog.String("stack", string(debug.Stack())),
	}
	if id := trace.SpanContextFromContext(ctx).TraceID(); id.IsValid() {
		attrs = append(attrs, slog.String("trace_id", id.String()))
	}
	logger.LogAttrs(ctx, slog.LevelError, "handler panicked", attrs...)

	if w.written {
		panic(http.ErrAbortHandler) // as above
	}
	// What the handler had prepared belongs to an answer that will not come.
	clear(w.Header())
	WriteProblem(w.ResponseWriter, w.request, internalError())
}

func missProblem(status int, method, allow string) Problem {
	switch status {
	case http.StatusNotFound:
		return notFound()
	case http.StatusMethodNotAllowed:
		return methodNotAllowed(method, allow)
	default: // a request target that is no path, as in "GET *"
		return Problem{Type: "bad-request", Title: "Bad request", Status: status, Detail: "The request target is not a path."}
	}
}
