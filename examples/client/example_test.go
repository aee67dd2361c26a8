package main

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
)

// A gateway that is full for a moment, then accepts the order, whose backend
// refuses it.
func Example() {
	full, keys := true, map[string]bool{}
	gateway := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch {
		case r.Method == http.MethodPost && full:
			full = false
			keys[r.Header.Get("Idempotency-Key")] = true
			w.Header().Set("Content-Type", "application/problem+json")
			w.Header().Set("Retry-After", "0")
			w.WriteHeader(http.StatusServiceUnavailable)
			_, _ = fmt.Fprint(w, `{"type":"/problems/backlog-full","title":"Too many orders are waiting","status":503}`)
		case r.Method == http.MethodPost:
			keys[r.Header.Get("Idempotency-Key")] = true
			w.Header().Set("Location", "/orders/019aaaf3-6f2c-7d3e-8a4b-0c1d2e3f4a5b")
			w.WriteHeader(http.StatusAccepted)
		default:
			_, _ = fmt.Fprint(w, `{"orderNumber":"A-1001","status":"rejected","attempts":1,"problem":{"title":"Unknown customer","status":422,"detail":"there is no c-7"}}`)
		}
	}))
	defer gateway.Close()

	err := run(context.Background(), []string{gateway.URL}, strings.NewReader(`{"orderNumber":"A-1001"}`), os.Stdout)
	fmt.Println("error:", err)
	fmt.Println("keys:", len(keys))
	// Output:
	// order A-1001 is rejected after 1 attempts
	// because: 422 Unknown customer: there is no c-7
	// error: <nil>
	// keys: 1
}
