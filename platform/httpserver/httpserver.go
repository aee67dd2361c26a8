// Package httpserver is how Sluice listens: a server that binds at once, stops
// gracefully and gives slow clients a limit; errors as problem documents
// (RFC 9457), those of the router and of a panic included; and the admin
// routes that an orchestrator and an operator ask for. It also says who may
// come in, by API key, and how often.
//
// It knows no module. Routes are registered on an [http.ServeMux] by whoever
// owns them, [Handler] turns the mux into what is served, [Admission] stands
// before that, [Listen] serves it.
// It is not a web framework: handlers are plain net/http handlers.
package httpserver

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/alecthomas/units"
)

// Config is the section "http". The same limits hold for both listeners.
type Config struct {
	// Addr is where clients connect, as host:port. An empty host means every
	// interface, port 0 any free port. Default ":8080".
	Addr string `koanf:"addr"`

	// AdminAddr is where operators connect: health, metrics, profiles and the
	// admin API, all without authentication. Default "127.0.0.1:8081".
	AdminAddr string `koanf:"admin_addr"`

	// TLSCert and TLSKey are PEM files; with both set, clients connect by TLS,
	// and files that change are read again. The admin listener is always plain.
	// Default: none.
	TLSCert string `koanf:"tls_cert"`
	TLSKey  string `koanf:"tls_key"`

	// APIKeys are the keys that clients may use. Without any, everybody is let
	// in. They guard the handlers behind Admission. Default: none.
	APIKeys APIKeys `koanf:"api_keys"`

	// RateLimit is how many orders per second each client may send, by the name
	// of its key; without keys, all clients together. It counts what reaches
	// this process. 0 means no limit. Default 0.
	RateLimit int `koanf:"rate_limit"`

	// RateBurst is how many orders a client may send at once after a pause, at
	// least RateLimit. 0 means the same as RateLimit. Default 0.
	RateBurst int `koanf:"rate_burst"`

	// ReadHeaderTimeout bounds the reading of a request's header. Default 5s.
	ReadHeaderTimeout time.Duration `koanf:"read_header_timeout"`

	// ReadTimeout bounds the reading of a whole request, body included. It does
	// not bound the handler: once the body is read, the handler has all the time
	// that it wants. Default 15s.
	ReadTimeout time.Duration `koanf:"read_timeout"`

	// WriteTimeout is how long a client may keep an answer from going on by not
	// reading it. It does not bound the whole answer. Default 30s.
	WriteTimeout time.Duration `koanf:"write_timeout"`

	// IdleTimeout is how long a kept-alive connection may wait for its next
	// request. Default 60s.
	IdleTimeout time.Duration `koanf:"idle_timeout"`

	// MaxHeader bounds request line and header together; net/http grants 4 KiB
	// more than this. Default 16KiB.
	MaxHeader units.Base2Bytes `koanf:"max_header"`

	// MaxConnections bounds the open connections of one listener; more of them
	// wait in the kernel until one closes. 0 means no limit. Where the process
	// may not have so many files open, three quarters of those are the limit.
	// Default 20000.
	MaxConnections int `koanf:"max_connections"`

	// ShutdownTimeout bounds the graceful stop of the whole process. Default 30s.
	ShutdownTimeout time.Duration `koanf:"shutdown_timeout"`
}

// DefaultConfig returns the configuration that is used when nothing is set.
func DefaultConfig() Config {
	return Config{
		Addr:              ":8080",
		AdminAddr:         "127.0.0.1:8081",
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       15 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeader:         16 * units.KiB,
		MaxConnections:    20_000,
		ShutdownTimeout:   30 * time.Second,
	}
}

// Validate returns every fault at once, each with its full key. It reads the
// TLS files, so that a wrong one is a configuration error and not a failing
// handshake later.
func (c Config) Validate() error {
	var faults []error
	fault := func(format string, args ...any) {
		faults = append(faults, fmt.Errorf(format, args...))
	}

	for _, a := range []struct{ key, addr string }{{keyAddr, c.Addr}, {keyAdminAddr, c.AdminAddr}} {
		if err := checkAddr(a.addr); err != nil {
			fault("%s: %w", a.key, err)
		}
	}
	if _, port, err := net.SplitHostPort(c.Addr); err == nil && port != "0" && c.Addr == c.AdminAddr {
		fault("%s: must differ from %s, both are %q", keyAdminAddr, keyAddr, c.Addr)
	}

	switch {
	case c.TLSCert != "" && c.TLSKey != "":
		faults = append(faults, checkKeyPair(c.TLSCert, c.TLSKey)...)
	case c.TLSCert != "":
		fault("http.tls_key: is missing, http.tls_cert is set")
	case c.TLSKey != "":
		fault("http.tls_cert: is missing, http.tls_key is set")
	}

	_, bad := c.APIKeys.parse()
	faults = append(faults, bad...)
	for _, n := range []struct {
		key   string
		value int
	}{{"http.rate_limit", c.RateLimit}, {"http.rate_burst", c.RateBurst}} {
		if n.value < 0 || n.value > maxRate {
			fault("%s: must be 0 to %d, is %d", n.key, maxRate, n.value)
		}
	}
	if c.RateBurst > 0 && c.RateBurst < c.RateLimit {
		fault("http.rate_burst: must be at least http.rate_limit (%d), or 0 for as many, is %d", c.RateLimit, c.RateBurst)
	}

	for _, d := range []struct {
		key   string
		value time.Duration
	}{
		{"http.read_header_timeout", c.ReadHeaderTimeout},
		{"http.read_timeout", c.ReadTimeout},
		{"http.write_timeout", c.WriteTimeout},
		{"http.idle_timeout", c.IdleTimeout},
		{"http.shutdown_timeout", c.ShutdownTimeout},
	} {
		if d.value <= 0 {
			fault("%s: must be more than 0, is %s", d.key, d.value)
		}
	}
	if c.ReadHeaderTimeout > 0 && c.ReadTimeout > 0 && c.ReadTimeout < c.ReadHeaderTimeout {
		fault("http.read_timeout: must be at least http.read_header_timeout (%s), is %s", c.ReadHeaderTimeout, c.ReadTimeout)
	}
	if c.MaxHeader < units.KiB || c.MaxHeader > units.GiB {
		fault("http.max_header: must be 1KiB to 1GiB, is %s", c.MaxHeader)
	}
	if c.MaxConnections < 0 {
		fault("http.max_connections: must be at least 0 (no limit), is %d", c.MaxConnections)
	}
	return errors.Join(faults...)
}

// maxRate is far more than this process can do, and fits into every number.
const maxRate = 1_000_000_000

const (
	keyAddr      = "http.addr"
	keyAdminAddr = "http.admin_addr"
)

func checkAddr(addr string) error {
	_, port, err := net.SplitHostPort(addr)
	if err != nil {
		return fmt.Errorf("must be host:port or :port, is %q", addr)
	}
	if _, err := strconv.ParseUint(port, 10, 16); err != nil {
		return fmt.Errorf("port must be a number from 0 to 65535, is %q", port)
	}
	return nil
}

// checkKeyPair reads both files and names the key of the one that is at fault.
func checkKeyPair(certFile, keyFile string) []error {
	var faults []error
	cert, err := os.ReadFile(certFile)
	if err != nil {
		faults = append(faults, fmt.Errorf("http.tls_cert: %w", err))
	} else if err := checkCertificate(cert); err != nil {
		faults = append(faults, fmt.Errorf("http.tls_cert: %s: %w", certFile, err))
	}
	key, err := os.ReadFile(keyFile)
	if err != nil {
		faults = append(faults, fmt.Errorf("http.tls_key: %w", err))
	}
	if len(faults) > 0 {
		return faults
	}
	// With the certificate known to be good, what is left can only be the key.
	if _, err := tls.X509KeyPair(cert, key); err != nil {
		faults = append(faults, fmt.Errorf("http.tls_key: %s: %w", keyFile, err))
	}
	return faults
}

func checkCertificate(data []byte) error {
	for {
		var block *pem.Block
		block, data = pem.Decode(data)
		if block == nil {
			return errors.New("holds no PEM certificate")
		}
		if block.Type == "CERTIFICATE" {
			_, err := x509.ParseCertificate(block.Bytes)
			return err
		}
	}
}
