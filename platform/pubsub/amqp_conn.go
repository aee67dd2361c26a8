package pubsub

import (
	"bytes"
	"fmt"
	"net"
	"runtime"
	"sync"
	"sync/atomic"
	"time"
)

// mostUnwritten is how many bytes are collected while a write is under way. Who
// has more to say then waits, as for a peer that does not read.
const mostUnwritten = 256 << 10

// amqpConn is the network below the library.
//
// It tells its link of the connection's end before the library learns of it, so
// that nobody enters the library while it clears up.
//
// And it writes for many at once. The library flushes every publish and every
// ack by itself, each on the goroutine of its channel. Here they are collected
// while the last write is under way, and go out in one: fewer calls of the
// system and fewer packets, for the broker too, which reads them one by one.
// There is no timer, so a lone frame waits for nobody.
//
// A frame counts as written when it is collected, like one that the kernel has
// and the broker has not: what a frame is to bring about is certain only from
// the broker's answer. The order of frames stays, and what ends a connection in
// good order is the last of them. If a write fails, the link ends, and so does
// whatever comes after.
type amqpConn struct {
	net.Conn
	link  *amqpLink
	heard atomic.Int64 // when the broker last said something, in Unix nanoseconds

	mu        sync.Mutex
	change    sync.Cond // of what follows
	unwritten []byte
	spare     []byte // its last array
	writing   bool
	err       error // of the write that failed
}

func newAMQPConn(conn net.Conn, link *amqpLink) *amqpConn {
	c := &amqpConn{Conn: conn, link: link}
	c.change.L = &c.mu
	c.heard.Store(time.Now().UnixNano())
	return c
}

func (c *amqpConn) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if n > 0 {
		c.heard.Store(time.Now().UnixNano())
	}
	if err != nil {
		c.link.fail(fmt.Errorf("%w: %w", errLinkLost, err))
	}
	return n, err
}

// closeOK is the frame with which the library answers a broker that closes the
// connection; it acts on it when the answer is written.
var closeOK = []byte{1, 0, 0, 0, 0, 0, 4, 0, 10, 0, 51, 0xCE}

// Write takes p over. Its error is that of an earlier write.
func (c *amqpConn) Write(p []byte) (int, error) {
	c.link.touch()
	farewell := bytes.HasSuffix(p, closeOK)
	if farewell {
		c.link.fail(fmt.Errorf("%w: closed by the broker", errLinkLost))
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.err == nil && len(c.unwritten) >= mostUnwritten {
		c.change.Wait()
	}
	if c.err != nil {
		return 0, c.err
	}
	c.unwritten = append(c.unwritten, p...)
	if !c.writing {
		c.writing = true
		go c.flush()
	}
	for farewell && c.writing { // the library closes next
		c.change.Wait()
	}
	return len(p), nil
}

// flush writes until nothing is left or a write fails.
func (c *amqpConn) flush() {
	// Whoever is ready to run may join first, as in group.Group.
	runtime.Gosched()
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.unwritten) > 0 && c.err == nil {
		p := c.unwritten
		c.unwritten = c.spare[:0]
		c.change.Broadcast()
		c.mu.Unlock()
		_, err := c.Conn.Write(p)
		if err != nil {
			err = fmt.Errorf("%w: %w", errLinkLost, err)
			c.link.fail(err)
		}
		c.mu.Lock()
		c.spare, c.err = p, err
		c.change.Broadcast()
	}
	c.writing = false
	c.change.Broadcast()
}

// cut ends the connection without a word, and with what is not written yet.
func (c *amqpConn) cut() { _ = c.Conn.Close() }

// wait returns when nothing is written any more. Call it after the end.
func (c *amqpConn) wait() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for c.writing {
		c.change.Wait()
	}
}
