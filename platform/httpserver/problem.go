package httpserver

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"os"
	"slices"
	"strconv"
)

// Problem is an error as clients see it (RFC 9457).
type Problem struct {
	// Type is the stable bare name, such as "order-not-found"; it is written as
	// the relative URI "/problems/order-not-found". Empty: "about:blank".
	Type string

	// Title says what Type means, the same for every occurrence. Empty: the
	// standard text of Status.
	Title string

	// Status is the HTTP status code. 0: 500.
	Status int

	// Detail says what is wrong in this occurrence, for a person to read.
	Detail string

	// Instance is the URI of this occurrence. Empty: the request's path, when
	// the problem is written by WriteProblem.
	Instance string

	// Errors lists what is wrong in the request's body, member by member.
	Errors []FieldError

	// Members are written beside the standard ones. One whose name is taken, or
	// whose value cannot be written as JSON, is left out: a problem always
	// reaches the client.
	Members map[string]any
}

// FieldError is one fault in a request's body.
type FieldError struct {
	Pointer string `json:"pointer"` // JSON Pointer (RFC 6901) to the value
	Detail  string `json:"detail"`  // what is wrong with it
}

// MarshalJSON writes one flat object, the standard members first, the others
// sorted by name. The error is always nil.
func (p Problem) MarshalJSON() ([]byte, error) {
	standard := struct {
		Type     string       `json:"type"`
		Title    string       `json:"title"`
		Status   int          `json:"status"`
		Detail   string       `json:"detail,omitempty"`
		Instance string       `json:"instance,omitempty"`
		Errors   []FieldError `json:"errors,omitempty"`
	}{"about:blank", p.Title, p.status(), p.Detail, p.Instance, p.Errors}
	if p.Type != "" {
		standard.Type = "/problems/" + p.Type
	}
	if p.Title == "" {
		standard.Title = http.StatusText(standard.Status)
	}
	// Strings, numbers and lists of strings: there is nothing that could fail.
	object, _ := marshal(standard)
	object = object[:len(object)-1]

	for _, name := range slices.Sorted(maps.Keys(p.Members)) {
		if slices.Contains(standardMembers, name) {
			continue
		}
		value, err := marshal(p.Members[name])
		if err != nil {
			continue
		}
		key, _ := marshal(name) // a string
		object = append(object, ',')
		object = append(object, key...)
		object = append(object, ':')
		object = append(object, value...)
	}
	return append(object, '}'), nil
}

var standardMembers = []string{"type", "title", "status", "detail", "instance", "errors"}

// JSON is the problem document as it is sent and stored.
func (p Problem) JSON() []byte {
	document, _ := p.MarshalJSON() // never an error
	return document
}

func (p Problem) status() int {
	if p.Status == 0 {
		return http.StatusInternalServerError
	}
	return p.Status
}

// WriteProblem answers the request with the problem; the header must not have
// been written yet. Header fields that the handler has set stay, except those
// that describe another body. After 408 and 413 an HTTP/1 connection is closed:
// the rest of the request is still on its way and nobody will read it.
func WriteProblem(w http.ResponseWriter, r *http.Request, p Problem) {
	if p.Instance == "" {
		p.Instance = r.URL.EscapedPath()
	}
	header := w.Header()
	header.Set("Content-Type", "application/problem+json")
	header.Set("Cache-Control", "no-store")
	for _, name := range []string{"Content-Encoding", "Content-Disposition", "Etag", "Last-Modified"} {
		header.Del(name)
	}
	// In HTTP/2 the field would close every other stream of the connection too.
	unread := p.Status == http.StatusRequestTimeout || p.Status == http.StatusRequestEntityTooLarge
	if unread && r.ProtoMajor == 1 {
		header.Set("Connection", "close")
	}
	write(w, r, p.status(), append(p.JSON(), '\n'))
}

// WriteJSON answers the request with v as JSON; the header must not have been
// written yet. A v that cannot be written as JSON is a fault of the program: it
// is logged by the server, and the client gets a 500.
func WriteJSON(w http.ResponseWriter, r *http.Request, status int, v any) {
	body, err := marshal(v)
	if err != nil {
		if s, ok := r.Context().Value(serverKey{}).(*Server); ok {
			s.logger.ErrorContext(r.Context(), "answer cannot be written as JSON", "path", r.URL.Path, "error", err)
		}
		WriteProblem(w, r, internalError())
		return
	}
	w.Header().Set("Content-Type", "application/json")
	write(w, r, status, append(body, '\n'))
}

// ReadProblem tells what a client did wrong when reading its body failed: too
// much of it (413), too slow (408), or not all of it, be it cut off or wrongly
// chunked (400). It wants the error of the Read itself, not what a decoder or a
// scanner made of it, and reports false for nil, for io.EOF, and for a body that
// the program itself has closed.
func ReadProblem(err error) (Problem, bool) {
	var tooLarge *http.MaxBytesError
	switch {
	case err == nil, errors.Is(err, io.EOF), errors.Is(err, http.ErrBodyReadAfterClose):
		return Problem{}, false
	case errors.As(err, &tooLarge):
		return Problem{
			Type:   "body-too-large",
			Title:  "Body too large",
			Status: http.StatusRequestEntityTooLarge,
			Detail: "The body is larger than " + strconv.FormatInt(tooLarge.Limit, 10) + " bytes.",
		}, true
	case isTimeout(err):
		return Problem{
			Type:   "request-timeout",
			Title:  "Request timeout",
			Status: http.StatusRequestTimeout,
			Detail: "The body did not arrive in time.",
		}, true
	default:
		// Most of what is left has no type: net/http keeps the errors of a
		// malformed chunk and of a lost HTTP/2 client to itself.
		return Problem{
			Type:   "incomplete-body",
			Title:  "Incomplete body",
			Status: http.StatusBadRequest,
			Detail: "The body could not be received in full.",
		}, true
	}
}

func isTimeout(err error) bool {
	var network net.Error
	return errors.Is(err, os.ErrDeadlineExceeded) || errors.As(err, &network) && network.Timeout()
}

func notFound() Problem {
	return Problem{
		Type:   "not-found",
		Title:  "Not found",
		Status: http.StatusNotFound,
		Detail: "There is nothing at this path.",
	}
}

func methodNotAllowed(method, allow string) Problem {
	return Problem{
		Type:   "method-not-allowed",
		Title:  "Method not allowed",
		Status: http.StatusMethodNotAllowed,
		Detail: "This path does not know the method " + method + "; it knows " + allow + ".",
	}
}

func internalError() Problem {
	return Problem{
		Type:   "internal-error",
		Title:  "Internal error",
		Status: http.StatusInternalServerError,
		Detail: "The request met a fault of this server, which has been logged.",
	}
}

// write sends a whole answer. The length is given because a HEAD request gets
// the header only, which net/http cannot complete by itself then.
func write(w http.ResponseWriter, r *http.Request, status int, body []byte) {
	w.Header().Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	if r.Method != http.MethodHead {
		_, _ = w.Write(body) // the client has gone: there is nobody left to tell
	}
}

// marshal is json.Marshal without the escaping of <, > and & for HTML.
func marshal(v any) ([]byte, error) {
	var buffer bytes.Buffer
	encoder := json.NewEncoder(&buffer)
	encoder.SetEscapeHTML(false)
	if err := encoder.Encode(v); err != nil {
		return nil, err
	}
	return bytes.TrimSuffix(buffer.Bytes(), []byte("\n")), nil
}
