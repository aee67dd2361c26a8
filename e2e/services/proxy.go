package services

import (
	"io"
	"net"
	"net/url"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// Proxy stands between a process and a service, so that a test can take the
// service away from it. It is safe for concurrent use.
type Proxy struct {
	tb       testing.TB
	upstream string
	address  string
	all      sync.WaitGroup

	mu       sync.Mutex
	listener net.Listener
	conns    []net.Conn
	hung     bool
}

// NewProxy returns a proxy to an upstream address, host:port. It has an address
// of its own but refuses connections until Start.
func NewProxy(tb testing.TB, upstream string) *Proxy {
	tb.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(tb, err)
	p := &Proxy{tb: tb, upstream: upstream, address: listener.Addr().String()}
	require.NoError(tb, listener.Close())
	tb.Cleanup(func() {
		p.Stop()
		p.all.Wait()
	})
	return p
}

// ProxyTo returns a started proxy to the host of an address, and the address
// that goes through it.
func ProxyTo(tb testing.TB, address string) (proxy *Proxy, through string) {
	tb.Helper()
	u, err := url.Parse(address)
	require.NoError(tb, err)
	proxy = NewProxy(tb, u.Host)
	proxy.Start()
	return proxy, proxy.Rewrite(address)
}

// Rewrite returns a URL with the proxy's address in place of its host.
func (p *Proxy) Rewrite(address string) string {
	p.tb.Helper()
	u, err := url.Parse(address)
	require.NoError(p.tb, err)
	u.Host = p.address
	return u.String()
}

// Start accepts connections, also again after Stop.
func (p *Proxy) Start() {
	p.tb.Helper()
	listener, err := net.Listen("tcp", p.address)
	require.NoError(p.tb, err)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.listener = listener
	p.all.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			p.serve(conn)
		}
	})
}

// Stop refuses new connections and cuts those that there are.
func (p *Proxy) Stop() {
	p.mu.Lock()
	if p.listener != nil {
		_ = p.listener.Close()
		p.listener = nil
	}
	p.mu.Unlock()
	p.Cut()
}

// Cut ends the connections that there are.
func (p *Proxy) Cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, conn := range p.conns {
		_ = conn.Close()
	}
	p.conns = nil
}

// Hang swallows what is sent in either direction, or stops to. Connections that
// went through a hung proxy are of no use afterwards.
func (p *Proxy) Hang(hung bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.hung = hung
}

func (p *Proxy) serve(client net.Conn) {
	service, err := net.Dial("tcp", p.upstream)
	if err != nil {
		_ = client.Close()
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.conns = append(p.conns, client, service)
	if p.listener == nil { // stopped in between
		_, _ = client.Close(), service.Close()
	}
	p.all.Go(func() { p.pump(client, service) })
	p.all.Go(func() { p.pump(service, client) })
}

// pump copies until either side ends, and ends the other.
func (p *Proxy) pump(to, from net.Conn) {
	defer to.Close()   //nolint:errcheck // it may be closed already
	defer from.Close() //nolint:errcheck // the same
	_, _ = io.Copy(writer(func(data []byte) (int, error) {
		p.mu.Lock()
		hung := p.hung
		p.mu.Unlock()
		if hung {
			return len(data), nil
		}
		return to.Write(data)
	}), from)
}

type writer func([]byte) (int, error)

func (w writer) Write(data []byte) (int, error) { return w(data) }
