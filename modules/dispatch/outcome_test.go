package dispatch

import (
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// Failures that a test on loopback cannot bring about, or only on some systems.
func TestDescribe(t *testing.T) {
	dial := func(err error) error { return &net.OpError{Op: "dial", Net: "tcp", Err: err} }
	for _, tc := range []struct {
		name string
		err  error
		want string
	}{
		{"refused", dial(os.NewSyscallError("connect", syscall.ECONNREFUSED)), "connection refused by backend at api:80"},
		{"refused on Windows", dial(os.NewSyscallError("connectex", syscall.Errno(10061))), "connection refused by backend at api:80"},
		{"proxy refuses", &net.OpError{Op: "proxyconnect", Net: "tcp", Err: dial(os.NewSyscallError("connect", syscall.ECONNREFUSED))},
			"connect to the proxy for the backend: dial tcp: connect: connection refused"},
		{"no such host", dial(&net.DNSError{Err: "no such host", Name: "api", Server: "10.0.0.2:53", IsNotFound: true}), "backend host not found: api"},
		{"name server fails", dial(&net.DNSError{Err: "server misbehaving", Name: "api", Server: "10.0.0.2:53", IsTemporary: true}),
			"look up backend host api: server misbehaving"},
		{"no route", dial(os.NewSyscallError("connect", syscall.EHOSTUNREACH)), "connect to backend at api:80: connect: " + syscall.EHOSTUNREACH.Error()},
		{"reset while writing", &net.OpError{Op: "write", Net: "tcp", Err: syscall.EPIPE}, "backend at api:80 closed the connection without an answer"},
		{"reset on Windows", &net.OpError{Op: "read", Net: "tcp", Err: syscall.Errno(10054)}, "backend at api:80 closed the connection without an answer"},
		{"end instead of an answer", io.EOF, "backend at api:80 closed the connection without an answer"},
		{"certificate", fmt.Errorf("tls: %w", x509.UnknownAuthorityError{}), "call backend at api:80: tls: x509: certificate signed by unknown authority"},
		{"several lines", errors.New("one\r\n  two"), "call backend at api:80: one two"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.Equal(t, tc.want, describe(tc.err, "api:80"))
		})
	}

	long := describe(errors.New(strings.Repeat("ü", 1000)), "api:80")
	require.Less(t, len(long), 300)
}
