package httpserver_test

import (
	"crypto/sha256"
	"encoding/base64"
	"html/template"
	"net/http"
	"net/http/httptest"
	"regexp"
	"testing"

	"github.com/stretchr/testify/require"

	"sluice/platform/httpserver"
)

func fetch(h http.Handler, method, path string, header ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, path, nil)
	for i := 0; i+1 < len(header); i += 2 {
		r.Header.Add(header[i], header[i+1])
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestAStaticAnswerIsSentOnce(t *testing.T) {
	s := httpserver.NewStatic("text/plain; charset=utf-8", []byte("always the same"))
	first := fetch(s, http.MethodGet, "/")
	require.Equal(t, http.StatusOK, first.Code)
	require.Equal(t, "always the same", first.Body.String())
	require.Equal(t, "nosniff", first.Header().Get("X-Content-Type-Options"))
	tag := first.Header().Get("ETag")
	require.NotEmpty(t, tag)

	for _, field := range []string{tag, "W/" + tag, `"x", ` + tag, "*"} {
		again := fetch(s, http.MethodGet, "/", "If-None-Match", field)
		require.Equal(t, http.StatusNotModified, again.Code)
		require.Empty(t, again.Body.String())
		require.Empty(t, again.Header().Get("Content-Type"))
		require.Equal(t, tag, again.Header().Get("ETag"))
	}
	require.Equal(t, http.StatusOK, fetch(s, http.MethodGet, "/", "If-None-Match", `"x"`).Code)

	head := fetch(s, http.MethodHead, "/")
	require.Equal(t, "15", head.Header().Get("Content-Length"))
	require.Empty(t, head.Body.String())
	require.NotEqual(t, tag, fetch(httpserver.NewStatic("text/plain", []byte("another")), http.MethodGet, "/").Header().Get("ETag"))
}

func TestAPageMayDoNothingButShow(t *testing.T) {
	page, err := httpserver.NewPage("A <title>", template.HTML("<p>text</p>"))
	require.NoError(t, err)
	answer := fetch(page, http.MethodGet, "/")
	require.Equal(t, "text/html; charset=utf-8", answer.Header().Get("Content-Type"))
	require.Contains(t, answer.Body.String(), "<title>A &lt;title&gt;</title>")
	require.Contains(t, answer.Body.String(), "<p>text</p>")
	style := regexp.MustCompile(`(?s)<style>(.*)</style>`).FindStringSubmatch(answer.Body.String())
	require.NotNil(t, style)
	sum := sha256.Sum256([]byte(style[1]))
	require.Equal(t, "default-src 'none'; style-src 'sha256-"+base64.StdEncoding.EncodeToString(sum[:])+
		"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'", answer.Header().Get("Content-Security-Policy"))
}

func TestProblemPagesExplainEachType(t *testing.T) {
	types := append(httpserver.ProblemTypes(), httpserver.ProblemType{Name: "too-hot", Title: "Too <hot>", Happened: "It is too hot.", Do: "Wait."})
	pages, err := httpserver.ProblemPages(types)
	require.NoError(t, err)
	mux := http.NewServeMux()
	mux.Handle("GET /problems/{name}", pages)

	for _, accept := range []string{"", "*/*", "text/html,application/xhtml+xml,*/*;q=0.8", "text/plain;q=0.5, text/html"} {
		html := fetch(mux, http.MethodGet, "/problems/too-hot", "Accept", accept)
		require.Equal(t, "text/html; charset=utf-8", html.Header().Get("Content-Type"), accept)
		require.Contains(t, html.Body.String(), "<h1>Too &lt;hot&gt;</h1>")
		require.Contains(t, html.Body.String(), "It is too hot.")
		require.Equal(t, "Accept", html.Header().Get("Vary"))
	}
	text := fetch(mux, http.MethodGet, "/problems/too-hot", "Accept", "text/plain")
	require.Equal(t, "text/plain; charset=utf-8", text.Header().Get("Content-Type"))
	require.Equal(t, "Too <hot> (/problems/too-hot)\n\nIt is too hot.\n\nWhat to do: Wait.\n", text.Body.String())

	for _, known := range types {
		require.Equal(t, http.StatusOK, fetch(mux, http.MethodGet, "/problems/"+known.Name).Code)
	}
	missing := fetch(mux, http.MethodGet, "/problems/too-cold")
	require.Equal(t, http.StatusNotFound, missing.Code)
	require.Equal(t, "application/problem+json", missing.Header().Get("Content-Type"))
}
