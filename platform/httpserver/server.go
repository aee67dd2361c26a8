package httpserver

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// Server is one listener and what it serves. Its methods are safe for
// concurrent use.
type Server struct {
	name     string
	listener net.Listener
	server   *http.Server
	logger   *slog.Logger

	readTimeout, writeTimeout time.Duration // of a Duplex, and of a stream of HTTP/2

	inFlight atomic.Int64

	drainOnce sync.Once
	draining  chan struct{}
	cancel    context.CancelFunc // ends every request's context

	unused sync.Map // net.Conn: connections that have not sent a request yet
	spoilt sync.Map // net.Conn: connections in the middle of a body that nobody reads on
}

// serverKey is the key of the *Server in every request's context, connKey that of
// its net.Conn.
type (
	serverKey struct{}
	connKey   struct{}
)

// Listen binds addr at once, so that a port in use fails the start with one
// clear line; connections wait in the kernel until Serve. The name stands in
// logs: "public" is the clients' door, and the only one that speaks TLS and
// HTTP/2 when cfg has a certificate (files that change are read again, see
// Config); "admin" is the operators'. The chosen
// address is logged. The server owns the port until Shutdown, whether Serve was
// called or not.
func Listen(name, addr string, cfg Config, h http.Handler, logger *slog.Logger) (*Server, error) {
	var tlsConfig *tls.Config
	if name == "public" && cfg.TLSCert != "" {
		shown, err := openCertificate(cfg.TLSCert, cfg.TLSKey, logger)
		if err != nil {
			return nil, err
		}
		tlsConfig = &tls.Config{GetCertificate: shown.get, MinVersion: tls.VersionTLS12}
	}

	// net.Listen turns TCP keep-alive on, so that connections whose client
	// vanished without a word go away.
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, listenError(name, addr, err)
	}
	logger = logger.With("server", name)
	limit := connectionLimit(cfg.MaxConnections, fileLimit())
	if limit < cfg.MaxConnections {
		logger.Info("fewer connections than http.max_connections: the process may not have so many files open (ulimit -n)",
			"connections", limit, "wanted", cfg.MaxConnections)
	}
	if tcp, ok := listener.(*net.TCPListener); ok { // it is nothing else
		listener = newLimitListener(tcp, limit, cfg.WriteTimeout)
	}

	s := &Server{
		name: name, listener: listener, logger: logger, draining: make(chan struct{}),
		readTimeout: cfg.ReadTimeout, writeTimeout: cfg.WriteTimeout,
	}
	// Requests outlive the signal that starts the shutdown, so their contexts
	// have no parent; Shutdown ends them when its time is over.
	base, cancel := context.WithCancel(context.WithValue(context.Background(), serverKey{}, s))
	s.cancel = cancel
	s.server = &http.Server{
		Handler:           s.count(h),
		TLSConfig:         tlsConfig,
		ReadHeaderTimeout: cfg.ReadHeaderTimeout,
		ReadTimeout:       cfg.ReadTimeout,
		IdleTimeout:       cfg.IdleTimeout,
		MaxHeaderBytes:    int(cfg.MaxHeader),
		BaseContext:       func(net.Listener) context.Context { return base },
		ConnContext: func(ctx context.Context, conn net.Conn) context.Context {
			return context.WithValue(ctx, connKey{}, conn)
		},
		ConnState: s.track,
		ErrorLog:  log.New(errorLog{logger}, "", 0),
	}
	s.server.RegisterOnShutdown(s.closeUnused)
	logger.Info("listening", "addr", s.Addr(), "tls", tlsConfig != nil)
	return s, nil
}

// Addr is the address that the server is bound to, with the port that was
// chosen when it was asked for port 0.
func (s *Server) Addr() string { return s.listener.Addr().String() }

// Serve blocks and answers requests. It returns nil as soon as Shutdown starts,
// and an error if the listener breaks before. It can be called once.
func (s *Server) Serve() error {
	var err error
	if s.server.TLSConfig != nil {
		err = s.server.ServeTLS(s.listener, "", "") // the certificate is in TLSConfig
	} else {
		err = s.server.Serve(s.listener)
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve %s requests on %s: %w", s.name, s.Addr(), err)
}

// Shutdown stops gracefully: it closes the port and the Draining channel of
// every request, and blocks until the requests in flight are answered. When ctx
// ends before that, it cancels the contexts of the rest, cuts their connections
// and returns ctx's error with their number; it does not wait for their
// handlers. It is idempotent.
func (s *Server) Shutdown(ctx context.Context) error {
	s.drainOnce.Do(func() { close(s.draining) })
	defer s.cancel()

	err := s.server.Shutdown(ctx)
	_ = s.listener.Close() // closed already, unless Serve was never called
	if err == nil {
		return nil
	}
	cut := s.inFlight.Load()
	_ = s.server.Close() // of connections that are given up
	return fmt.Errorf("drain %s requests, %d still in flight: %w", s.name, cut, err)
}

// Draining returns a channel that closes when the server of this request starts
// to shut down. A handler that waits for something selects on it beside
// ctx.Done() and answers with what it has. ctx is that of the request; with
// another one the channel is nil and never closes.
func Draining(ctx context.Context) <-chan struct{} {
	if s, ok := ctx.Value(serverKey{}).(*Server); ok {
		return s.draining
	}
	return nil
}

func (s *Server) count(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		s.inFlight.Add(1)
		defer s.inFlight.Add(-1)
		if r.ProtoMajor == 2 {
			stream := newStreamWriter(w, s.writeTimeout)
			defer stream.arm() // the last of the answer goes out after this
			w = stream
		}
		h.ServeHTTP(w, r)
	})
}

func (s *Server) track(conn net.Conn, state http.ConnState) {
	s.trackUnused(conn, state)
	switch state {
	case http.StateIdle:
		if _, ok := s.spoilt.LoadAndDelete(conn); ok {
			hangUp(conn)
		}
	case http.StateClosed, http.StateHijacked:
		s.spoilt.Delete(conn)
	}
}

const (
	hangUpTime = time.Second
	hangUpSize = 1 << 20
)

// hangUp closes a connection whose client may still be sending. Data that comes
// to a closed connection resets it, and what the client has not read yet of the
// answer is lost then (RFC 9112, section 9.6): so it says that nothing more will
// come, and listens for a moment.
func hangUp(conn net.Conn) {
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		_ = half.CloseWrite()
		_ = conn.SetReadDeadline(time.Now().Add(hangUpTime))
		_, _ = io.Copy(io.Discard, io.LimitReader(conn, hangUpSize))
	}
	_ = conn.Close()
}

// trackUnused and closeUnused save a shutdown the five seconds that net/http
// grants a connection without a request. Clients open such connections to have
// them at hand (browsers, Go's own transport), and lose nothing: a request that
// comes now would not be served, just as on a connection that is idle.
func (s *Server) trackUnused(conn net.Conn, state http.ConnState) {
	switch state {
	case http.StateNew:
		s.unused.Store(conn, nil)
		select {
		case <-s.draining: // accepted at the last moment, closeUnused may have passed
			_ = conn.Close()
		default:
		}
	case http.StateActive, http.StateClosed, http.StateHijacked:
		s.unused.Delete(conn)
	}
}

func (s *Server) closeUnused() {
	for key := range s.unused.Range {
		if conn, ok := key.(net.Conn); ok { // it is nothing else
			_ = conn.Close() // of a connection that is given up
		}
	}
}

// listenError says in one line which setting to look at and what to do.
func listenError(name, addr string, err error) error {
	switch name {
	case "public":
		name = keyAddr
	case "admin":
		name = keyAdminAddr
	}
	// The operation and the address stand in our own text already.
	var op *net.OpError
	if errors.As(err, &op) {
		err = op.Err
	}
	var number syscall.Errno
	errors.As(err, &number)
	hint := ""
	switch {
	case number == syscall.EADDRINUSE, runtime.GOOS == "windows" && number == wsaEADDRINUSE:
		// Just the number: its text begins with the name of the system call.
		err, hint = number, "; another process has this port"
	case number == syscall.EADDRNOTAVAIL:
		err, hint = number, "; this machine does not have that address"
	case number == syscall.EACCES:
		err, hint = number, "; ports below 1024 may need more rights"
	}
	return fmt.Errorf("listen on %s (%s): %w%s", addr, name, err, hint)
}

// wsaEADDRINUSE is what Windows says; its syscall.EADDRINUSE is an invention.
const wsaEADDRINUSE syscall.Errno = 10048

// errorLog takes net/http's own lines. They are about clients (a failed TLS
// handshake, a malformed request) and of no interest, except two.
type errorLog struct{ logger *slog.Logger }

func (l errorLog) Write(line []byte) (int, error) {
	level := slog.LevelDebug
	for _, prefix := range []string{
		"http: Accept error",  // out of file descriptors: nobody can connect
		"http: panic serving", // of a handler that Handler does not guard
	} {
		if bytes.HasPrefix(line, []byte(prefix)) {
			level = slog.LevelError
		}
	}
	// There is no request to take a context from.
	l.logger.Log(context.Background(), level, "net/http", "line", string(bytes.TrimSpace(line)))
	return len(line), nil
}
