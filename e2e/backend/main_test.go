package backend_test

import (
	"bytes"
	"encoding/json"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"sluice/e2e/backend"
)

func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m)
}

// instant is a stand-in without latency, for tests of anything but time.
func instant(change ...func(*backend.Config)) backend.Config {
	cfg := backend.DefaultConfig()
	cfg.Latency = 0
	for _, c := range change {
		c(&cfg)
	}
	return cfg
}

func newBackend(t *testing.T, cfg backend.Config) *backend.Backend {
	t.Helper()
	b, err := backend.New(cfg)
	require.NoError(t, err)
	t.Cleanup(b.Close)
	return b
}

// standIn is a stand-in behind a real connection.
type standIn struct {
	*backend.Backend
	t      *testing.T
	url    string
	client *http.Client
}

func serve(t *testing.T, cfg backend.Config) standIn {
	t.Helper()
	b := newBackend(t, cfg)
	server := httptest.NewServer(b)
	t.Cleanup(server.Close)
	t.Cleanup(b.Close) // before the server, which waits for what is in service
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	t.Cleanup(transport.CloseIdleConnections)
	return standIn{Backend: b, t: t, url: server.URL, client: &http.Client{Transport: transport, Timeout: time.Minute}}
}

// answer is a response that was read.
type answer struct {
	status int
	header http.Header
	body   string
}

func (a answer) decode(t *testing.T) map[string]any {
	t.Helper()
	var document map[string]any
	require.NoError(t, json.Unmarshal([]byte(a.body), &document), a.body)
	return document
}

// requireProblem checks that an answer is a problem document that fits its status.
func (a answer) requireProblem(t *testing.T, status int, name string) {
	t.Helper()
	require.Equal(t, status, a.status, a.body)
	require.Equal(t, "application/problem+json", a.header.Get("Content-Type"))
	document := a.decode(t)
	require.InDelta(t, status, document["status"], 0)
	require.Equal(t, "/problems/"+name, document["type"])
	require.Equal(t, http.StatusText(status), document["title"])
}

func (s standIn) try(method, path, body string, header ...string) (answer, error) {
	s.t.Helper()
	request, err := http.NewRequestWithContext(s.t.Context(), method, s.url+path, strings.NewReader(body))
	require.NoError(s.t, err)
	setHeader(request, header)
	response, err := s.client.Do(request)
	if err != nil {
		return answer{}, err
	}
	defer func() { _ = response.Body.Close() }() // it was read
	read, err := io.ReadAll(response.Body)
	return answer{status: response.StatusCode, header: response.Header, body: string(read)}, err
}

func (s standIn) do(method, path, body string, header ...string) answer {
	s.t.Helper()
	a, err := s.try(method, path, body, header...)
	require.NoError(s.t, err)
	return a
}

// post sends an order the way Sluice does.
func (s standIn) post(id, number string, header ...string) answer {
	s.t.Helper()
	return s.do(http.MethodPost, "/orders", `{"orderNumber":"`+number+`"}`, append([]string{"Idempotency-Key", `"` + id + `"`, "X-Order-Number", number}, header...)...)
}

func (s standIn) control(document string) answer {
	s.t.Helper()
	a := s.do(http.MethodPut, "/control", document)
	require.Equal(s.t, http.StatusOK, a.status, a.body)
	return a
}

// post sends an order without a connection, for tests on a fake clock.
func post(b *backend.Backend, id, number string) *httptest.ResponseRecorder {
	request := httptest.NewRequest(http.MethodPost, "/orders", bytes.NewReader([]byte(`{}`)))
	setHeader(request, []string{"Idempotency-Key", id, "X-Order-Number", number})
	recorder := httptest.NewRecorder()
	b.ServeHTTP(recorder, request)
	return recorder
}

// postCut sends an order without a connection and tells whether its connection would have been cut.
func postCut(b *backend.Backend, id string) (cut bool) {
	defer func() {
		if cause := recover(); cause != nil {
			if cause != http.ErrAbortHandler { //nolint:errorlint // a panic carries this very value
				panic(cause)
			}
			cut = true
		}
	}()
	post(b, id, id)
	return false
}

func setHeader(request *http.Request, pairs []string) {
	for i := 0; i+1 < len(pairs); i += 2 {
		request.Header.Add(pairs[i], pairs[i+1])
	}
}
