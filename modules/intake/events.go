package intake

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"sluice/platform/httpserver"
)

// GET /orders/{id}/events is a stream of server-sent events
// (https://html.spec.whatwg.org/multipage/server-sent-events.html): one for
// each change of an order's status, the present one first, until the final one.

const (
	// eventComment is the time between two comment lines, by which proxies and
	// both ends see that the other one is there.
	eventComment = 15 * time.Second
	// eventPatience is how long a client may keep one event from going out by
	// not reading.
	eventPatience = 30 * time.Second
	// A client whose stream has broken off comes back after a time between
	// these two.
	eventRetryMin = 500 * time.Millisecond
	eventRetryMax = 3 * time.Second
)

// stream is one client that follows an order.
type stream struct {
	m      *Module
	watch  *watch
	order  *order // as it was told last
	lastID string // of the event that the client has
}

// streamKey is the key of a *stream in the context of the request that opens it.
type streamKey struct{}

// events serves GET /orders/{id}/events. Only the opening is traced and measured
// as a request: a span that ends after hours is of no use to anybody, and the
// time that an order takes is no latency of ours.
func (m *Module) events(pattern string) http.Handler {
	opening := m.traced(pattern, m.openEvents)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s := &stream{m: m}
		opening.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), streamKey{}, s)))
		if s.watch != nil {
			defer m.waiters.leave(s.watch)
		}
		if s.order != nil {
			s.run(w, r)
		}
	})
}

// openEvents answers what is no stream, and else begins the stream of the
// request's context, which then has an order.
func (m *Module) openEvents(w http.ResponseWriter, r *http.Request) {
	if accept := strings.Join(r.Header.Values("Accept"), ","); !acceptsEvents(accept) {
		httpserver.WriteProblem(w, r, problemNotAcceptable(accept))
		return
	}
	s, _ := r.Context().Value(streamKey{}).(*stream) // it is nothing else
	id, _ := uuid.Parse(r.PathValue("id"))           // find answers where it is none
	s.watch = m.waiters.watch(id)
	o, ok := m.find(w, r)
	s.lastID = r.Header.Get("Last-Event-ID")
	if ok && m.beginEvents(w, r, o, s.lastID) {
		s.order = o
	}
}

// beginEvents answers with the header, and reports whether events are to
// follow.
func (m *Module) beginEvents(w http.ResponseWriter, r *http.Request, o *order, lastID string) bool {
	header := w.Header()
	header.Set("Cache-Control", "no-store")
	if o.Status.Final() && lastID == eventID(o) {
		// The client has all that there is to know, and comes back all the
		// same, as EventSource does, unless it is told not to.
		w.WriteHeader(http.StatusNoContent)
		return false
	}
	header.Set("Content-Type", "text/event-stream")
	header.Set("X-Accel-Buffering", "no")
	w.WriteHeader(http.StatusOK)
	return r.Method != http.MethodHead
}

// run sends events until the order is final or gone, the client does not read
// or has left, or the server drains: then the client goes on elsewhere.
func (s *stream) run(w http.ResponseWriter, r *http.Request) {
	out := http.NewResponseController(w)
	retry := eventRetryMin + rand.N(eventRetryMax-eventRetryMin)
	first := fmt.Appendf(nil, "retry: %d\n\n", retry.Milliseconds())
	if eventID(s.order) != s.lastID {
		first = s.event(first)
	}
	if !send(w, out, first) {
		return
	}
	comment := time.NewTimer(eventComment)
	defer comment.Stop()
	for !s.order.Status.Final() {
		var text []byte
		select {
		case news := <-s.watch.news:
			if news == nil {
				return
			}
			if !news.after(s.order) {
				continue
			}
			s.order = news.sent(s.order)
			if eventID(news) == s.lastID {
				continue // another attempt, and the status is the same
			}
			text = s.event(nil)
		case <-comment.C:
			text = []byte(":\n\n")
		case <-httpserver.Draining(r.Context()):
			return
		case <-r.Context().Done():
			return
		}
		if !send(w, out, text) {
			return
		}
		comment.Reset(eventComment)
	}
}

// event appends the event of the order as it is.
func (s *stream) event(text []byte) []byte {
	s.lastID = eventID(s.order)
	res, _ := s.m.expect(s.order)
	data, err := json.Marshal(res)
	if err != nil { // it has been JSON before it was stored
		s.m.logger.Error("cannot encode an order", "order_id", s.order.ID, "error", err)
		return text
	}
	return fmt.Appendf(text, "id: %s\nevent: %s\ndata: %s\n\n", s.lastID, s.order.Status, bytes.TrimSpace(data))
}

// eventID names a status of an order, the same whoever tells it, and whenever.
// Between a replay and the next an order has each status once.
func eventID(o *order) string { return strconv.Itoa(o.AttemptBase) + "-" + string(o.Status) }

// send reports whether the client is there to take more.
func send(w http.ResponseWriter, out *http.ResponseController, text []byte) bool {
	// Each connection has a limit for a client that does not read; a stream
	// within an HTTP/2 connection has none but this.
	_ = out.SetWriteDeadline(time.Now().Add(eventPatience)) // then it has the former
	if _, err := w.Write(text); err != nil {
		return false
	}
	if out.Flush() != nil {
		return false
	}
	_ = out.SetWriteDeadline(time.Time{}) // in HTTP/2 it would end the stream when it comes
	return true
}

// acceptsEvents reads the header Accept (RFC 9110, section 12.5.1) for
// text/event-stream. The most specific range that fits counts.
func acceptsEvents(accept string) bool {
	if strings.TrimSpace(accept) == "" {
		return true
	}
	best, accepted := 0, false
	for rest := accept; rest != ""; {
		var part string
		part, rest = cutUnquoted(rest, ',')
		mediaType, params, err := mime.ParseMediaType(part)
		rank := map[string]int{"*/*": 1, "text/*": 2, "text/event-stream": 3}[mediaType]
		if err != nil || rank <= best {
			continue
		}
		q, err := strconv.ParseFloat(params["q"], 64)
		best, accepted = rank, params["q"] == "" || (err == nil && q > 0)
	}
	return accepted
}
