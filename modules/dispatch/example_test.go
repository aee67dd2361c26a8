package dispatch_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"time"

	"sluice/modules/contract"
	"sluice/modules/dispatch"
)

func ExampleClient_Attempt() {
	backend := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("X-Attempt") == "1" {
			w.Header().Set("Retry-After", "30")
			w.WriteHeader(http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusCreated)
	}))
	defer backend.Close()

	client, err := dispatch.NewClient(
		dispatch.BackendConfig{URL: backend.URL, Timeout: 10 * time.Second}, dispatch.DefaultConfig(), quietDeps())
	if err != nil {
		fmt.Println(err)
		return
	}
	defer client.Close()

	for number := range 2 {
		order := contract.Submitted{OrderID: "0199", Attempt: number + 1, ContentType: "application/json", Body: []byte(`{}`)}
		outcome, err := client.Attempt(context.Background(), order)
		fmt.Println(outcome.Type, outcome.Error, outcome.RetryAfter, err)
	}
	// Output:
	// order.attempt_failed.v1 backend answered 503 Service Unavailable 30s <nil>
	// order.saved.v1  0s <nil>
}
