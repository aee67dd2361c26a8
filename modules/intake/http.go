package intake

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"mime"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"
	"go.opentelemetry.io/contrib/instrumentation/net/http/otelhttp"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"

	"sluice/modules/contract"
	"sluice/platform/httpserver"
)

// handle adds one traced route.
func (m *Module) handle(mux *http.ServeMux, pattern string, h http.HandlerFunc) {
	mux.Handle(pattern, m.traced(pattern, h))
}

// traced gives a handler a server span, which is named after the pattern. A
// panic is answered within it, so that its log line has the trace's id.
func (m *Module) traced(pattern string, h http.HandlerFunc) http.Handler {
	return otelhttp.NewHandler(httpserver.Handler(named(h), m.logger), pattern,
		otelhttp.WithTracerProvider(m.deps.TracerProvider),
		otelhttp.WithMeterProvider(m.deps.MeterProvider),
		otelhttp.WithPropagators(m.deps.Propagator))
}

// named notes in the server span which client is asking.
func named(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if name := httpserver.ClientName(r.Context()); name != "" {
			trace.SpanFromContext(r.Context()).SetAttributes(attribute.String("sluice.client", name))
		}
		h(w, r)
	}
}

// postOrder is POST /orders.
func (m *Module) postOrder(w http.ResponseWriter, r *http.Request) {
	w.Header().Set("Vary", "Prefer")
	prefer := parsePrefer(r.Header.Values("Prefer"))
	held := room{bodies: m.bodies}
	defer held.release()
	o, ok := m.readOrder(w, r, &held)
	if !ok {
		return
	}
	o.PublishAt = o.AcceptedAt
	// After the body has been read: a slow sender keeps no place.
	if o, ok = m.enter(w, r, o); !ok {
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

// enter is insert with a place in the backlog, which a repetition does not need.
func (m *Module) enter(w http.ResponseWriter, r *http.Request, o *order) (*order, bool) {
	if m.backlog.enter(1) {
		defer m.backlog.leave(1)
		return m.insert(w, r, o)
	}
	switch repeats, err := m.repeats(r.Context(), o); {
	case err != nil:
		m.failed(w, r, "store an order", err)
	case repeats:
		return m.insert(w, r, o)
	default:
		m.refuse(w, r, problemBacklogFull(m.cfg.MaxBacklog))
	}
	return nil, false
}

// repeats reports whether an order of that number or key is there already. A
// client whose answer got lost learns so when the backlog is full, too.
func (m *Module) repeats(ctx context.Context, o *order) (bool, error) {
	if o.Number == "" && o.IdempotencyKey == "" {
		return false, nil
	}
	return m.store.holds(ctx, o)
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
		m.logger.Debug("order accepted", "order_id", o.ID, "client", o.Owner, "trace_id", o.traceID())
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
	if callErr != nil { // the client has left, or has closed its side and may be there still
		out.Error = "the call ended with the client's connection"
		httpserver.WriteProblem(w, r, problemSyncFailed(out, c.found))
		return
	}
	if c.found != nil && c.changed {
		m.tell(r.Context(), c.found, out, c.found.traceID())
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
	if !isMediaType(contentType, "application/json") {
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
	outline := m.outline(r, contentType)
	outline.IdempotencyKey = key
	o, problem := m.build(r.Context(), outline, body)
	if problem != nil {
		m.refuse(w, r, *problem)
		return nil, false
	}
	return o, true
}

// outline returns what all orders of one request have in common.
func (m *Module) outline(r *http.Request, contentType string) order {
	carrier := propagation.MapCarrier{}
	m.deps.Propagator.Inject(r.Context(), carrier)
	return order{
		Owner: httpserver.ClientName(r.Context()), ContentType: contentType, Status: contract.StatusAccepted,
		TraceParent: carrier["traceparent"], TraceState: carrier["tracestate"],
	}
}

// build completes the outline with a body, which it keeps, or says what is
// wrong with that.
func (m *Module) build(ctx context.Context, outline order, body []byte) (*order, *httpserver.Problem) {
	doc, problem := m.check(ctx, body)
	if problem != nil {
		return nil, problem
	}
	o := outline
	if m.cfg.OrderNumberPointer != "" {
		var ok bool
		if o.Number, ok = m.number.text(doc.value); !ok {
			p := problemInvalid([]httpserver.FieldError{{Pointer: m.cfg.OrderNumberPointer,
				Detail: "is the order number: must be a string of 1 to 255 bytes without control characters, or an integer"}})
			return nil, &p
		}
	}
	var err error
	if o.ID, err = newID(); err != nil {
		m.logger.ErrorContext(ctx, "cannot accept an order", "error", err)
		p := problemStorage(err)
		return nil, &p
	}
	o.Body, o.Size, o.Hash = body, len(body), doc.hash
	o.AcceptedAt = now()
	o.UpdatedAt = o.AcceptedAt
	return &o, nil
}

// isMediaType accepts the wanted type, in UTF-8 if a charset is named (RFC 8259,
// section 8.1 knows no other for JSON).
func isMediaType(contentType, want string) bool {
	if contentType == want {
		return true
	}
	mediaType, params, err := mime.ParseMediaType(contentType)
	charset := params["charset"]
	return err == nil && mediaType == want && (charset == "" || strings.EqualFold(charset, "utf-8"))
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

// find returns the order that the path names. Another client's order is not
// found, and the answer is the same as for one that does not exist. When it
// returns false, the request has been answered.
func (m *Module) find(w http.ResponseWriter, r *http.Request) (*order, bool) {
	id, err := uuid.Parse(r.PathValue("id"))
	if err != nil {
		httpserver.WriteProblem(w, r, problemNotFound())
		return nil, false
	}
	o, err := m.store.get(r.Context(), id)
	switch {
	case errors.Is(err, errNotFound), err == nil && o.Owner != httpserver.ClientName(r.Context()):
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
	q.owner = httpserver.ClientName(r.Context())
	found, err := m.list(r.Context(), q)
	switch {
	case err == nil:
	case r.Context().Err() != nil: // which is why, and nothing to log
		m.refuse(w, r, problemUnread())
		return
	case errors.Is(err, errTooSlow):
		m.logger.WarnContext(r.Context(), "a list took too long", "client", q.owner, "status", q.status, "by_number", q.number != "", "limit", q.limit)
		m.refuse(w, r, problemListTooSlow())
		return
	default:
		m.failed(w, r, "list orders", err)
		return
	}
	answer := struct {
		Orders []resource `json:"orders"`
		Next   *string    `json:"next"`
	}{Orders: []resource{}}
	if found.next != uuid.Nil {
		next := encodeCursor(found.next)
		answer.Next = &next
	}
	for _, o := range found.orders {
		res, _ := m.expect(o)
		answer.Orders = append(answer.Orders, res)
	}
	httpserver.WriteJSON(w, r, http.StatusOK, answer)
}

func parseQuery(r *http.Request) (query, *httpserver.Problem) {
	bad := func(name, detail string) (query, *httpserver.Problem) {
		p := problemQuery(name, detail)
		return query{}, &p
	}
	// URL.Query leaves out what it cannot read: a list without its filter.
	values, err := url.ParseQuery(r.URL.RawQuery)
	if err != nil {
		return bad("what follows the question mark", err.Error())
	}
	for _, name := range []string{"status", "orderNumber", "limit", "cursor"} {
		if len(values[name]) > 1 {
			return bad(name, "must not be given more than once")
		}
	}
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

// refuse answers with a problem; with a 503 it says when to come back.
func (m *Module) refuse(w http.ResponseWriter, r *http.Request, p httpserver.Problem) {
	if p.Status == http.StatusServiceUnavailable {
		w.Header().Set("Retry-After", strconv.FormatInt(seconds(m.outlook.patience(time.Now())), 10))
	}
	httpserver.WriteProblem(w, r, p)
}

// failed answers a request that the store could not serve, and logs why.
func (m *Module) failed(w http.ResponseWriter, r *http.Request, what string, err error) {
	m.logger.ErrorContext(r.Context(), "the store failed a request", "operation", what, "error", err)
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		m.refuse(w, r, problemUnread())
		return
	}
	m.refuse(w, r, problemStorage(err))
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
	// Of a waiting order, where they are known.
	QueuePosition       *int64  `json:"queuePosition"`
	EstimatedCompletion *string `json:"estimatedCompletion"`

	TraceID string          `json:"traceId"`
	Backend *backendAnswer  `json:"backend"`
	Problem json.RawMessage `json:"problem"`
	Links   links           `json:"links"`
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
	res, retryAfter := m.expect(o)
	body, err := json.Marshal(res)
	if err != nil {
		m.failed(w, r, "encode an order", err)
		return
	}
	header := w.Header()
	if !o.Status.Final() {
		header.Set("Retry-After", strconv.FormatInt(seconds(retryAfter), 10))
	}
	if r.Method == http.MethodGet || r.Method == http.MethodHead {
		etag := entityTag(o, body)
		header.Set("ETag", etag)
		header.Set("Cache-Control", "no-cache")
		if httpserver.ETagMatches(r.Header.Values("If-None-Match"), etag) {
			w.WriteHeader(http.StatusNotModified)
			return
		}
	}
	header.Set("Content-Type", "application/json")
	header.Set("Content-Length", strconv.Itoa(len(body)))
	w.WriteHeader(status)
	_, _ = w.Write(body) // the client may have left; there is nobody to tell
}

// expect returns the order's resource with what is to be expected of it, and
// when to ask again.
func (m *Module) expect(o *order) (resource, time.Duration) {
	res := resourceOf(o)
	if o.Status.Final() {
		return res, 0
	}
	e := m.outlook.of(o, time.Now())
	if e.position > 0 {
		res.QueuePosition = &e.position
	}
	if !e.completion.IsZero() {
		at := timestamp(e.completion)
		res.EstimatedCompletion = &at
	}
	return res, e.retryAfter
}

// entityTag returns the ETag of an order's resource. That of a waiting order is
// new all the time, with its place in the queue, while the order is the same:
// its tag is a weak one, of the order's state (RFC 9110, section 8.8.1).
func entityTag(o *order, body []byte) string {
	if !o.Status.Final() {
		return fmt.Sprintf(`W/"%d-%d-%s"`, o.UpdatedAt.UnixMicro(), o.Attempts, o.Status)
	}
	sum := sha256.Sum256(body)
	return `"` + hex.EncodeToString(sum[:12]) + `"`
}
