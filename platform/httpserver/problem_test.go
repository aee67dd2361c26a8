package httpserver_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"sluice/platform/httpserver"
)

func ExampleWriteProblem() {
	request := httptest.NewRequest(http.MethodGet, "/orders/17", nil)
	recorder := httptest.NewRecorder()

	httpserver.WriteProblem(recorder, request, httpserver.Problem{
		Type:   "order-not-found",
		Title:  "Order not found",
		Status: http.StatusNotFound,
		Detail: "There is no order 17.",
	})

	fmt.Println(recorder.Code, recorder.Header().Get("Content-Type"))
	fmt.Print(recorder.Body)
	// Output:
	// 404 application/problem+json
	// {"type":"/problems/order-not-found","title":"Order not found","status":404,"detail":"There is no order 17.","instance":"/orders/17"}
}

func TestProblemJSON(t *testing.T) {
	tests := map[string]struct {
		problem httpserver.Problem
		want    string
	}{
		"nothing set": {
			httpserver.Problem{},
			`{"type":"about:blank","title":"Internal Server Error","status":500}`,
		},
		"errors and members, flat and in order": {
			httpserver.Problem{
				Type: "invalid-order", Title: "Invalid order", Status: 422, Detail: "a < b & c", Instance: "/orders",
				Errors:  []httpserver.FieldError{{Pointer: "/items/0/quantity", Detail: "must be at least 1"}},
				Members: map[string]any{"order": "/orders/1", "backend": json.RawMessage(`{"status":200}`)},
			},
			`{"type":"/problems/invalid-order","title":"Invalid order","status":422,"detail":"a < b & c","instance":"/orders",` +
				`"errors":[{"pointer":"/items/0/quantity","detail":"must be at least 1"}],` +
				`"backend":{"status":200},"order":"/orders/1"}`,
		},
		"members that take a standard name or are no JSON are left out": {
			httpserver.Problem{
				Type: "x", Title: "X", Status: 400,
				Members: map[string]any{
					"status": 200, "instance": "/elsewhere", "nan": math.NaN(),
					"raw": json.RawMessage(`{"half":`), `good "one"`: 1,
				},
			},
			`{"type":"/problems/x","title":"X","status":400,"good \"one\"":1}`,
		},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, test.want, string(test.problem.JSON()))

			nested, err := json.Marshal(map[string]any{"problem": test.problem})
			require.NoError(t, err)
			require.JSONEq(t, `{"problem":`+test.want+`}`, string(nested))
		})
	}
}

func TestWriteProblem(t *testing.T) {
	problem := httpserver.Problem{Type: "x", Title: "X", Status: 503}

	t.Run("keeps what belongs to the answer and drops what described another body", func(t *testing.T) {
		recorder := httptest.NewRecorder()
		recorder.Header().Set("Retry-After", "3")
		recorder.Header().Set("ETag", `"1"`)
		recorder.Header().Set("Content-Encoding", "gzip")
		httpserver.WriteProblem(recorder, httptest.NewRequest("GET", "/a%20b?q=1", nil), problem)

		got := answer{recorder.Result(), recorder.Body.String()}
		require.Equal(t, "/a%20b", got.problem(t)["instance"])
		require.Equal(t, "3", got.Header.Get("Retry-After"))
		require.Empty(t, got.Header.Values("ETag"))
		require.Empty(t, got.Header.Values("Content-Encoding"))
		require.Empty(t, got.Header.Values("Connection"))
		require.EqualValues(t, len(got.body), got.ContentLength)
	})

	t.Run("answers HEAD with the header of GET", func(t *testing.T) {
		head, get := httptest.NewRecorder(), httptest.NewRecorder()
		httpserver.WriteProblem(head, httptest.NewRequest("HEAD", "/", nil), problem)
		httpserver.WriteProblem(get, httptest.NewRequest("GET", "/", nil), problem)
		require.Zero(t, head.Body.Len())
		require.Equal(t, get.Header(), head.Header())
		require.Equal(t, get.Code, head.Code)
	})

	for _, status := range []int{http.StatusRequestTimeout, http.StatusRequestEntityTooLarge} {
		t.Run(fmt.Sprintf("closes the connection after %d, but not one of HTTP/2", status), func(t *testing.T) {
			request := httptest.NewRequest("POST", "/", nil)
			recorder := httptest.NewRecorder()
			httpserver.WriteProblem(recorder, request, httpserver.Problem{Status: status})
			require.Equal(t, "close", recorder.Header().Get("Connection"))

			request.ProtoMajor = 2
			recorder = httptest.NewRecorder()
			httpserver.WriteProblem(recorder, request, httpserver.Problem{Status: status})
			require.Empty(t, recorder.Header().Values("Connection"))
		})
	}
}

func TestWriteJSON(t *testing.T) {
	t.Run("writes the value as it is", func(t *testing.T) {
		recorder := httptest.NewRecorder()
		httpserver.WriteJSON(recorder, httptest.NewRequest("GET", "/", nil), http.StatusAccepted, map[string]string{"a": "<b>"})
		require.Equal(t, http.StatusAccepted, recorder.Code)
		require.Equal(t, "application/json", recorder.Header().Get("Content-Type"))
		require.JSONEq(t, `{"a":"<b>"}`, recorder.Body.String())
		require.Contains(t, recorder.Body.String(), "<b>", "not escaped as for HTML")
	})

	t.Run("answers HEAD without a body", func(t *testing.T) {
		recorder := httptest.NewRecorder()
		httpserver.WriteJSON(recorder, httptest.NewRequest("HEAD", "/", nil), http.StatusOK, 12)
		require.Equal(t, "3", recorder.Header().Get("Content-Length"))
		require.Zero(t, recorder.Body.Len())
	})

	t.Run("a value that is no JSON is logged and answered as a fault of ours", func(t *testing.T) {
		var logs logbook
		server := serveLogged(t, httpserver.DefaultConfig(), route("GET /", func(w http.ResponseWriter, r *http.Request) {
			httpserver.WriteJSON(w, r, http.StatusOK, math.Inf(1))
		}), logs.logger(0))
		got := do(t, newClient(t), "GET", "http://"+server.Addr(), nil)
		require.Equal(t, http.StatusInternalServerError, got.StatusCode)
		require.Equal(t, "/problems/internal-error", got.problem(t)["type"])
		require.Contains(t, logs.String(), "unsupported value: +Inf")
	})
}

func TestReadProblem(t *testing.T) {
	_, err := io.ReadAll(http.MaxBytesReader(httptest.NewRecorder(), io.NopCloser(strings.NewReader("12345")), 4))
	require.Error(t, err)

	tests := map[string]struct {
		err    error
		status int
		kind   string
	}{
		"too large":      {fmt.Errorf("read body: %w", err), 413, "body-too-large"},
		"too slow":       {fmt.Errorf("read body: %w", os.ErrDeadlineExceeded), 408, "request-timeout"},
		"cut off":        {io.ErrUnexpectedEOF, 400, "incomplete-body"},
		"wrongly framed": {errors.New("malformed chunked encoding"), 400, "incomplete-body"},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			problem, ok := httpserver.ReadProblem(test.err)
			require.True(t, ok)
			require.Equal(t, test.status, problem.Status)
			require.Equal(t, test.kind, problem.Type)
			require.NotEmpty(t, problem.Title)
			require.NotEmpty(t, problem.Detail)
		})
	}

	for name, err := range map[string]error{
		"nothing": nil, "the end": io.EOF, "closed by the handler": http.ErrBodyReadAfterClose,
	} {
		t.Run("is not the client's doing: "+name, func(t *testing.T) {
			_, ok := httpserver.ReadProblem(err)
			require.False(t, ok)
		})
	}
}
