package backend_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"testing"

	"github.com/stretchr/testify/require"

	"sluice/e2e/backend"
)

func show(t *testing.T, b *backend.Backend, number string) map[string]any {
	t.Helper()
	recorder := httptest.NewRecorder()
	b.ServeHTTP(recorder, httptest.NewRequest(http.MethodGet, "/orders/"+number, nil))
	require.Equal(t, http.StatusOK, recorder.Code)
	var document map[string]any
	require.NoError(t, json.Unmarshal(recorder.Body.Bytes(), &document))
	return document
}

func TestStatsHasTheNamesOfTheContractAndTheOrderNumbers(t *testing.T) {
	s := serve(t, instant())
	s.post("a", "A-1")
	s.post("a", "A-1")
	s.post("b", "A-2-REJECT")
	require.Equal(t, `{"requests":3,"orders":1,"repeats":1,"inFlight":0,"maxInFlight":1,"rejected":1,"failed":0,"numbers":1}`,
		s.do(http.MethodGet, "/stats", "").body)
}

func TestControl(t *testing.T) {
	defaults := `{"latency":"50ms","jitter":"0s","service":"constant","cancellation":"ignored","stallFrom":"0s","stallFor":"0s","capacity":0,"queue":0,"contention":0,"failRate":0,"failNext":0,` +
		`"failStatus":503,"rejectNumberSuffix":"-REJECT","down":false,"retryAfter":"0s","downFrom":"0s","downFor":"0s"}`

	t.Run("shows the knobs", func(t *testing.T) {
		s := serve(t, backend.DefaultConfig())
		require.JSONEq(t, defaults, s.do(http.MethodGet, "/control", "").body)
	})

	t.Run("changes every knob and answers with all", func(t *testing.T) {
		s := serve(t, backend.DefaultConfig())
		changed := `{"latency":"10ms","jitter":"0s","service":"exponential","cancellation":"honoured","stallFrom":"2h0m0s","stallFor":"3s","capacity":2,"queue":3,"contention":0.0019,"failRate":0.5,"failNext":4,` +
			`"failStatus":429,"rejectNumberSuffix":"-NO","down":true,"retryAfter":"2s","downFrom":"1h0m0s","downFor":"1m0s"}`
		require.JSONEq(t, changed, s.control(changed).body)
		require.JSONEq(t, changed, s.do(http.MethodGet, "/control", "").body)
	})

	t.Run("leaves what is not named", func(t *testing.T) {
		s := serve(t, backend.DefaultConfig())
		s.control(`{"capacity":7}`)
		s.control(`{"latency":"10ms"}`)
		s.control(`{}`)
		require.Equal(t, 7, s.Config().Capacity)
		require.Equal(t, "10ms", s.Config().Latency.String())
	})

	t.Run("takes retryAfter in seconds too", func(t *testing.T) {
		s := serve(t, backend.DefaultConfig())
		require.Equal(t, "2s", s.control(`{"retryAfter":2}`).decode(t)["retryAfter"])
		require.Equal(t, "3s", s.control(`{"retryAfter":"3"}`).decode(t)["retryAfter"])
		require.Equal(t, "1.5s", s.control(`{"retryAfter":"1500ms"}`).decode(t)["retryAfter"])
	})

	for name, tc := range map[string]struct{ document, says string }{
		"unknown knob":       {`{"capacity":1,"speed":1}`, `unknown field \"speed\"`},
		"not JSON":           {`capacity=1`, "invalid character"},
		"nothing":            {``, "EOF"},
		"two documents":      {`{"capacity":1}{"capacity":2}`, "more than one JSON document"},
		"number as duration": {`{"capacity":1,"latency":50}`, `50 is not a duration such as \"50ms\"`},
		"text as duration":   {`{"capacity":1,"latency":"slow"}`, `\"slow\" is not a duration`},
		"text as pause":      {`{"capacity":1,"retryAfter":"soon"}`, "neither a duration such as 1500ms nor a number of seconds"},
		"all faults at once": {`{"capacity":1,"failRate":2,"queue":-1}`, "queue: must be 0 (no limit) or more, is -1; fail-rate: must be from 0 to 1, is 2"},
	} {
		t.Run("refuses "+name+" and changes nothing", func(t *testing.T) {
			s := serve(t, backend.DefaultConfig())
			refused := s.do(http.MethodPut, "/control", tc.document)
			refused.requireProblem(t, http.StatusBadRequest, "invalid-knobs")
			require.Contains(t, refused.body, tc.says)
			require.JSONEq(t, defaults, s.do(http.MethodGet, "/control", "").body)
		})
	}
}

func TestBodyThatIsTooLarge(t *testing.T) {
	b := newBackend(t, instant())
	for name, body := range map[string]io.Reader{
		"as announced":   bytes.NewReader(make([]byte, 16<<20+1)),
		"as it turns up": io.LimitReader(zeros{}, 16<<20+1),
	} {
		t.Run(name, func(t *testing.T) {
			recorder := httptest.NewRecorder()
			b.ServeHTTP(recorder, httptest.NewRequest(http.MethodPost, "/orders", body))
			require.Equal(t, http.StatusRequestEntityTooLarge, recorder.Code)
		})
	}
	require.Equal(t, backend.Stats{Requests: 2, Rejected: 2, MaxInFlight: 1}, b.Stats())
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

func TestBodyThatBreaksOff(t *testing.T) {
	b := newBackend(t, instant())
	request := httptest.NewRequest(http.MethodPost, "/orders", bytes.NewReader([]byte("{")))
	request.ContentLength = 100
	recorder := httptest.NewRecorder()
	b.ServeHTTP(recorder, request)
	require.Equal(t, http.StatusBadRequest, recorder.Code)
	require.Equal(t, backend.Stats{Requests: 1, Failed: 1, MaxInFlight: 1}, b.Stats())
}
