package load

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"
)

// Kinds of failures to get an answer, as they are named in Result.Errors.
const (
	failTimeout     = "timeout" // the client left at its deadline, or after 30 s
	failUnsent      = "unsent"  // it left before there was a connection, or the CPU, to send anything
	failRefused     = "refused"
	failReset       = "reset"
	failClosed      = "closed"      // the server closed the connection without an answer
	failDial        = "dial"        // no connection for another reason: no such host, no route
	failLocal       = "local"       // this machine has no more files or ports to give
	failInterrupted = "interrupted" // the run was ended early
	failOther       = "other"
)

// client sends attempts. It is safe for concurrent use.
type client struct {
	target    *url.URL
	header    http.Header // of every request; never changed
	transport *http.Transport
	slots     chan struct{} // holds an element for each attempt in flight; nil: no bound
}

func newClient(cfg Config, dial DialFunc) (*client, error) {
	target, err := url.Parse(cfg.URL)
	if err != nil {
		return nil, fmt.Errorf("parse the URL: %w", err)
	}
	c := &client{target: target, header: http.Header{"Content-Type": {"application/json"}}}
	maps.Copy(c.header, cfg.Header)
	if cfg.Connections > 0 {
		c.slots = make(chan struct{}, cfg.Connections)
	}
	c.transport = &http.Transport{
		// No proxy: it would be measured as well.
		DialContext: dial,
		// Every connection is kept: what a server does with many is part of what is measured.
		MaxIdleConnsPerHost: math.MaxInt32,
		// The slots bound the attempts. This bounds the connections, of which one may still be closing.
		MaxConnsPerHost:    cfg.Connections,
		DisableCompression: true,
		// HTTP/1.1 only, or a connection would not be a connection.
		TLSNextProto: map[string]func(string, *tls.Conn) http.RoundTripper{},
	}
	return c, nil
}

// errLeft is why the context of an attempt ends when its client leaves, unlike one that is interrupted.
var errLeft = errors.New("the client has left")

// acquire waits for a free connection until ctx ends, at leave at the latest. release must be called if and only if it
// returns nil.
func (c *client) acquire(ctx context.Context, leave time.Time) error {
	if c.slots != nil {
		select {
		case c.slots <- struct{}{}:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	if !time.Now().Before(leave) { // there is no time left to use it
		c.release()
		return errLeft
	}
	return nil
}

func (c *client) release() {
	if c.slots != nil {
		<-c.slots
	}
}

// post sends one attempt, reads its answer to the end and returns the status. It blocks until then, or until ctx ends.
func (c *client) post(ctx context.Context, body []byte) (status int, err error) {
	request := &http.Request{
		Method:        http.MethodPost,
		URL:           c.target,
		Host:          c.target.Host,
		Header:        c.header,
		Body:          io.NopCloser(bytes.NewReader(body)),
		ContentLength: int64(len(body)),
		// For connections that turn out to be closed before anything was written. After that nothing is sent twice unseen,
		// since a POST without an Idempotency-Key is not.
		GetBody: func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(body)), nil },
	}
	// Not through an http.Client, which would follow redirects.
	response, err := c.transport.RoundTrip(request.WithContext(ctx))
	if err != nil {
		return 0, err
	}
	defer func() { _ = response.Body.Close() }() // it was read, or its error is returned
	if _, err := io.Copy(io.Discard, response.Body); err != nil {
		return 0, err
	}
	return response.StatusCode, nil
}

// failure names the kind of an error of post. ctx is that of the attempt.
func failure(ctx context.Context, err error) string {
	var dial *net.OpError
	switch {
	case errors.Is(err, errLeft), errors.Is(context.Cause(ctx), errLeft):
		return failTimeout
	case ctx.Err() != nil:
		return failInterrupted
	case errors.Is(err, syscall.EMFILE), errors.Is(err, syscall.ENFILE), errors.Is(err, syscall.EADDRNOTAVAIL):
		return failLocal
	case errors.Is(err, syscall.ECONNREFUSED):
		return failRefused
	case errors.As(err, &dial) && dial.Op == "dial":
		return failDial
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPIPE):
		return failReset
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		return failClosed
	default:
		return failOther
	}
}

// Reach opens a connection to the server of rawURL and closes it again, within 5 s: an answer at once to the question
// whether a run makes sense.
func Reach(ctx context.Context, rawURL string) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	target, err := url.Parse(rawURL)
	if err != nil {
		return fmt.Errorf("parse the URL: %w", err)
	}
	port := target.Port()
	if port == "" {
		port = target.Scheme // the dialler knows the ports of http and https by name
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(target.Hostname(), port))
	if err != nil {
		return fmt.Errorf("reach %s: %w", rawURL, err)
	}
	_ = conn.Close() // nothing was sent
	return nil
}
