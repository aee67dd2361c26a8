package httpserver

import (
	"net"
	"sync"
)

// limitListener hands out at most so many open connections; the rest wait in
// the kernel's queue. It does what golang.org/x/net/netutil does, but its
// connections still are TCP connections: net/http looks for CloseWrite before
// it hangs up on a client that is still sending, and without it that client
// gets a reset instead of the answer (431, 400).
type limitListener struct {
	*net.TCPListener
	permits chan struct{} // one token for each open connection
	closed  chan struct{}
	once    sync.Once
}

func newLimitListener(listener *net.TCPListener, limit int) *limitListener {
	return &limitListener{TCPListener: listener, permits: make(chan struct{}, limit), closed: make(chan struct{})}
}

func (l *limitListener) Accept() (net.Conn, error) {
	select {
	case l.permits <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	conn, err := l.AcceptTCP()
	if err != nil {
		<-l.permits
		return nil, err
	}
	return &limitedConn{TCPConn: conn, release: sync.OnceFunc(func() { <-l.permits })}, nil
}

func (l *limitListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.TCPListener.Close()
}

type limitedConn struct {
	*net.TCPConn
	release func() // gives the permit back; idempotent
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.TCPConn.Close()
}
