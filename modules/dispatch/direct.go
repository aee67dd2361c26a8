package dispatch

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"sync"
	"syscall"
	"time"
)

// largestDirect is the largest body that is sent directly, in bytes: with its
// header it fits the send buffer of a connection that has nothing else to send.
// While a larger one is being written, the answer could come already.
const largestDirect = 16 << 10

// direct is an http.RoundTripper that sends small requests to one address by
// plain HTTP/1.1 on the goroutine of the caller, and passes all others on. In
// net/http two goroutines look after each connection, and hand each other the
// request and the answer: most of what an attempt costs is that. Requests and
// answers are written and read by net/http here as well.
//
// A request is never sent again. Its context cuts it.
type direct struct {
	others  *http.Transport
	address string
	most    int // idle connections

	mu     sync.Mutex
	idle   []*connection // the one that was used last comes last
	expiry *time.Timer   // set while there are idle ones
	closed bool          // no connection is kept any more
}

// RoundTrip implements http.RoundTripper.
func (d *direct) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.ContentLength > largestDirect {
		return d.others.RoundTrip(req)
	}
	c, err := d.connect(req.Context())
	if err != nil {
		return nil, err
	}
	release := context.AfterFunc(req.Context(), c.cut)
	resp, err := c.exchange(req)
	if err != nil {
		release()
		c.cut()
		return nil, err
	}
	answered := &answerBody{Reader: resp.Body, direct: d, connection: c, release: release,
		last: resp.Close || resp.StatusCode == http.StatusSwitchingProtocols || contradictory(resp)}
	resp.Body = answered
	if resp.ContentLength == 0 {
		answered.end(true)
	}
	return resp, nil
}

// contradictory reports whether an answer that has no body by its status (RFC
// 9112, section 6.3) announces one, which then might come all the same.
func contradictory(resp *http.Response) bool {
	if resp.StatusCode != http.StatusNoContent && resp.StatusCode != http.StatusNotModified {
		return false
	}
	length := resp.Header.Get("Content-Length")
	return len(resp.TransferEncoding) > 0 || (length != "" && length != "0")
}

// CloseIdleConnections closes all idle connections, and from now on each other
// one after its request.
func (d *direct) CloseIdleConnections() {
	d.others.CloseIdleConnections()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	d.closeIdle(len(d.idle))
}

// connect returns an idle connection that is still open, or a new one.
func (d *direct) connect(ctx context.Context) (*connection, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	for c := d.take(); c != nil; c = d.take() {
		if c.isOpen() {
			return c, nil
		}
		c.cut()
	}
	dialed, err := d.others.DialContext(ctx, "tcp", d.address)
	if err != nil {
		return nil, err
	}
	return newConnection(dialed)
}

func (d *direct) take() *connection {
	d.mu.Lock()
	defer d.mu.Unlock()
	last := len(d.idle) - 1
	if last < 0 {
		return nil
	}
	c := d.idle[last]
	d.idle[last] = nil
	d.idle = d.idle[:last]
	return c
}

func (d *direct) keep(c *connection) {
	c.idleSince = time.Now()
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed || len(d.idle) >= d.most {
		c.cut()
		return
	}
	d.idle = append(d.idle, c)
	if d.expiry == nil {
		d.expiry = time.AfterFunc(idleTimeout, d.expire)
	}
}

// expire closes what has been idle for too long, and comes again when that will
// be true of the next one.
func (d *direct) expire() {
	d.mu.Lock()
	defer d.mu.Unlock()
	now, old := time.Now(), 0
	for old < len(d.idle) && now.Sub(d.idle[old].idleSince) >= idleTimeout {
		old++
	}
	d.closeIdle(old)
	if len(d.idle) > 0 {
		d.expiry = time.AfterFunc(idleTimeout-now.Sub(d.idle[0].idleSince), d.expire)
	}
}

// closeIdle closes the n connections that have been idle for longest, and stops
// the timer. mu is held.
func (d *direct) closeIdle(n int) {
	for _, c := range d.idle[:n] {
		c.cut()
	}
	rest := copy(d.idle, d.idle[n:])
	clear(d.idle[rest:])
	d.idle = d.idle[:rest]
	if d.expiry != nil {
		d.expiry.Stop()
		d.expiry = nil
	}
}

// connection is one connection to the backend. One request at a time uses it.
type connection struct {
	conn   net.Conn
	raw    syscall.RawConn
	reader *bufio.Reader // over the connection itself, for the sake of allowed

	allowed   int64 // how many bytes may still be read
	idleSince time.Time
}

func newConnection(dialed net.Conn) (*connection, error) {
	c := &connection{conn: dialed}
	withDescriptor, ok := dialed.(syscall.Conn)
	if !ok {
		c.cut()
		return nil, fmt.Errorf("a connection of type %T has no descriptor", dialed)
	}
	raw, err := withDescriptor.SyscallConn()
	if err != nil {
		c.cut()
		return nil, err
	}
	c.raw, c.reader = raw, bufio.NewReader(c)
	return c, nil
}

// cut ends the connection, and with it whatever waits for it. It may be called
// more than once, and at any time.
func (c *connection) cut() { _ = c.conn.Close() } // nothing is expected of it any more

// Read reads no more than is allowed.
func (c *connection) Read(p []byte) (int, error) {
	if c.allowed <= 0 {
		return 0, fmt.Errorf("the header of the answer exceeds %d bytes", maxAnswerHeader)
	}
	n, err := c.conn.Read(p[:min(int64(len(p)), c.allowed)])
	c.allowed -= int64(n)
	return n, err
}

// requests holds the buffers in which requests are put together.
var requests = sync.Pool{New: func() any { return new(bytes.Buffer) }}

// exchange sends a request and reads the answer up to its body. Informational
// answers that precede it count towards the limit of its header.
func (c *connection) exchange(req *http.Request) (*http.Response, error) {
	buffer := requests.Get().(*bytes.Buffer)
	buffer.Reset()
	err := req.Write(buffer)
	if err == nil {
		_, err = c.conn.Write(buffer.Bytes())
	}
	requests.Put(buffer)
	if err != nil {
		return nil, err
	}
	c.allowed = maxAnswerHeader
	for {
		resp, err := http.ReadResponse(c.reader, req)
		if err != nil {
			return nil, err
		}
		if resp.StatusCode >= 200 || resp.StatusCode == http.StatusSwitchingProtocols || resp.StatusCode < 100 {
			c.allowed = math.MaxInt64
			return resp, nil
		}
	}
}

// answerBody is the body of an answer. At its end the connection is ready for
// the next request; closed before, it is not.
type answerBody struct {
	io.Reader
	direct     *direct
	connection *connection
	release    func() bool // of the context that cuts the connection
	last       bool        // nothing comes after this answer
	ended      bool
}

// Read implements io.Reader.
func (b *answerBody) Read(p []byte) (int, error) {
	n, err := b.Reader.Read(p)
	if err != nil {
		b.end(err == io.EOF) // a Reader returns this very value
	}
	return n, err
}

// Close implements io.Closer. It does not read what is left.
func (b *answerBody) Close() error {
	b.end(false)
	return nil
}

func (b *answerBody) end(complete bool) {
	if b.ended {
		return
	}
	b.ended = true
	// What is there beyond the answer was not asked for, and must not be taken
	// for the next one.
	if b.release() && complete && !b.last && b.connection.reader.Buffered() == 0 {
		b.direct.keep(b.connection)
		return
	}
	b.connection.cut()
}
