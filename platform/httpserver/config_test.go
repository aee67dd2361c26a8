package httpserver_test

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sluice/platform/httpserver"
)

func TestDefaultConfigIsValid(t *testing.T) {
	require.NoError(t, httpserver.DefaultConfig().Validate())
}

func TestValidate(t *testing.T) {
	cert, key, _ := keyPair(t)
	_, otherKey, _ := keyPair(t)
	missing := filepath.Join(t.TempDir(), "none.pem")
	noPEM := file(t, "text.pem", []byte("no certificate"))
	badDER := file(t, "bad.pem", []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"))

	tests := map[string]struct {
		change func(*httpserver.Config)
		faults []string // the start of each line, in order
	}{
		"a good key pair": {
			func(c *httpserver.Config) { c.TLSCert, c.TLSKey = cert, key },
			nil,
		},
		"free ports twice": {
			func(c *httpserver.Config) { c.Addr, c.AdminAddr = "127.0.0.1:0", "127.0.0.1:0" },
			nil,
		},
		"addresses without a port or with a bad one": {
			func(c *httpserver.Config) { c.Addr, c.AdminAddr = "localhost", "localhost:70000" },
			[]string{
				`http.addr: must be host:port or :port, is "localhost"`,
				`http.admin_addr: port must be a number from 0 to 65535, is "70000"`,
			},
		},
		"one address for both": {
			func(c *httpserver.Config) { c.Addr, c.AdminAddr = ":8080", ":8080" },
			[]string{`http.admin_addr: must differ from http.addr, both are ":8080"`},
		},
		"a certificate without a key": {
			func(c *httpserver.Config) { c.TLSCert = cert },
			[]string{"http.tls_key: is missing, http.tls_cert is set"},
		},
		"a key without a certificate": {
			func(c *httpserver.Config) { c.TLSKey = key },
			[]string{"http.tls_cert: is missing, http.tls_key is set"},
		},
		"TLS files that cannot be read": {
			func(c *httpserver.Config) { c.TLSCert, c.TLSKey = missing, missing },
			[]string{"http.tls_cert: open " + missing, "http.tls_key: open " + missing},
		},
		"a certificate file without a certificate": {
			func(c *httpserver.Config) { c.TLSCert, c.TLSKey = noPEM, key },
			[]string{"http.tls_cert: " + noPEM + ": holds no PEM certificate"},
		},
		"a damaged certificate": {
			func(c *httpserver.Config) { c.TLSCert, c.TLSKey = badDER, key },
			[]string{"http.tls_cert: " + badDER + ": x509: malformed certificate"},
		},
		"a key of another certificate": {
			func(c *httpserver.Config) { c.TLSCert, c.TLSKey = cert, otherKey },
			[]string{"http.tls_key: " + otherKey + ": tls: private key does not match public key"},
		},
		"keys, some of one name": {
			func(c *httpserver.Config) {
				c.APIKeys = httpserver.APIKeys{entry("shop", "a"), entry("shop", "b"), "pos:" + strings.ToUpper(entry("", "c")[1:])}
				c.RateLimit, c.RateBurst = 100, 100
			},
			nil,
		},
		"bad keys and rates": {
			func(c *httpserver.Config) {
				c.APIKeys = httpserver.APIKeys{"", entry("shop", "a"), entry("pos", "a"), "shop:secret", entry("shop", "")}
				c.RateLimit, c.RateBurst = -1, 1_000_000_001
			},
			[]string{
				"http.api_keys: entry 1: must be name:sha256hex, with the 64 hex digits of the key's SHA-256 behind the colon",
				"http.api_keys: entry 3 (pos): has the same key as entry 2",
				"http.api_keys: entry 4 (shop): must be name:sha256hex",
				"http.api_keys: entry 5 (shop): is the SHA-256 of an empty key",
				"http.rate_limit: must be 0 to 1000000000, is -1",
				"http.rate_burst: must be 0 to 1000000000, is 1000000001",
			},
		},
		"a burst below the rate": {
			func(c *httpserver.Config) { c.RateLimit, c.RateBurst = 100, 99 },
			[]string{"http.rate_burst: must be at least http.rate_limit (100), or 0 for as many, is 99"},
		},
		"all limits at once": {
			func(c *httpserver.Config) {
				c.ReadHeaderTimeout, c.ReadTimeout, c.WriteTimeout, c.IdleTimeout, c.ShutdownTimeout = 0, 0, 0, -time.Second, 0
				c.MaxHeader, c.MaxConnections = 10, -1
			},
			[]string{
				"http.read_header_timeout: must be more than 0, is 0s",
				"http.read_timeout: must be more than 0, is 0s",
				"http.write_timeout: must be more than 0, is 0s",
				"http.idle_timeout: must be more than 0, is -1s",
				"http.shutdown_timeout: must be more than 0, is 0s",
				"http.max_header: must be 1KiB to 1GiB, is 10B",
				"http.max_connections: must be at least 0 (no limit), is -1",
			},
		},
		"a request that may take less time than its header": {
			func(c *httpserver.Config) { c.ReadHeaderTimeout, c.ReadTimeout = 5*time.Second, time.Second },
			[]string{"http.read_timeout: must be at least http.read_header_timeout (5s), is 1s"},
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			cfg := httpserver.DefaultConfig()
			test.change(&cfg)
			requireFaults(t, cfg.Validate(), test.faults)
		})
	}
}

// requireFaults checks that there are these faults and no others, each an error
// of its own.
func requireFaults(t *testing.T, err error, faults []string) {
	t.Helper()
	if len(faults) == 0 {
		require.NoError(t, err)
		return
	}
	joined, ok := err.(interface{ Unwrap() []error })
	require.True(t, ok, "%v", err)
	got := joined.Unwrap()
	require.Len(t, got, len(faults), "%v", err)
	for i, fault := range got {
		require.Truef(t, strings.HasPrefix(fault.Error(), faults[i]), "%q does not begin with %q", fault, faults[i])
	}
}
