package main

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestReadyAsksTheAdminAddress(t *testing.T) {
	for _, test := range []struct {
		name   string
		status int
		body   string
		code   int
		stdout string
		stderr string
	}{
		{"ready", 200, `{"status":"ready","checks":{"storage":{"status":"ok"}}}`, exitOK, "ready\n", ""},
		{"a broker out of reach is told", 200,
			`{"status":"ready","checks":{"broker":{"status":"failed","error":"connection\nrefused"},"storage":{"status":"ok"}}}`,
			exitOK, "ready; broker: connection; refused\n", ""},
		{"starting", 503, `{"status":"starting","checks":{}}`, exitFailed, "", "sluice: not ready: starting\n"},
		{"storage out of reach", 503, `{"status":"unavailable","checks":{"storage":{"status":"failed","error":"disk\nfull"},"broker":{"status":"ok"}}}`,
			exitFailed, "", "sluice: not ready: unavailable; storage: disk; full\n"},
		{"another program on that port", 404, `<html>`, exitFailed, "", "sluice: GET http://:PORT/readyz: 404 Not Found, and not the answer of a gateway\n"},
		{"another program that says yes", 200, `{}`, exitFailed, "", "sluice: GET http://:PORT/readyz: 200 OK, and not the answer of a gateway\n"},
	} {
		t.Run(test.name, func(t *testing.T) {
			admin := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				if r.Method != http.MethodGet || r.URL.Path != "/readyz" {
					t.Errorf("%s %s was asked for", r.Method, r.URL)
				}
				w.WriteHeader(test.status)
				_, _ = io.WriteString(w, test.body) // the other side sees it
			}))
			defer admin.Close()
			_, port, err := net.SplitHostPort(admin.Listener.Addr().String())
			require.NoError(t, err)
			t.Setenv("SLUICE_HTTP_ADMIN_ADDR", ":"+port) // as in a container: every address of this machine

			code, stdout, stderr := sluice(t, "ready")
			require.Equal(t, test.code, code)
			require.Equal(t, test.stdout, stdout)
			require.Equal(t, strings.ReplaceAll(test.stderr, "PORT", port), stderr)
		})
	}
}

func TestReadyWithoutAGatewayExitsWith1AndOneLine(t *testing.T) {
	unused, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	addr := unused.Addr().String()
	require.NoError(t, unused.Close())

	code, stdout, stderr := sluice(t, "ready", "--http-admin-addr", addr)
	require.Equal(t, exitFailed, code)
	require.Empty(t, stdout)
	require.Equal(t, 1, strings.Count(stderr, "\n"), stderr)
	require.Contains(t, stderr, "ask whether the gateway is ready")
}
