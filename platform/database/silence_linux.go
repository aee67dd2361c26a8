package database

import (
	"errors"
	"syscall"
	"time"
)

// tcpUserTimeout is TCP_USER_TIMEOUT (RFC 5482, tcp(7)), which package syscall
// does not name.
const tcpUserTimeout = 0x12

// boundSilence returns a net.Dialer.Control that breaks a TCP connection when
// what was sent is not acknowledged within d. Keep-alives do not see that: they
// are sent on idle connections only.
func boundSilence(d time.Duration) func(network, address string, c syscall.RawConn) error {
	return func(network, _ string, c syscall.RawConn) error {
		if network == "unix" {
			return nil
		}
		var refused error
		err := c.Control(func(fd uintptr) {
			refused = syscall.SetsockoptInt(int(fd), syscall.IPPROTO_TCP, tcpUserTimeout, int(d.Milliseconds()))
		})
		return errors.Join(err, refused)
	}
}
