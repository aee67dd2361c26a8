package dispatch

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/net/http/httpguts"

	"sluice/modules/contract"
)

// scope names our meter.
const scope = "sluice/modules/dispatch"

const (
	// directRoom is how many idle connections are kept beyond the concurrency,
	// for attempts made outside of the module (POST /orders/sync).
	directRoom = 256
	// idleTimeout lets us close an idle connection before common servers and
	// load balancers do (60 s and up): a connection that the other side closes
	// while we write to it is a failed attempt.
	idleTimeout = 30 * time.Second
	// maxAnswerHeader bounds the header of an answer. net/http allows 10 MiB,
	// for each attempt in flight.
	maxAnswerHeader = 256 << 10
	// The rest of an answer beyond dispatch.max_response is read up to
	// drainLimit bytes and for drainTime, so that its connection can be used
	// again. Past either a new connection is cheaper.
	drainLimit = 256 << 10
	drainTime  = 250 * time.Millisecond
	// maxOrderNumber bounds X-Order-Number in bytes: servers refuse long
	// headers with a 4xx, which would reject the order for good.
	maxOrderNumber = 1 << 10
	// maxContentType bounds the content type that is kept of an answer, in bytes.
	maxContentType = 256
)

// errTimeout is the cause of a context that backend.timeout ended, as opposed
// to one that the caller ended.
var errTimeout = errors.New("backend.timeout passed")

// Deps are what the client and the module need from the process. All are
// required.
type Deps struct {
	Logger         *slog.Logger
	TracerProvider trace.TracerProvider
	MeterProvider  metric.MeterProvider
	Propagator     propagation.TextMapPropagator
}

// Client calls the Backend API. It is safe for concurrent use and sets no limit
// of its own on how many attempts run at once.
type Client struct {
	url         *url.URL // without user and password
	host        string   // configured Host header, "" for the URL's
	address     string   // host:port, for the texts of outcomes
	header      http.Header
	timeout     time.Duration
	maxResponse int64

	transport  transport
	tracer     trace.Tracer
	span       []trace.SpanStartOption // of every call
	propagator propagation.TextMapPropagator
	durations  metric.Float64Histogram
}

// NewClient makes a client; it does not dial. Its errors are faults of the
// configuration.
func NewClient(cfg BackendConfig, dispatch Config, deps Deps) (*Client, error) {
	if err := errors.Join(cfg.Validate(), dispatch.Validate()); err != nil {
		return nil, err
	}
	u, err := parseURL(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("backend.url: %w", err)
	}
	durations, err := deps.MeterProvider.Meter(scope).Float64Histogram("sluice.dispatch.attempt.duration",
		metric.WithUnit("s"),
		metric.WithDescription("Duration of attempts at saving an order, by result."),
		metric.WithExplicitBucketBoundaries(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60))
	if err != nil {
		return nil, fmt.Errorf("create histogram of attempts: %w", err)
	}

	c := &Client{
		header:      backendHeader(cfg.Headers, u.User),
		address:     address(u),
		timeout:     cfg.Timeout,
		maxResponse: int64(dispatch.MaxResponse),
		tracer:      deps.TracerProvider.Tracer(scope),
		span:        spanOptions(u),
		propagator:  deps.Propagator,
		durations:   durations,
	}
	c.host = c.header.Get("Host") // which net/http takes from Request.Host alone
	u.User = nil
	u.Fragment, u.RawFragment = "", ""
	c.url = u
	c.transport = newTransport(u, c.host, cfg.Timeout, dispatch.Concurrency+directRoom)
	return c, nil
}

// transport is what carries a request to the backend.
type transport interface {
	http.RoundTripper
	CloseIdleConnections()
}

// newTransport returns net/http's or, where it can do the same for less, ours.
func newTransport(u *url.URL, host string, timeout time.Duration, idle int) transport {
	all := newHTTPTransport(timeout, idle)
	proxy, err := http.ProxyFromEnvironment(&http.Request{URL: u})
	if !canGoDirect || u.Scheme != "http" || proxy != nil || err != nil || !isPlainHost(u.Host) || !isPlainHost(host) {
		return all // which has its own way with a proxy that is no URL
	}
	return &direct{others: all, address: address(u), most: idle}
}

// isPlainHost reports whether a host, with or without a port, is sent the way it
// is written. Others have letters beyond ASCII or a zone.
func isPlainHost(host string) bool {
	return !strings.ContainsFunc(host, func(r rune) bool { return r <= ' ' || r >= 0x7f || r == '%' })
}

func newHTTPTransport(timeout time.Duration, idle int) *http.Transport {
	// A dial outlives the attempt that began it, so it has a limit of its own.
	dialer := &net.Dialer{Timeout: timeout, KeepAlive: 30 * time.Second}
	return &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            dialer.DialContext,
		ForceAttemptHTTP2:      true,
		TLSHandshakeTimeout:    timeout,
		MaxIdleConns:           idle,
		MaxIdleConnsPerHost:    idle, // the default, 2, would dial anew for almost every attempt
		IdleConnTimeout:        idleTimeout,
		MaxResponseHeaderBytes: maxAnswerHeader,
		// Answers are kept as the backend sent them, and a small one cannot
		// unpack into a large one.
		DisableCompression: true,
	}
}

func backendHeader(configured Headers, user *url.Userinfo) http.Header {
	header := http.Header{"User-Agent": {"sluice"}}
	if user != nil {
		password, _ := user.Password()
		header.Set("Authorization", "Basic "+base64.StdEncoding.EncodeToString([]byte(user.Username()+":"+password)))
	}
	for name, value := range configured {
		header.Set(name, value)
	}
	return header
}

func address(u *url.URL) string {
	port := u.Port()
	switch {
	case port != "":
	case u.Scheme == "https":
		port = "443"
	default:
		port = "80"
	}
	return net.JoinHostPort(u.Hostname(), port)
}

// Close closes the connections that are idle. Attempts that still run finish.
func (c *Client) Close() { c.transport.CloseIdleConnections() }

// Attempt makes one attempt at saving the order and says what became of it. It
// blocks until the answer is read, at most backend.timeout. At most one request
// reaches the backend.
//
// It returns an error only when ctx ended before there was an outcome: the
// backend may or may not have the order then. Everything else, that there is no
// backend included, is an outcome.
func (c *Client) Attempt(ctx context.Context, order contract.Submitted) (contract.Outcome, error) {
	started := time.Now()
	a, err := c.call(ctx, order)
	if err != nil {
		return contract.Outcome{}, err
	}
	outcome := contract.Outcome{
		OrderID:     order.OrderID,
		OrderNumber: order.OrderNumber,
		Attempt:     order.Attempt,
		StartedAt:   started,
		Duration:    time.Since(started),
		StatusCode:  a.status,
		ContentType: a.contentType,
		Body:        a.body,
		Truncated:   a.truncated,
		Timeout:     a.timedOut,
	}
	outcome.Type, outcome.Error = decide(a, c.address, c.timeout)
	if outcome.Type == contract.TypeAttemptFailed {
		outcome.RetryAfter = a.retryAfter
	}
	c.durations.Record(ctx, outcome.Duration.Seconds(), results[outcome.Type])
	return outcome, nil
}

// results label the histogram of attempts.
var results = map[string]metric.RecordOption{
	contract.TypeSaved:         result("saved"),
	contract.TypeRejected:      result("rejected"),
	contract.TypeAttemptFailed: result("attempt_failed"),
}

func result(name string) metric.RecordOption {
	return metric.WithAttributeSet(attribute.NewSet(attribute.String("result", name)))
}

// call sends the order and reads the answer. Its error means that the caller's
// context ended.
func (c *Client) call(ctx context.Context, order contract.Submitted) (a answer, err error) {
	ctx, cancel := context.WithTimeoutCause(ctx, c.timeout, errTimeout)
	defer cancel()
	ctx, span := c.tracer.Start(ctx, http.MethodPost, c.span...)
	defer span.End()
	defer func() { describeSpan(span, a, err) }()

	// The transport is called without an http.Client around it: there is no
	// redirect to follow, no cookie to keep, and no error that quotes the URL.
	resp, err := c.transport.RoundTrip(c.request(ctx, order))
	if err != nil {
		return interrupted(ctx, order, answer{err: err})
	}
	defer func() { _ = resp.Body.Close() }() // what was to be read is read

	a = answer{status: resp.StatusCode, retryAfter: retryAfter(resp.Header, time.Now())}
	if contentType := resp.Header.Get("Content-Type"); len(contentType) <= maxContentType {
		a.contentType = contentType
	}
	if a.status == http.StatusSwitchingProtocols {
		return a, nil // its body is the bare connection, which need not end
	}
	a.body, a.truncated, a.err = readAtMost(resp.Body, c.maxResponse)
	if a.err != nil {
		a.truncated = true
		return interrupted(ctx, order, a)
	}
	if a.truncated {
		drain(resp.Body, cancel)
	}
	return a, nil
}

// interrupted sorts out why a call with an error ended. The context's cause
// tells the two limits apart even when both have passed by now: it is the one
// that passed first.
func interrupted(ctx context.Context, order contract.Submitted, a answer) (answer, error) {
	switch cause := context.Cause(ctx); {
	case cause == nil:
		return a, nil
	case errors.Is(cause, errTimeout):
		a.timedOut = true
		return a, nil
	default:
		return answer{}, fmt.Errorf("attempt %d of order %s was interrupted: %w", order.Attempt, order.OrderID, cause)
	}
}

func (c *Client) request(ctx context.Context, order contract.Submitted) *http.Request {
	header := c.header.Clone()
	header.Set("Content-Type", order.ContentType)
	if order.ContentType == "" || !httpguts.ValidHeaderFieldValue(order.ContentType) {
		header.Set("Content-Type", "application/octet-stream")
	}
	header.Set("Idempotency-Key", quoted(order.OrderID))
	header.Set("X-Attempt", strconv.Itoa(order.Attempt))
	if number := headerSafe(order.OrderNumber); number != "" && len(number) <= maxOrderNumber {
		header.Set("X-Order-Number", number)
	}
	c.propagator.Inject(ctx, propagation.HeaderCarrier(header))
	// net/http takes an Idempotency-Key for leave to send a POST again, unseen,
	// when a reused connection dies under it (shouldRetryRequest in its
	// transport.go). The backend would see a repeat that nobody counts, after
	// it may have saved the order. It can do so only with a GetBody, or without
	// a body: hence no GetBody, and a Body even where it is empty.
	return (&http.Request{
		Method:        http.MethodPost,
		URL:           c.url,
		Host:          c.host,
		Header:        header,
		Body:          io.NopCloser(bytes.NewReader(order.Body)),
		ContentLength: int64(len(order.Body)),
		Proto:         "HTTP/1.1",
		ProtoMajor:    1,
		ProtoMinor:    1,
	}).WithContext(ctx)
}

// quoted writes a string of structured fields (RFC 9651 section 3.3.3).
func quoted(s string) string {
	safe := headerSafe(s)
	if strings.ContainsAny(safe, `\"`) {
		safe = strings.NewReplacer(`\`, `\\`, `"`, `\"`).Replace(safe)
	}
	return `"` + safe + `"`
}

// headerSafe percent-encodes the bytes that a header field cannot carry
// unharmed (controls, spaces at the ends, everything beyond ASCII) and the
// percent sign itself, so that decoding gives back the same text.
func headerSafe(s string) string {
	const hex = "0123456789ABCDEF"
	var b strings.Builder
	for i := range len(s) {
		switch ch := s[i]; {
		case ch > ' ' && ch <= '~' && ch != '%', ch == ' ' && i > 0 && i < len(s)-1:
			b.WriteByte(ch)
		default:
			b.Write([]byte{'%', hex[ch>>4], hex[ch&15]})
		}
	}
	return b.String()
}

// readAtMost reads a body up to limit bytes and reports whether there was more.
// An error means that the body broke off within them, or where they end.
func readAtMost(body io.Reader, limit int64) ([]byte, bool, error) {
	kept, err := io.ReadAll(io.LimitReader(body, limit+1))
	if int64(len(kept)) > limit {
		return kept[:limit], true, nil
	}
	return kept, false, err
}

// drain reads the rest of a body that is not kept. The answer is complete
// without it, so neither its end nor its errors matter.
func drain(body io.Reader, cancel context.CancelFunc) {
	defer time.AfterFunc(drainTime, cancel).Stop()
	_, _ = io.CopyN(io.Discard, body, drainLimit)
}
