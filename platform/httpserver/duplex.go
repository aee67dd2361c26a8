package httpserver

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"time"
)

// ErrDraining is what reading from a Duplex ends with when the server starts to
// shut down, or when nobody is there any more to answer.
var ErrDraining = errors.New("no more of the request is read")

// Duplex is a request that is answered while its body still comes in, for as
// long as both go on. The time limits of the server, which are meant for a
// request as a whole, become limits of standing still: the client has
// Config.ReadTimeout from one Progress to the next, and Config.WriteTimeout to
// take in what one Write or Flush sends.
//
// One goroutine may read while another one writes. The handler must not return
// before Close, nor before both have ended.
type Duplex struct {
	server  *Server
	w       http.ResponseWriter
	r       *http.Request
	control *http.ResponseController

	readTimeout, writeTimeout time.Duration

	mu      sync.Mutex
	fresh   bool      // the next Read begins a new span of time
	until   time.Time // of the present one
	stopped bool
	ended   bool // there is no more of the body

	done  chan struct{}
	watch sync.WaitGroup
}

// NewDuplex makes a Duplex of a request of a Server, before anything of its
// body was read or of its answer written. It fails where the connection cannot
// do both at once.
func NewDuplex(w http.ResponseWriter, r *http.Request) (*Duplex, error) {
	s, ok := r.Context().Value(serverKey{}).(*Server)
	if !ok {
		return nil, errors.New("read and write at once: the request is of no server of this package")
	}
	d := &Duplex{
		server: s, w: w, r: r, control: http.NewResponseController(w),
		readTimeout: s.readTimeout, writeTimeout: s.writeTimeout,
		fresh: true, done: make(chan struct{}),
	}
	if err := d.control.EnableFullDuplex(); err != nil {
		return nil, fmt.Errorf("read and write at once: %w", err)
	}
	d.watch.Go(func() {
		select {
		case <-s.draining:
		case <-r.Context().Done():
		case <-d.done:
			return
		}
		d.Stop()
	})
	return d, nil
}

// Read reads from the body. It ends with ErrDraining after Stop, and with a
// timeout when it takes too long to the next Progress; see ReadProblem.
func (d *Duplex) Read(p []byte) (int, error) {
	if err := d.beforeRead(); err != nil {
		return 0, err
	}
	n, err := d.r.Body.Read(p)
	// A read that fails ends the context of the request, and so stops reading:
	// the time tells which was first.
	if d.afterRead(err) && err != nil && isTimeout(err) && time.Now().Before(d.until) {
		err = ErrDraining
	}
	return n, err
}

// beforeRead sets the deadline of the span of time that the Read is in.
func (d *Duplex) beforeRead() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return ErrDraining
	}
	if d.fresh {
		d.fresh, d.until = false, time.Now().Add(d.readTimeout)
	}
	return d.control.SetReadDeadline(d.until)
}

// afterRead takes the deadline away, since HTTP/2 ends a stream at its deadline
// whether anybody reads or not. It reports whether reading has been stopped.
func (d *Duplex) afterRead(err error) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ended = d.ended || errors.Is(err, io.EOF)
	if !d.stopped {
		_ = d.control.SetReadDeadline(time.Time{}) // as in Stop
	}
	return d.stopped
}

// Progress gives the client the whole time again, from the next Read on. It is
// for the goroutine that reads.
func (d *Duplex) Progress() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fresh = true
}

// Stop ends a Read under way and lets no other one begin. The answer can still
// be written. It is idempotent.
func (d *Duplex) Stop() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.stopped {
		return
	}
	d.stopped = true
	_ = d.control.SetReadDeadline(time.Unix(1, 0)) // of a connection that has gone: then no Read is under way either
}

// Write writes to the answer. Pieces of some KiB suit it: each has the whole
// time.
func (d *Duplex) Write(p []byte) (n int, err error) {
	err = d.timed(func() (err error) {
		n, err = d.w.Write(p)
		return err
	})
	return n, err
}

// Flush sends what has been written, and the header. When the client cannot be
// reached any more it may or may not say so; the context of the request ends.
func (d *Duplex) Flush() error { return d.timed(d.control.Flush) }

// timed gives a write its time, and takes the deadline away: see afterRead.
func (d *Duplex) timed(write func() error) error {
	if err := d.control.SetWriteDeadline(time.Now().Add(d.writeTimeout)); err != nil {
		return err
	}
	if err := write(); err != nil {
		return err
	}
	return d.control.SetWriteDeadline(time.Time{})
}

// Close waits until nothing of d touches the request any more. If the body has
// not been read to its end, the connection is closed behind the answer: net/http
// would take the rest of the body for the next request, since it does not look
// whether there is one when a handler reads and writes at once.
func (d *Duplex) Close() {
	close(d.done)
	d.watch.Wait()
	if conn, ok := d.r.Context().Value(connKey{}).(net.Conn); ok && !d.ended && d.r.ProtoMajor == 1 {
		d.server.spoilt.Store(conn, nil)
	}
}
