package intake

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/propagation"

	"sluice/modules/contract"
	"sluice/platform/httpserver"
)

// handle adds one traced route. The server span is named after the pattern. A
// panic is answered within it, so that its log line has the trace's id.
func (m *Module) handle(mux *http.ServeMux, pattern string, h http.HandlerFunc) {
	mux.Handle(pattern, otelhttp.NewHandler(httpserver.Handler(h, m.logger), pattern,
		otelhttp.WithTracerProvider(m.deps.TracerProvider),
		otelhttp.WithMeterProvider(m.deps.MeterProvider),
		otelhttp.WithPropagators(m.deps.Propagator)))
}

// postOrder is POST /orders.
func (m *Module) postOrder(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Vary", "Prefer")
	prefer := parsePrefer(r.Header.Values("Prefer"))
	if limit := m.cfg.MaxBacklog; limit > 0 && backlogOf(m.store.counts()) >= int64(limit) {
		m.refuse(w, r, problemBacklogFull(limit))
		return
	}
	held := room{bodies: m.bodies}
	defer held.release()
	o, ok := m.readOrder(w, r, &held)
	if !ok {
		return
	}
	o.PublishAt = o.AcceptedAt
	if o, ok = m.insert(w, r, o); !ok {
		return
	}
	// The store has it. A client that waits holds no memory.
	o.Body = nil
	held.release()
	if prefer.hasWait {
		if o, ok = m.await(w, r, o, prefer.wait); !ok {
			return
		}
	}
	if prefer.respondAsync && !prefer.hasWait {
		w.Header().Set("Preference-Applied", "respond-async")
	}
	w.Header().Set("Location", location(o))
	if prefer.hasWait && o.Status.Final() {
		m.writeOrder(w, r, http.StatusOK, o)
		return
	}
	m.writeOrder(w, r, http.StatusAccepted, o)
}

// insert commits the order and returns it, or the one that it repeats. When it
// returns false, the request has been answered.
func (m *Module) insert(w http.ResponseWriter, r *http.Request, o *order) (*order, bool) {
	c := &change{insert: o}
	// If the client leaves now, the order is stored all the same, and its body
	// takes memory until then: better wait for it here.
	if err := m.writer.do(context.WithoutCancel(r.Context()), c); err != nil {
		m.failed(w, r, "store an order", err)
		return nil, false
	}
	if c.changed {
		m.logger.Debug("order accepted", "order_id", o.ID, "trace_id", o.traceID())
		return o, true
	}
	holder := c.found
	sameKey := o.IdempotencyKey != "" && holder.IdempotencyKey == o.IdempotencyKey
	switch {
	case holder.Hash == o.Hash:
		w.Header().Set("Idempotent-Replayed", "true")
		return holder, true
	case sameKey:
		httpserver.WriteProblem(w, r, problemKeyReused(holder))
	default:
		httpserver.WriteProblem(w, r, problemDuplicate(holder))
	}
	return nil, false
}

// await holds the request until the order is final, or the client's wait (or
// intake.max_wait) is over, or the server drains.
func (m *Module) await(w http.ResponseWriter, r *http.Request, o *order, d time.Duration) (*order, bool) {
	d = min(d, m.cfg.MaxWait)
	w.Header().Set("Preference-Applied", "wait="+strconv.Itoa(int(d/time.Second)))
	timer := time.NewTimer(d)
	defer timer.Stop()
	for {
		news, leave := m.waiters.watch(o.ID)
		current, err := m.store.get(r.Context(), o.ID)
		if err != nil {
			leave()
			switch {
			case r.Context().Err() != nil: // nobody is there to answer
			case errors.Is(err, errNotFound):
				httpserver.WriteProblem(w, r, problemNotFound())
			default:
				m.failed(w, r, "read an order", err)
			}
			return nil, false
		}
		if current.Status.Final() {
			leave()
			return current, true
		}
		select {
		case <-news:
			leave()
			continue
		case <-timer.C:
		case <-httpserver.Draining(r.Context()):
		case <-r.Context().Done():
		}
		leave()
		return current, r.Context().Err() == nil
	}
}

// postOrderSync is POST /orders/sync: the direct way, without the queue.
func (m *Module) postOrderSync(w http.ResponseWriter, r *http.Request) {
	held := room{bodies: m.bodies}
	defer held.release()
	o, ok := m.readOrder(w, r, &held)
	if !ok {
		return
	}
	// After the body has been read: a slow sender calls no backend.
	if m.direct != nil {
		if !m.direct.TryAcquire(1) {
			m.refuse(w, r, problemSyncLimit(m.cfg.SyncLimit))
			return
		}
		defer m.direct.Release(1)
	}
	// Should this process die, the order becomes due when the call must have
	// ended, and goes on as an asynchronous one.
	o.Direct = true
	o.PublishAt = o.AcceptedAt.Add(m.deps.AttemptTimeout + directMargin)
	mine := o
	if o, ok = m.insert(w, r, o); !ok {
		return
	}
	w.Header().Set("Location", location(o))
	// The commit may have taken so long that the relay is about to take over.
	if o != mine || time.Until(o.PublishAt) < m.deps.AttemptTimeout {
		m.writeOrder(w, r, http.StatusAccepted, o)
		return
	}
	m.call(w, r, o)
}

const (
	// directMargin is how much longer than its call a direct order is protected
	// from the relay.
	directMargin = 30 * time.Second
	// directPatience is how long storing the outcome of a direct order is
	// tried, well within that margin.
	directPatience = 10 * time.Second
)

// call makes the one attempt of a direct order and answers with its outcome.
func (m *Module) call(w http.ResponseWriter, r *http.Request, o *order) {
	out, callErr := m.deps.Direct.Attempt(r.Context(), o.submitted())
	c := &change{id: o.ID, update: func(o *order) verdict {
		switch {
		case o.Direct && (callErr != nil || out.Type == contract.TypeAttemptFailed):
			return remove // nobody was promised anything
		case callErr == nil:
			return o.apply(out, now(), m.retry)
		case o.Status == contract.StatusAccepted && o.Attempts == 0:
			o.PublishAt = now() // a second client was promised this order
			return save
		default:
			return leave
		}
	}}
	if err := m.settle(r.Context(), c); err != nil {
		m.logger.ErrorContext(r.Context(), "cannot store the outcome of a direct order; it goes on as an asynchronous one",
			"order_id", o.ID, "trace_id", o.traceID(), "outcome", out.Type, "error", err)
		m.refuse(w, r, problemSyncUnknown(o))
		return
	}
	if callErr != nil {
		return // the client has left
	}
	if c.found != nil && c.changed {
		m.tell(c.found, out)
	}
	switch out.Type {
	case contract.TypeSaved:
		m.writeOrder(w, r, http.StatusOK, c.found)
	case contract.TypeRejected:
		httpserver.WriteProblem(w, r, problemSyncRejected(c.found))
	default:
		if c.found == nil {
			w.Header().Del("Location")
		}
		httpserver.WriteProblem(w, r, problemSyncFailed(out, c.found))
	}
}

// settle stores what became of a direct order, even if its client has left. It
// tries again for a while: the backend has been called, so to give up means to
// call it again.
func (m *Module) settle(ctx context.Context, c *change) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), directPatience)
	defer cancel()
	for pause := projectPauseMin; ; pause = min(2*pause, projectPauseMax) {
		err := m.writer.do(ctx, c)
		if err == nil || ctx.Err() != nil {
			return err
		}
		wait(ctx, pause, nil)
		if ctx.Err() != nil {
			return err
		}
	}
}

// readOrder reads, checks and builds an order from the request. A large body
// takes room, which the caller releases when it is done with the body. When it
// returns false, the request has been answered.
func (m *Module) readOrder(w http.ResponseWriter, r *http.Request, held *room) (*order, bool) {
	contentType := r.Header.Get("Content-Type")
	if !isJSON(contentType) {
		httpserver.WriteProblem(w, r, problemMediaType(contentType))
		return nil, false
	}
	key, err := parseIdempotencyKey(r.Header.Values("Idempotency-Key"))
	if err != nil {
		httpserver.WriteProblem(w, r, problemHeader("Idempotency-Key", err))
		return nil, false
	}
	body, ok := m.readBody(w, r, held)
	if !ok {
		return nil, false
	}
	doc, ok := m.check(w, r, body)
	if !ok {
		return nil, false
	}
	number := ""
	if m.cfg.OrderNumberPointer != "" {
		if number, ok = m.number.text(doc.value); !ok {
			httpserver.WriteProblem(w, r, problemInvalid([]httpserver.FieldError{{Pointer: m.cfg.OrderNumberPointer,
				Detail: "is the order number: must be a string of 1 to 255 bytes without control characters, or an integer"}}))
			return nil, false
		}
	}
	id, err := newID()
	if err != nil {
		m.failed(w, r, "accept an order", err)
		return nil, false
	}
	t := now()
	o := &order{
		ID: id, Number: number, IdempotencyKey: key,
		ContentType: contentType, Body: body, Size: len(body), Hash: doc.hash,
		Status: contract.StatusAccepted, AcceptedAt: t, UpdatedAt: t,
	}
	carrier := propagation.MapCarrier{}
	m.deps.Propagator.Inject(r.Context(), carrier)
	o.TraceParent, o.TraceState = carrier["traceparent"], carrier["tracestate"]
	return o, true
}

// isJSON accepts application/json, in UTF-8 if a charset is named (RFC 8259,
// section 8.1 knows no other).
func isJSON(contentType string) bool {
	if contentType == "application/json" {
		return true
	}
	mediaType, params, err := mime.ParseMediaType(contentType)
	charset := params["charset"]
	return err == nil && mediaType == "application/json" && (charset == "" || strings.EqualFold(charset, "utf-8"))
}

// getOrder is GET /orders/{id}.
func (m *Module) getOrder(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Vary", "Prefer")
	o, ok := m.find(w, r)
	if !ok {
		return
	}
	if prefer := parsePrefer(r.Header.Values("Prefer")); prefer.hasWait && !o.Status.Final() {
		if o, ok = m.await(w, r, o, prefer.wait); !ok {
			return
		}
	}
	m.writeOrder(w, r, http.StatusOK, o)
}

// find returns the order that the path names. When it returns false, the
// request has been answered.
func (m *Module) find(w http.ResponseWriter, r *http.Request) (*order, bool) {
	id, err := uuid.Parse(r.PathValue("id"))
	if err != nil {
		httpserver.WriteProblem(w, r, problemNotFound())
		return nil, false
	}
	o, err := m.store.get(r.Context(), id)
	switch {
	case errors.Is(err, errNotFound):
		httpserver.WriteProblem(w, r, problemNotFound())
	case err != nil:
		m.failed(w, r, "read an order", err)
	default:
		return o, true
	}
	return nil, false
}

const (
	listDefault = 50
	listMax     = 500
)

// listOrders is GET /orders.
func (m *Module) listOrders(w http.ResponseWriter, r *http.Request) {
	q, problem := parseQuery(r)
	if problem != nil {
		httpserver.WriteProblem(w, r, *problem)
		return
	}
	limit := q.limit
	q.limit++ // one more tells whether there is a next page
	orders, err := m.store.list(r.Context(), q)
	if err != nil {
		m.failed(w, r, "list orders", err)
		return
	}
	page := struct {
		Orders []resource `json:"orders"`
		Next   *string    `json:"next"`
	}{Orders: []resource{}}
	if len(orders) > limit {
		orders = orders[:limit]
		next := encodeCursor(orders[limit-1].ID)
		page.Next = &next
	}
	for _, o := range orders {
		page.Orders = append(page.Orders, resourceOf(o))
	}
	httpserver.WriteJSON(w, r, http.StatusOK, page)
}

func parseQuery(r *http.Request) (query, *httpserver.Problem) {
	bad := func(name, detail string) (query, *httpserver.Problem) {
		p := problemQuery(name, detail)
		return query{}, &p
	}
	values := r.URL.Query()
	q := query{status: contract.Status(values.Get("status")), number: values.Get("orderNumber"), limit: listDefault}
	if q.status != "" && !known(q.status) {
		return bad("status", "must be accepted, retrying, saved, rejected or dead")
	}
	if s := values.Get("limit"); s != "" {
		n, err := strconv.Atoi(s)
		if err != nil || n < 1 || n > listMax {
			return bad("limit", "must be a number from 1 to "+strconv.Itoa(listMax))
		}
		q.limit = n
	}
	if s := values.Get("cursor"); s != "" {
		before, err := decodeCursor(s)
		if err != nil {
			return bad("cursor", "must be the \"next\" of an earlier answer")
		}
		q.before = before
	}
	return q, nil
}

func known(s contract.Status) bool {
	for _, status := range contract.Statuses() {
		if s == status {
			return true
		}
	}
	return false
}

// getAttempts is GET /orders/{id}/attempts.
func (m *Module) getAttempts(w http.ResponseWriter, r *http.Request) {
	o, ok := m.find(w, r)
	if !ok {
		return
	}
	history := o.History
	if history == nil {
		history = []attempt{}
	}
	httpserver.WriteJSON(w, r, http.StatusOK, map[string]any{"attempts": history})
}

// replayOrder is POST /admin/orders/{id}/replay.
func (m *Module) replayOrder(w http.ResponseWriter, r *http.Request) {
	id, err := uuid.Parse(r.PathValue("id"))
	if err != nil {
		httpserver.WriteProblem(w, r, problemNotFound())
		return
	}
	c := &change{id: id, update: func(o *order) verdict { return o.replay(now()) }}
	if err := m.writer.do(r.Context(), c); err != nil {
		m.failed(w, r, "replay an order", err)
		return
	}
	switch {
	case c.found == nil:
		httpserver.WriteProblem(w, r, problemNotFound())
	case !c.changed:
		httpserver.WriteProblem(w, r, problemNotDead(c.found))
	default:
		m.logger.Info("order replayed", "order_id", id, "trace_id", c.found.traceID())
		w.Header().Set("Location", location(c.found))
		m.writeOrder(w, r, http.StatusAccepted, c.found)
	}
}

// refuse answers 503 and says when to come back.
func (m *Module) refuse(w http.ResponseWriter, r *http.Request, p httpserver.Problem) {
	w.Header().Set("Retry-After", strconv.FormatInt(m.stats.retryAfter.Load(), 10))
	httpserver.WriteProblem(w, r, p)
}

// failed answers a request that the store could not serve, and logs why.
func (m *Module) failed(w http.ResponseWriter, r *http.Request, what string, err error) {
	m.logger.ErrorContext(r.Context(), "the store failed a request", "operation", what, "error", err)
	reading := r.Method == http.MethodGet || r.Method == http.MethodHead
	m.refuse(w, r, problemStorage(reading))
}

// resource is an order as clients see it.
type resource struct {
	ID            string          `json:"id"`
	OrderNumber   *string         `json:"orderNumber"`
	Status        contract.Status `json:"status"`
	Attempts      int             `json:"attempts"`
	AcceptedAt    string          `json:"acceptedAt"`
	UpdatedAt     string          `json:"updatedAt"`
	FinishedAt    *string         `json:"finishedAt"`
	NextAttemptAt *string         `json:"nextAttemptAt"`
	TraceID       string          `json:"traceId"`
	Backend       *backendAnswer  `json:"backend"`
	Problem       json.RawMessage `json:"problem"`
	Links         links           `json:"links"`
}

type backendAnswer struct {
	Status int `json:"status"`
	Body   any `json:"body"` // json.RawMessage or string
}

type links struct {
	Self string `json:"self"`
}

func resourceOf(o *order) resource {
	res := resource{
		ID: o.ID.String(), Status: o.Status, Attempts: o.Attempts,
		AcceptedAt: timestamp(o.AcceptedAt), UpdatedAt: timestamp(o.UpdatedAt),
		TraceID: o.traceID(), Problem: o.Problem, Links: links{Self: location(o)},
	}
	if o.Number != "" {
		res.OrderNumber = &o.Number
	}
	if !o.FinishedAt.IsZero() {
		at := timestamp(o.FinishedAt)
		res.FinishedAt = &at
	}
	if next := o.nextAttempt(); next.After(time.Now()) {
		at := timestamp(next)
		res.NextAttemptAt = &at
	}
	if o.BackendStatus != 0 {
		res.Backend = &backendAnswer{Status: o.BackendStatus, Body: answerBody(o.BackendBody)}
	}
	return res
}

// answerBody is JSON if it is JSON, else a string, null if there is none.
func answerBody(body []byte) any {
	switch {
	case len(body) == 0:
		return nil
	case json.Valid(body) && utf8.Valid(body):
		return json.RawMessage(body)
	default:
		return strings.ToValidUTF8(string(body), "\uFFFD")
	}
}

func timestamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

func location(o *order) string { return "/orders/" + o.ID.String() }

// writeOrder answers with the order's resource, its ETag, and when to ask
// again if it is not final.
func (m *Module) writeOrder(w http.ResponseWriter, r *http.Request, status int, o *order) {
	body, err := json.Marshal(resourceOf(o))
	if err != nil {
		m.failed(w, r, "encode an order", err)
		return
	}
	header := w.Header()
	if !o.Status.Final() {
		header.Set("Retry-After", strconv.FormatInt(m.stats.retryAfter.Load(), 10))
	}
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		sum := sha256.Sum256(body)
		etag := `"` + hex.EncodeToString(sum[:12]) + `"`
		header.Set("ETag", etag)
		header.Set("Cache-Control", "no-cache")
		if matches(r.Header.Values("If-None-Match"), etag) {
			w.WriteHeader(http.StatusNotModified)
			return
		}
	}
	header.Set("Content-Type", "application/json")
	header.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // the client may have left; there is nobody to tell
}

// matches implements If-None-Match (RFC 9110, section 13.1.2), which compares
// weakly.
func matches(fields []string, etag string) bool {
	for _, field := range fields {
		for candidate := range strings.SplitSeq(field, ",") {
			candidate = strings.TrimSpace(candidate)
			if candidate == "*" || strings.TrimPrefix(candidate, "W/") == etag {
				return true
			}
		}
	}
	return false
}
