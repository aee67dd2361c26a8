package httpserver

import (
	"bytes"
	"crypto/sha256"
	_ "embed" // for the style
	"encoding/base64"
	"encoding/hex"
	"html/template"
	"net/http"
	"strings"
)

// Static is an answer that stays the same for the life of the process. It is
// served with an ETag, which clients ask again for (Cache-Control: no-cache):
// another configuration may make it another one. It is safe for concurrent use.
type Static struct {
	body   []byte
	header http.Header
	etag   string
}

// NewStatic returns an answer of that media type. The body must not be changed
// any more.
func NewStatic(mediaType string, body []byte) *Static {
	sum := sha256.Sum256(body)
	etag := `"` + hex.EncodeToString(sum[:12]) + `"`
	return &Static{body: body, etag: etag, header: http.Header{
		"Content-Type":           {mediaType},
		"Cache-Control":          {"no-cache"},
		"Etag":                   {etag},
		"X-Content-Type-Options": {"nosniff"},
	}}
}

// ServeHTTP answers 200, or 304 to a client that has it.
func (s *Static) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	header := w.Header()
	for name, values := range s.header {
		header[name] = values
	}
	if ETagMatches(r.Header.Values("If-None-Match"), s.etag) {
		header.Del("Content-Type")
		w.WriteHeader(http.StatusNotModified)
		return
	}
	write(w, r, http.StatusOK, s.body)
}

// ETagMatches implements If-None-Match (RFC 9110, section 13.1.2), which
// compares weakly, with the values of all of a request's fields.
func ETagMatches(fields []string, etag string) bool {
	etag = strings.TrimPrefix(etag, "W/")
	for _, field := range fields {
		for candidate := range strings.SplitSeq(field, ",") {
			candidate = strings.TrimSpace(candidate)
			if candidate == "*" || strings.TrimPrefix(candidate, "W/") == etag {
				return true
			}
		}
	}
	return false
}

// pageStyle is in every page: nothing is fetched, and the policy names its hash.
//
//go:embed page.css
var pageStyle string

var pageTemplate = template.Must(template.New("page").Parse(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{.Title}}</title>
<style>{{.Style}}</style>
</head>
<body>
{{.Body}}
</body>
</html>
`))

// NewPage returns a page of HTML that needs nothing else: it has its style, runs
// no script, and its Content-Security-Policy allows nothing beyond that.
func NewPage(title string, body template.HTML) (*Static, error) {
	var page bytes.Buffer
	if err := pageTemplate.Execute(&page, struct {
		Title string
		Style template.CSS
		Body  template.HTML
	}{title, template.CSS(pageStyle), body}); err != nil {
		return nil, err
	}
	s := NewStatic("text/html; charset=utf-8", page.Bytes())
	sum := sha256.Sum256([]byte(pageStyle))
	s.header["Content-Security-Policy"] = []string{"default-src 'none'; style-src 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) +
		"'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"}
	s.header["Referrer-Policy"] = []string{"no-referrer"}
	return s, nil
}
