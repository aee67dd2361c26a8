package backend_test

import (
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sluice/e2e/backend"
)

const (
	orderID     = "0199aa00-1234-7abc-8def-0123456789ab"
	traceparent = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
)

func TestOrderIsSavedAndShown(t *testing.T) {
	s := serve(t, instant())
	body := "{ \"orderNumber\" : \"A-1\",\n\t\"price\": 1.00, \"note\": \"<&>\" }"

	before := time.Now().Add(-time.Millisecond) // savedAt is cut to milliseconds
	saved := s.do(http.MethodPost, "/orders", body, "Idempotency-Key", `"`+orderID+`"`, "X-Order-Number", "A-1",
		"X-Attempt", "3", "Traceparent", traceparent, "X-Tenant", "a", "X-Tenant", "b")
	require.Equal(t, http.StatusOK, saved.status)
	require.Equal(t, "application/json", saved.header.Get("Content-Type"))
	require.Equal(t, "A-1", saved.decode(t)["orderNumber"])
	require.NotEmpty(t, saved.decode(t)["backendId"])

	shown := s.do(http.MethodGet, "/orders/A-1", "")
	require.Equal(t, http.StatusOK, shown.status)
	order := shown.decode(t)
	require.Equal(t, "A-1", order["orderNumber"])
	require.Equal(t, orderID, order["id"])
	require.Equal(t, saved.decode(t)["backendId"], order["backendId"])
	require.InDelta(t, 1, order["calls"], 0)
	require.InDelta(t, 3, order["attempt"], 0)
	require.Equal(t, traceparent, order["traceparent"])
	require.Subset(t, order["headers"], map[string]any{"X-Tenant": "a, b", "X-Attempt": "3"})
	require.Contains(t, shown.body, `"body":`+body, "byte for byte")
	savedAt, err := time.Parse(time.RFC3339, fmt.Sprint(order["savedAt"]))
	require.NoError(t, err)
	require.WithinRange(t, savedAt, before, time.Now())
}

func TestOrderShowsItsLastCall(t *testing.T) {
	s := serve(t, instant())
	s.post(orderID, "A-1", "X-Attempt", "1", "Traceparent", "first")
	s.post(orderID, "A-1", "X-Attempt", "2", "Traceparent", "second")

	order := s.do(http.MethodGet, "/orders/A-1", "").decode(t)
	require.InDelta(t, 2, order["calls"], 0)
	require.InDelta(t, 2, order["attempt"], 0)
	require.Equal(t, "second", order["traceparent"])
}

func TestOrderThatWasNotSavedIsNotFound(t *testing.T) {
	s := serve(t, instant(func(cfg *backend.Config) { cfg.FailNext = 1 }))
	require.Equal(t, http.StatusServiceUnavailable, s.post(orderID, "A-1").status)

	s.do(http.MethodGet, "/orders/A-1", "").requireProblem(t, http.StatusNotFound, "order-not-found")
}

func TestIdentityOfAnOrder(t *testing.T) {
	for name, tc := range map[string]struct {
		header []string
		body   string
		number string
		id     string
	}{
		"quoted key":             {[]string{"Idempotency-Key", `"` + orderID + `"`, "X-Order-Number", "A-1"}, `{}`, "A-1", orderID},
		"bare key":               {[]string{"Idempotency-Key", orderID, "X-Order-Number", "A-1"}, `{}`, "A-1", orderID},
		"key that is no UUID":    {[]string{"Idempotency-Key", `"any thing"`, "X-Order-Number", "A-1"}, `{}`, "A-1", "any thing"},
		"upper-case UUID":        {[]string{"Idempotency-Key", strings.ToUpper(orderID), "X-Order-Number", "A-1"}, `{}`, "A-1", strings.ToUpper(orderID)},
		"key with escapes":       {[]string{"Idempotency-Key", `"a\"b\\c"`, "X-Order-Number", "A-1"}, `{}`, "A-1", `a"b\c`},
		"key with parameters":    {[]string{"Idempotency-Key", `"a";q=1`, "X-Order-Number", "A-1"}, `{}`, "A-1", "a"},
		"number from the body":   {[]string{"Idempotency-Key", orderID}, `{"orderNumber":"B-1"}`, "B-1", orderID},
		"header before body":     {[]string{"Idempotency-Key", orderID, "X-Order-Number", "A-1"}, `{"orderNumber":"B-1"}`, "A-1", orderID},
		"number instead of key":  {[]string{"X-Order-Number", "A-1"}, `{}`, "A-1", "A-1"},
		"number with odd signs":  {[]string{"Idempotency-Key", orderID, "X-Order-Number", "A/1 ?"}, `{}`, "A/1 ?", orderID},
		"body that is not JSON":  {[]string{"Idempotency-Key", orderID, "X-Order-Number", "A-1"}, `<order/>`, "A-1", orderID},
		"body of length nothing": {[]string{"Idempotency-Key", orderID, "X-Order-Number", "A-1"}, ``, "A-1", orderID},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, instant())
			require.Equal(t, http.StatusOK, s.do(http.MethodPost, "/orders", tc.body, tc.header...).status)
			shown := s.do(http.MethodGet, "/orders/"+url.PathEscape(tc.number), "")
			require.Equal(t, http.StatusOK, shown.status)
			require.Equal(t, tc.id, shown.decode(t)["id"])
			require.Equal(t, tc.number, shown.decode(t)["orderNumber"])
		})
	}

	t.Run("quoted and bare key are the same order", func(t *testing.T) {
		s := serve(t, instant())
		s.do(http.MethodPost, "/orders", `{}`, "Idempotency-Key", `"`+orderID+`"`)
		s.do(http.MethodPost, "/orders", `{}`, "Idempotency-Key", orderID)
		require.Equal(t, int64(1), s.Stats().Orders)
		require.Equal(t, int64(1), s.Stats().Repeats)
	})

	t.Run("keys are compared to the letter", func(t *testing.T) {
		s := serve(t, instant())
		s.post(orderID, "A-1")
		s.post(strings.ToUpper(orderID), "A-1")
		require.Equal(t, int64(2), s.Stats().Orders)
	})

	t.Run("order without a number is saved", func(t *testing.T) {
		s := serve(t, instant())
		require.Equal(t, http.StatusOK, s.do(http.MethodPost, "/orders", `{}`, "Idempotency-Key", orderID).status)
		require.Equal(t, int64(1), s.Stats().Orders)
	})

	t.Run("number goes to the order that was saved last", func(t *testing.T) {
		s := serve(t, instant())
		s.post("first", "A-1")
		s.post("second", "A-1")
		require.Equal(t, "second", s.do(http.MethodGet, "/orders/A-1", "").decode(t)["id"])
		require.Equal(t, int64(2), s.Stats().Orders)
	})

	t.Run("neither key nor number", func(t *testing.T) {
		s := serve(t, instant())
		s.do(http.MethodPost, "/orders", `{}`).requireProblem(t, http.StatusBadRequest, "unknown-order")
		require.Equal(t, backend.Stats{Requests: 1, Rejected: 1, MaxInFlight: 1}, s.Stats())
	})

	t.Run("key with an open quote", func(t *testing.T) {
		s := serve(t, instant())
		s.do(http.MethodPost, "/orders", `{}`, "Idempotency-Key", `"a`).requireProblem(t, http.StatusBadRequest, "unknown-order")
	})
}

func TestBodyThatIsNoJSONIsShownAsText(t *testing.T) {
	s := serve(t, instant())
	s.do(http.MethodPost, "/orders", `<order a="1"/>`, "X-Order-Number", "A-1")
	require.Equal(t, `<order a="1"/>`, s.do(http.MethodGet, "/orders/A-1", "").decode(t)["body"])
}

func TestOldOrdersLoseTheirBodyAndNothingElse(t *testing.T) {
	const kept = 1000

	t.Run("beyond the number of orders kept in full", func(t *testing.T) {
		b := newBackend(t, instant())
		for i := range kept + 1 {
			require.Equal(t, http.StatusOK, post(b, fmt.Sprintf("0199aa00-0000-7000-8000-%012x", i), fmt.Sprint("A-", i)).Code)
		}
		oldest, next := show(t, b, "A-0"), show(t, b, "A-1")
		require.Equal(t, "0199aa00-0000-7000-8000-000000000000", oldest["id"])
		require.InDelta(t, 1, oldest["calls"], 0)
		require.NotEmpty(t, oldest["savedAt"])
		require.Nil(t, oldest["body"])
		require.Nil(t, oldest["headers"])
		require.NotNil(t, next["body"])
		require.NotNil(t, next["headers"])
	})

	t.Run("beyond the memory for bodies", func(t *testing.T) {
		s := serve(t, instant())
		body := `"` + strings.Repeat("x", 5<<19) + `"`
		for _, i := range []int{0, 1, 1} { // a repeat takes no room twice
			require.Equal(t, http.StatusOK, s.do(http.MethodPost, "/orders", body, "Idempotency-Key", fmt.Sprint("id ", i), "X-Order-Number", fmt.Sprint("A-", i)).status)
		}
		require.Nil(t, show(t, s.Backend, "A-0")["body"])
		require.Equal(t, "id 0", show(t, s.Backend, "A-0")["id"])
		require.Contains(t, s.do(http.MethodGet, "/orders/A-1", "").body, body)
	})
}
