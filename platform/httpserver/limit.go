package httpserver

import (
	"net"
	"sync"
	"time"
)

// connectionLimit returns how many connections a listener may have open, 0 for
// no limit. It leaves a quarter of the files that the process may have open to
// everything else: clients who open all the connections that they get must not
// keep the backend, the store or the operators out.
func connectionLimit(wanted, files int) int {
	if most := files / 4 * 3; files > 0 && (wanted == 0 || wanted > most) {
		return most
	}
	return wanted
}

// limitListener hands out at most so many open connections; the rest wait in
// the kernel's queue. It does what golang.org/x/net/netutil does, but its
// connections still are TCP connections: net/http looks for CloseWrite before
// it hangs up on a client that is still sending, and without it that client
// gets a reset instead of the answer (431, 400).
type limitListener struct {
	*net.TCPListener
	writeTimeout time.Duration
	permits      chan struct{} // one token for each open connection; nil without a limit
	closed       chan struct{}
	once         sync.Once
}

// newLimitListener returns a listener with that many connections at most, 0 for
// no limit, which are cut off when they take in nothing for writeTimeout.
func newLimitListener(listener *net.TCPListener, limit int, writeTimeout time.Duration) *limitListener {
	l := &limitListener{TCPListener: listener, writeTimeout: writeTimeout, closed: make(chan struct{})}
	if limit > 0 {
		l.permits = make(chan struct{}, limit)
	}
	return l
}

func (l *limitListener) Accept() (net.Conn, error) {
	if l.permits != nil {
		select {
		case l.permits <- struct{}{}:
		case <-l.closed:
			return nil, net.ErrClosed
		}
	}
	conn, err := l.AcceptTCP()
	if err != nil {
		l.release()
		return nil, err
	}
	return &limitedConn{TCPConn: conn, writeTimeout: l.writeTimeout, release: sync.OnceFunc(l.release)}, nil
}

func (l *limitListener) release() {
	if l.permits != nil {
		<-l.permits
	}
}

func (l *limitListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.TCPListener.Close()
}

type limitedConn struct {
	*net.TCPConn
	writeTimeout time.Duration
	release      func() // gives the permit back; idempotent
}

// writePiece is how much of an answer is to go out within the timeout: a whole
// answer may be of any size, or a stream without an end. (The kernel lets a
// writer go on when a third of its buffer is free, so a reader is to be a little
// faster than this.)
const writePiece = 64 << 10

// Write gives up on a client that does not read. net/http's own WriteTimeout
// would do so only together with all handlers that wait for something.
func (c *limitedConn) Write(p []byte) (n int, err error) {
	for {
		if err := c.SetWriteDeadline(time.Now().Add(c.writeTimeout)); err != nil {
			return n, err
		}
		m, err := c.TCPConn.Write(p[n:min(len(p), n+writePiece)])
		n += m
		if err != nil || n == len(p) {
			return n, err
		}
	}
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.TCPConn.Close()
}
