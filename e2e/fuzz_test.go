package e2e

import (
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
)

// FuzzRequest sends a running gateway whatever a client could send: any target,
// any headers, any body. Whatever it answers, openapi.yaml knows the answer; it
// never answers that it is at fault, and it never panics.
func FuzzRequest(f *testing.F) {
	b := backend(f, "--latency", "0s")
	g := serve(f, false, embedded(f.TempDir()), settings{
		// A client that promises more than it sends is not waited for.
		"backend.url": b.ordersURL(), "http.read_header_timeout": "1s", "http.read_timeout": "1s", "intake.max_wait": "1s",
	})
	f.Cleanup(func() {
		if log := g.log(); strings.Contains(log, "panic") {
			f.Errorf("the gateway has panicked:\n%s", log)
		}
	})
	const order = `{"orderNumber":"F-1","items":[{"sku":"a","quantity":1}]}`
	for _, seed := range []struct{ target, headers, body string }{
		{"POST /orders", "Content-Type: application/json", `{"orderNumber":"F-0"}`},
		{"POST /orders", "Content-Type: application/json\r\nPrefer: wait=1, respond-async\r\nIdempotency-Key: \"k\"\r\ntraceparent: 00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", order},
		{"POST /orders", "Content-Type: application/json; charset=\"\xff\r\nIdempotency-Key: a, b\r\nContent-Encoding: gzip", "\xef\xbb\xbf{\"orderNumber\":1e400,\"orderNumber\":\"\\ud800\"}"},
		{"POST /orders/sync", "Content-Type: application/vnd.x+json\r\nExpect: 100-continue", order},
		{"POST /orders/batch", "Content-Type: application/x-ndjson", order + "\n\n{}\r\nnull\n" + order},
		{"GET /orders?status=saved&limit=1&cursor=%00&orderNumber=%ff", "Accept: */*;q=0", ""},
		{"GET /orders/01938a5c-7c00-7abc-8def-0123456789ab", "If-None-Match: W/\"x\", *\r\nPrefer: wait=99999999999999999999", ""},
		{"GET /orders/01938a5c-7c00-7abc-8def-0123456789ab/events", "Last-Event-ID: -1\r\nAccept: text/event-stream", ""},
		{"HEAD /orders/../docs//%2e%2e/%2f", "Range: bytes=5-1\r\nAuthorization: Bearer \x00", ""},
		{"OPTIONS *", "Origin: null", ""},
		{"GET //", "", ""},
		{"PUT /problems/duplicate-order", "Transfer-Encoding: chunked", "5\r\nabcde\r\nz"},
	} {
		f.Add(seed.target, seed.headers, seed.body)
	}
	f.Fuzz(func(t *testing.T, target, headers, body string) {
		c := g.dial(t)
		c.send(t, fmt.Sprintf("%s HTTP/1.1\r\nHost: sluice\r\nConnection: close\r\nContent-Length: %d\r\n%s\r\n\r\n%s", target, len(body), headers, body))
		a, err := c.answer()
		// 501 and 505 are net/http's, of transfer codings and versions.
		if byServer := a.status == http.StatusNotImplemented || a.status == http.StatusHTTPVersionNotSupported; !byServer {
			require.Less(t, a.status, http.StatusInternalServerError, "%q %q %q: %s", target, headers, body, a.body)
		}
		if err != nil {
			// It may hang up on what is no request, but not be silent.
			for _, cut := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET} {
				if errors.Is(err, cut) {
					return
				}
			}
			require.NoError(t, err, "%q %q %q", target, headers, body)
		}
	})
}
