package httpserver_test

import (
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"sluice/platform/httpserver"
)

// shown makes a connection of its own and returns the serial number of the
// certificate that it was shown.
func shown(t *testing.T, server *httpserver.Server, roots *x509.CertPool) int64 {
	t.Helper()
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", server.Addr(), &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12})
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close()) }()
	return conn.ConnectionState().PeerCertificates[0].SerialNumber.Int64()
}

// replace puts a new file in the place of another, as certbot and Kubernetes do.
func replace(t *testing.T, path string, data []byte) {
	t.Helper()
	next := path + ".new"
	require.NoError(t, os.WriteFile(next, data, 0o600))
	require.NoError(t, os.Rename(next, path))
}

func TestAChangedCertificateIsReadAgain(t *testing.T) {
	ca := newAuthority(t)
	one, oneKey := ca.issue(t, 1)
	two, twoKey := ca.issue(t, 2)
	three, threeKey := ca.issue(t, 3)
	cfg := httpserver.DefaultConfig()
	cfg.TLSCert, cfg.TLSKey = file(t, "cert.pem", one), file(t, "key.pem", oneKey)
	require.NoError(t, cfg.Validate())
	var logs logbook
	server := serveLogged(t, cfg, route("GET /", func(http.ResponseWriter, *http.Request) {}), logs.logger(slog.LevelInfo))
	client := newClientTrusting(t, ca.roots)
	get := func() {
		require.Equal(t, http.StatusOK, do(t, client, "GET", "https://"+server.Addr(), nil).StatusCode)
	}
	get()
	require.EqualValues(t, 1, shown(t, server, ca.roots))

	// Half of a renewal is not used, and told of once.
	replace(t, cfg.TLSCert, two)
	require.EqualValues(t, 1, shown(t, server, ca.roots))
	require.EqualValues(t, 1, shown(t, server, ca.roots))
	require.Equal(t, 1, strings.Count(logs.String(), "cannot be used; the old one stays"))
	require.Contains(t, logs.String(), "private key does not match")
	replace(t, cfg.TLSKey, twoKey)
	require.EqualValues(t, 2, shown(t, server, ca.roots))
	require.Equal(t, 1, strings.Count(logs.String(), "certificate replaced"))

	replace(t, cfg.TLSCert, []byte("nonsense"))
	require.EqualValues(t, 2, shown(t, server, ca.roots))
	require.NoError(t, os.Remove(cfg.TLSKey))
	require.EqualValues(t, 2, shown(t, server, ca.roots))
	require.EqualValues(t, 2, shown(t, server, ca.roots))
	require.Equal(t, 3, strings.Count(logs.String(), "cannot be used; the old one stays"), logs.String())

	// Written over, not replaced; and as a link that is turned.
	require.NoError(t, os.WriteFile(cfg.TLSCert, three, 0o600))
	dir := t.TempDir()
	require.NoError(t, os.WriteFile(filepath.Join(dir, "key"), threeKey, 0o600))
	require.NoError(t, os.Symlink(filepath.Join(dir, "key"), cfg.TLSKey))
	require.EqualValues(t, 3, shown(t, server, ca.roots))
	get() // on the connection that began with the first one
	require.NotContains(t, logs.String(), "PRIVATE KEY")
}

func TestManyHandshakesWhileTheCertificateChanges(t *testing.T) {
	ca := newAuthority(t)
	cert, key := ca.issue(t, 1)
	cfg := httpserver.DefaultConfig()
	cfg.TLSCert, cfg.TLSKey = file(t, "cert.pem", cert), file(t, "key.pem", key)
	server := serve(t, cfg, http.NotFoundHandler())
	var handshakes sync.WaitGroup
	for range 8 {
		handshakes.Go(func() {
			for range 10 {
				shown(t, server, ca.roots)
			}
		})
	}
	for serial := range int64(10) {
		cert, key := ca.issue(t, serial+2)
		replace(t, cfg.TLSCert, cert)
		replace(t, cfg.TLSKey, key)
	}
	handshakes.Wait()
	require.EqualValues(t, 11, shown(t, server, ca.roots))
}

func TestOldTLSIsRefused(t *testing.T) {
	cert, key, roots := keyPair(t)
	cfg := httpserver.DefaultConfig()
	cfg.TLSCert, cfg.TLSKey = cert, key
	server := serve(t, cfg, http.NotFoundHandler())
	for version, good := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
		dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: patience}, Config: &tls.Config{RootCAs: roots, MinVersion: version, MaxVersion: version}}
		conn, err := dialer.DialContext(t.Context(), "tcp", server.Addr())
		if !good {
			require.ErrorContains(t, err, "protocol version", tls.VersionName(version))
			continue
		}
		require.NoError(t, err)
		require.NoError(t, conn.Close())
	}
}
