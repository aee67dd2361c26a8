package backend

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"
	"time"
)

const (
	maxBody    = 16 << 20
	maxControl = 64 << 10
)

var errBodyTooLarge = fmt.Errorf("the body is larger than %d MiB", maxBody>>20)

func (b *Backend) routes() *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders", b.postOrder)
	mux.HandleFunc("GET /orders/{orderNumber}", b.getOrder)
	mux.HandleFunc("GET /stats", func(w http.ResponseWriter, _ *http.Request) {
		stats, numbers := b.Counts()
		writeJSON(w, http.StatusOK, struct {
			Stats
			Numbers int `json:"numbers"`
		}{stats, numbers})
	})
	mux.HandleFunc("GET /control", func(w http.ResponseWriter, _ *http.Request) {
		cfg := b.Config()
		writeJSON(w, http.StatusOK, cfg.knobs())
	})
	mux.HandleFunc("PUT /control", b.putControl)
	return mux
}

func (b *Backend) postOrder(w http.ResponseWriter, r *http.Request) {
	b.arrive()
	body, err := readBody(r)
	switch {
	case errors.Is(err, errBodyTooLarge):
		b.turnBack(rejected)
		writeProblem(w, r, http.StatusRequestEntityTooLarge, "body-too-large", err.Error())
		return
	case err != nil: // the client is gone, or does not know how long its body is
		b.turnBack(failed)
		writeProblem(w, r, http.StatusBadRequest, "bad-request", "the body did not arrive in full")
		return
	}
	order, err := readOrder(r.Header, body)
	if err != nil {
		b.turnBack(rejected)
		writeProblem(w, r, http.StatusBadRequest, "unknown-order", err.Error())
		return
	}

	c := &call{order: order}
	switch b.serve(r.Context(), c) {
	case saved:
		writeJSON(w, http.StatusOK, struct {
			BackendID   string `json:"backendId"`
			OrderNumber string `json:"orderNumber"`
		}{c.key.backendID(), c.number})
	case rejected:
		writeProblem(w, r, http.StatusBadRequest, "order-refused", fmt.Sprintf("orders with a number like %s are not wanted here", c.number))
	case failed:
		setRetryAfter(w, c.retryAfter)
		writeProblem(w, r, c.failStatus, "out-of-order", "this request was chosen to fail")
	case turnedAway:
		setRetryAfter(w, c.retryAfter)
		writeProblem(w, r, http.StatusServiceUnavailable, "queue-full", "too many requests are waiting")
	case cutOff, givenUp:
		cut(w)
	}
}

func readBody(r *http.Request) ([]byte, error) {
	if r.ContentLength > maxBody {
		return nil, errBodyTooLarge
	}
	if r.ContentLength >= 0 {
		body := make([]byte, r.ContentLength)
		_, err := io.ReadFull(r.Body, body)
		return body, err
	}
	body, err := io.ReadAll(io.LimitReader(r.Body, maxBody+1))
	if len(body) > maxBody {
		return nil, errBodyTooLarge
	}
	return body, err
}

// savedOrder is the answer to GET /orders/{orderNumber}, up to its body.
type savedOrder struct {
	OrderNumber string            `json:"orderNumber"`
	ID          string            `json:"id"`
	BackendID   string            `json:"backendId"`
	Calls       uint32            `json:"calls"`
	Attempt     uint32            `json:"attempt"`
	Traceparent string            `json:"traceparent"`
	Headers     map[string]string `json:"headers"`
	SavedAt     string            `json:"savedAt"`
}

func (b *Backend) getOrder(w http.ResponseWriter, r *http.Request) {
	number := r.PathValue("orderNumber")
	b.mu.Lock()
	record, last, ok := b.ledger.find(number)
	b.mu.Unlock()
	if !ok {
		writeProblem(w, r, http.StatusNotFound, "order-not-found", fmt.Sprintf("no order %s is saved", number))
		return
	}
	document, err := json.Marshal(savedOrder{
		OrderNumber: number,
		ID:          last.id,
		BackendID:   last.key.backendID(),
		Calls:       record.calls,
		Attempt:     record.attempt,
		Traceparent: last.header.Get("Traceparent"),
		Headers:     flatten(last.header),
		SavedAt:     time.UnixMilli(record.savedAt).UTC().Format("2006-01-02T15:04:05.000Z07:00"),
	})
	if err != nil {
		writeProblem(w, r, http.StatusInternalServerError, "internal-error", "")
		return
	}
	// The body goes in by hand: json.Marshal would tidy it up, and it is to be compared byte for byte.
	document = append(document[:len(document)-1], `,"body":`...)
	document = append(document, asJSON(last.body)...)
	document = append(document, '}')
	w.Header().Set("Content-Type", "application/json")
	_, _ = w.Write(document) // a client that is gone needs no answer
}

func flatten(header http.Header) map[string]string {
	if header == nil {
		return nil
	}
	flat := make(map[string]string, len(header))
	for name, values := range header {
		flat[name] = strings.Join(values, ", ")
	}
	return flat
}

// asJSON returns a body that is JSON as it is, another one as a string, and one that was not kept as null.
func asJSON(body []byte) []byte {
	switch {
	case body == nil:
		return []byte("null")
	case json.Valid(body):
		return body
	}
	text, err := json.Marshal(string(body))
	if err != nil {
		return []byte("null") // cannot happen: every string has a JSON form
	}
	return text
}

func (b *Backend) putControl(w http.ResponseWriter, r *http.Request) {
	document, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxControl))
	if err != nil {
		writeProblem(w, r, http.StatusBadRequest, "invalid-knobs", err.Error())
		return
	}
	cfg, err := b.configure(func(cfg *Config) error { return cfg.change(document) })
	if err != nil {
		writeProblem(w, r, http.StatusBadRequest, "invalid-knobs", strings.ReplaceAll(err.Error(), "\n", "; "))
		return
	}
	writeJSON(w, http.StatusOK, cfg.knobs())
}

// cut closes the connection of a request without an answer, with a reset rather than a proper goodbye where it can.
func cut(w http.ResponseWriter) {
	conn, _, err := http.NewResponseController(w).Hijack()
	if err != nil {
		// Not a fault of ours: the way in which net/http lets a handler cut a connection that cannot be taken over (HTTP/2).
		panic(http.ErrAbortHandler)
	}
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0) // without it the client sees an orderly end, which will do
	}
	_ = conn.Close() // nothing was promised
}

// setRetryAfter rounds up, because coming too early is what the header is there to prevent.
func setRetryAfter(w http.ResponseWriter, pause time.Duration) {
	if pause <= 0 {
		return
	}
	seconds := int64(pause / time.Second)
	if pause%time.Second > 0 {
		seconds++
	}
	w.Header().Set("Retry-After", strconv.FormatInt(seconds, 10))
}

// problem is an RFC 9457 document.
type problem struct {
	Type     string `json:"type"`
	Title    string `json:"title"`
	Status   int    `json:"status"`
	Detail   string `json:"detail,omitempty"`
	Instance string `json:"instance"`
}

func writeProblem(w http.ResponseWriter, r *http.Request, status int, name, detail string) {
	w.Header().Set("Content-Type", "application/problem+json")
	writeJSON(w, status, problem{
		Type:     "/problems/" + name,
		Title:    http.StatusText(status),
		Status:   status,
		Detail:   detail,
		Instance: r.URL.Path,
	})
}

func writeJSON(w http.ResponseWriter, status int, value any) {
	document, err := json.Marshal(value)
	if err != nil { // cannot happen with the types of this package
		http.Error(w, err.Error(), http.StatusInternalServerError)
		return
	}
	if w.Header().Get("Content-Type") == "" {
		w.Header().Set("Content-Type", "application/json")
	}
	w.WriteHeader(status)
	_, _ = w.Write(document) // a client that is gone needs no answer
}
