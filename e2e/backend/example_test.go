package backend_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"

	"sluice/e2e/backend"
)

// A backend that is out of order twice and then saves the order.
func ExampleNew() {
	cfg := backend.DefaultConfig()
	cfg.FailNext = 2
	b, err := backend.New(cfg)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer b.Close()

	for range 3 {
		request := httptest.NewRequest(http.MethodPost, "/orders", strings.NewReader(`{"orderNumber": "A-1001"}`))
		request.Header.Set("Idempotency-Key", `"0199aa00-1234-7abc-8def-0123456789ab"`)
		answer := httptest.NewRecorder()
		b.ServeHTTP(answer, request)
		fmt.Println(answer.Code)
	}
	fmt.Printf("%+v\n", b.Stats())
	// Output:
	// 503
	// 503
	// 200
	// {Requests:3 Orders:1 Repeats:0 InFlight:0 MaxInFlight:1 Rejected:0 Failed:2}
}
