package e2e

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"mime"
	"net/http"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

// Every answer that a test of this package gets from a gateway is held against
// the OpenAPI document: its path and method, status, header fields, media type
// and body. One that the document does not know fails the request, and in the
// end the run, whatever the test makes of it.

// contract is the document that all answers are held against.
var contract = openContract("../modules/intake/openapi.yaml")

type document struct {
	spec     *openapi3.T
	compiler *jsonschema.Compiler

	mu       sync.Mutex
	public   map[string]bool // addresses of gateways that were started
	admin    map[string]bool
	bodies   map[string]int // seen, by gateway and kind of answer
	compiled map[string]*jsonschema.Schema
	found    []string
}

// contractURL stands for the document within itself.
const contractURL = "file:///openapi.yaml"

func openContract(file string) *document {
	must := func(err error) {
		if err != nil {
			panic(fmt.Sprintf("read %s: %v", file, err))
		}
	}
	loader := openapi3.NewLoader()
	loader.IsExternalRefsAllowed = true // to the order schema
	spec, err := loader.LoadFromFile(file)
	must(err)
	d := &document{spec: spec,
		public: map[string]bool{}, admin: map[string]bool{}, bodies: map[string]int{}, compiled: map[string]*jsonschema.Schema{}}
	text, err := os.ReadFile(file)
	must(err)
	d.compiler, err = schemasOf(text, contractURL, jsonschema.Draft2020)
	must(err)
	return d
}

// schemasOf compiles the schemas within a document in YAML, which is known by
// the URL and writes them in that dialect.
func schemasOf(text []byte, url string, dialect *jsonschema.Draft) (*jsonschema.Compiler, error) {
	var value any
	if err := yaml.Unmarshal(text, &value); err != nil {
		return nil, err
	}
	text, err := json.Marshal(value)
	if err != nil {
		return nil, err
	}
	if value, err = jsonschema.UnmarshalJSON(bytes.NewReader(text)); err != nil {
		return nil, err
	}
	compiler := jsonschema.NewCompiler()
	compiler.DefaultDraft(dialect)
	compiler.AssertFormat()
	return compiler, compiler.AddResource(url, value)
}

// watch says that a gateway answers at these addresses.
func (d *document) watch(public, admin string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.public[public], d.admin[admin] = true, true
}

// forget says that what answers at an address is something else now.
func (d *document) forget(address string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	delete(d.public, address)
	delete(d.admin, address)
}

// faults lists what was found.
func (d *document) faults() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.found
}

// fault keeps an error for faults.
func (d *document) fault(err error) error {
	if err != nil {
		d.mu.Lock()
		defer d.mu.Unlock()
		d.found = append(d.found, err.Error())
	}
	return err
}

// checked is the transport of all clients here.
type checked struct{ *http.Transport }

// RoundTrip is for http.Client.
func (t checked) RoundTrip(req *http.Request) (*http.Response, error) {
	res, err := t.Transport.RoundTrip(req)
	if err != nil {
		return nil, err
	}
	contract.mu.Lock()
	public, admin := contract.public[req.URL.Host], contract.admin[req.URL.Host]
	contract.mu.Unlock()
	if !public && !admin {
		return res, nil
	}
	if public {
		if item := contract.stream(req, res); item != nil {
			res.Body = &lines{ReadCloser: res.Body, check: item}
			return res, contract.fault(contract.check(req.URL.Host, req.Method, req.URL, answer{res.StatusCode, res.Header, nil}, false))
		}
	}
	body, err := io.ReadAll(res.Body)
	_ = res.Body.Close() // read to its end, or broken
	res.Body = io.NopCloser(bytes.NewReader(body))
	if err != nil {
		// Cut off: the client is to see that, and there is no answer to check.
		res.Body = io.NopCloser(io.MultiReader(bytes.NewReader(body), failing{err}))
		return res, nil
	}
	a := answer{res.StatusCode, res.Header, body}
	if admin {
		err = contract.checkAdmin(a)
	} else {
		err = contract.check(req.URL.Host, req.Method, req.URL, a, req.Method != http.MethodHead)
	}
	if err = contract.fault(err); err != nil {
		return nil, err
	}
	return res, nil
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// lines checks a stream line by line while it is read.
type lines struct {
	io.ReadCloser
	check func(line []byte) error
	rest  []byte
}

func (l *lines) Read(p []byte) (int, error) {
	n, err := l.ReadCloser.Read(p)
	l.rest = append(l.rest, p[:n]...)
	for {
		line, rest, ok := bytes.Cut(l.rest, []byte("\n"))
		if !ok {
			return n, err
		}
		if fault := contract.fault(l.check(bytes.TrimRight(line, "\r"))); fault != nil {
			return n, fault
		}
		l.rest = rest
	}
}

// stream returns what checks the lines of an answer that is a stream.
func (d *document) stream(req *http.Request, res *http.Response) func([]byte) error {
	_, operation, _ := d.route(req.Method, req.URL)
	if operation == nil {
		return nil
	}
	mediaType, _, _ := mime.ParseMediaType(res.Header.Get("Content-Type"))
	response, place := d.response(operation, res.StatusCode)
	if response == nil || response.Content[mediaType] == nil || response.Content[mediaType].Extensions["x-item-schema"] == nil {
		return nil
	}
	name := operation.OperationID
	item := place + pointer("content", mediaType, "x-item-schema")
	return func(line []byte) error {
		if mediaType == "text/event-stream" {
			data, ok := bytes.CutPrefix(line, []byte("data:"))
			if !ok {
				return nil
			}
			line = data
		}
		if len(bytes.TrimSpace(line)) == 0 || !d.sampled(req.URL.Host+" "+name+" line") {
			return nil
		}
		if err := d.validate(item, line); err != nil {
			return fmt.Errorf("%s: %w\n%s", name, err, line)
		}
		return nil
	}
}

// ordinary header fields need not be documented with each answer.
var ordinary = []string{"Allow", "Cache-Control", "Connection", "Content-Length", "Content-Security-Policy",
	"Content-Type", "Date", "Ratelimit", "Ratelimit-Policy", "Referrer-Policy", "Trailer",
	"Transfer-Encoding", "Vary", "X-Content-Type-Options"}

// check holds an answer of a gateway's clients' address against the document.
func (d *document) check(host, method string, target *url.URL, a answer, body bool) error {
	if a.status == http.StatusBadRequest && len(a.header) == 0 && bytes.HasPrefix(a.body, []byte("Client sent an HTTP request to an HTTPS server")) {
		return nil // net/http says this by itself
	}
	place, operation, allowed := d.route(method, target)
	asked := fmt.Sprintf("%s %.200s: %d", method, target.EscapedPath(), a.status)
	switch {
	case operation != nil:
	case a.status == http.StatusTemporaryRedirect || a.status == http.StatusMovedPermanently:
		if clean := path.Clean(target.Path); clean == target.Path || clean+"/" == target.Path && clean != "/" {
			return fmt.Errorf("%s: a redirect from a path that is clean", asked)
		}
		return nil
	case a.status == http.StatusUnauthorized: // who has no key is told nothing of paths
		place = pointer("components", "responses", "Unauthorized")
	case allowed:
		place = pointer("components", "responses", "MethodNotAllowed")
	default:
		place = pointer("components", "responses", "NotFound")
	}
	var response *openapi3.Response
	if operation == nil {
		response = d.spec.Components.Responses[place[strings.LastIndex(place, "/")+1:]].Value
		if want := map[bool]int{true: http.StatusMethodNotAllowed, false: http.StatusNotFound}[allowed]; a.status != want && a.status != http.StatusUnauthorized {
			return fmt.Errorf("%s: an undocumented path or method is answered %d", asked, want)
		}
	} else if response, place = d.response(operation, a.status); response == nil {
		return fmt.Errorf("%s: %s does not document this status\n%s", asked, operation.OperationID, a.body)
	}
	if err := d.checkHeader(response, place, a.header); err != nil {
		return fmt.Errorf("%s: %w", asked, err)
	}
	if err := d.checkBody(response, place, a, host+" "+place, body); err != nil {
		return fmt.Errorf("%s: %w\n%s", asked, err, a.body)
	}
	return nil
}

// response returns what an operation documents of a status, and where.
func (d *document) response(operation *openapi3.Operation, status int) (*openapi3.Response, string) {
	ref := operation.Responses.Status(status)
	if ref == nil {
		return nil, ""
	}
	if ref.Ref != "" {
		return ref.Value, strings.TrimPrefix(ref.Ref, "#")
	}
	for route, item := range d.spec.Paths.Map() {
		for method, o := range item.Operations() {
			if o == operation {
				return ref.Value, pointer("paths", route, strings.ToLower(method), "responses", strconv.Itoa(status))
			}
		}
	}
	return nil, ""
}

func (d *document) checkHeader(response *openapi3.Response, place string, header http.Header) error {
	documented := map[string]bool{}
	for name, ref := range response.Headers {
		documented[http.CanonicalHeaderKey(name)] = true
		values := header.Values(name)
		switch {
		case len(values) == 0 && ref.Value.Required:
			return fmt.Errorf("the header %s is missing", name)
		case len(values) > 1:
			return fmt.Errorf("the header %s stands there %d times", name, len(values))
		case len(values) == 1:
			at := place + pointer("headers", name, "schema")
			if ref.Ref != "" {
				at = strings.TrimPrefix(ref.Ref, "#") + "/schema"
			}
			value, err := json.Marshal(values[0])
			if err != nil {
				return err
			}
			if err := d.validate(at, value); err != nil {
				return fmt.Errorf("header %s: %w", name, err)
			}
		}
	}
	for name := range header {
		if !documented[name] && !slices.Contains(ordinary, name) {
			return fmt.Errorf("the header %s is not documented", name)
		}
	}
	return nil
}

func (d *document) checkBody(response *openapi3.Response, place string, a answer, kind string, body bool) error {
	if len(response.Content) == 0 {
		if len(a.body) > 0 {
			return errors.New("no body is documented")
		}
		return nil
	}
	mediaType, _, err := mime.ParseMediaType(a.header.Get("Content-Type"))
	if err != nil || response.Content[mediaType] == nil {
		return fmt.Errorf("the media type %q is not documented", a.header.Get("Content-Type"))
	}
	if !body || !strings.HasSuffix(mediaType, "json") || !d.sampled(kind) {
		return nil
	}
	if response.Content[mediaType].Extensions["x-item-schema"] != nil {
		for line := range bytes.Lines(a.body) {
			if err := d.validate(place+pointer("content", mediaType, "x-item-schema"), line); err != nil {
				return err
			}
		}
		return nil
	}
	if err := d.validate(place+pointer("content", mediaType, "schema"), a.body); err != nil {
		return err
	}
	return sameStatus(mediaType, a)
}

// checkAdmin holds a problem of a gateway's admin address against the document,
// which says nothing else of it.
func (d *document) checkAdmin(a answer) error {
	if a.header.Get("Content-Type") != "application/problem+json" || len(a.body) == 0 {
		return nil
	}
	if err := d.validate(pointer("components", "schemas", "Problem"), a.body); err != nil {
		return fmt.Errorf("a problem of the admin address: %w\n%s", err, a.body)
	}
	return sameStatus("application/problem+json", a)
}

func sameStatus(mediaType string, a answer) error {
	var p problem
	if mediaType == "application/problem+json" && (json.Unmarshal(a.body, &p) != nil || p.Status != a.status) {
		return fmt.Errorf("the problem's status is %d, that of the answer %d", p.Status, a.status)
	}
	return nil
}

// checkRaw is check for a client that speaks HTTP by hand, and what it sent
// first. What net/http answers by itself, in plain text or without any, is not
// ours.
func (d *document) checkRaw(sent string, a answer) error {
	if byServer := []int{400, 417, 431, 501, 505}; a.header.Get("Content-Type") != "application/problem+json" && slices.Contains(byServer, a.status) {
		return nil
	}
	req, err := http.ReadRequest(bufio.NewReader(strings.NewReader(sent)))
	if err != nil || req.RequestURI == "*" || req.Method == http.MethodConnect {
		return nil // nothing that has a path
	}
	return d.fault(d.check("", req.Method, req.URL, a, req.Method != http.MethodHead))
}

// route returns the operation that is meant, and where it stands; allowed says
// that the path is there, if need be with other methods.
func (d *document) route(method string, target *url.URL) (place string, operation *openapi3.Operation, allowed bool) {
	var best string
	for route, item := range d.spec.Paths.Map() {
		if !fits(route, target.EscapedPath()) {
			continue
		}
		allowed = true
		found := item.Operations()[method]
		if found == nil && method == http.MethodHead {
			found = item.Get
		}
		// A path without parameters goes before one with them.
		if found != nil && (operation == nil || strings.Contains(best, "{") && !strings.Contains(route, "{")) {
			best, operation = route, found
			place = pointer("paths", route, strings.ToLower(cmp.Or(map[string]string{http.MethodHead: "get"}[method], method)))
		}
	}
	return place, operation, allowed
}

func fits(route, target string) bool {
	want, got := strings.Split(route, "/"), strings.Split(target, "/")
	return len(want) == len(got) && !slices.ContainsFunc(want, func(part string) bool {
		i := slices.Index(want, part)
		return part != got[i] && (!strings.HasPrefix(part, "{") || got[i] == "")
	})
}

// sampled reports whether to look at a body of that kind: at the first hundred,
// and from then on at one of 25, so that floods of orders stay floods.
func (d *document) sampled(kind string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.bodies[kind]++
	n := d.bodies[kind]
	return n <= 100 || n%25 == 0
}

// validate holds a JSON text against the schema at that place of the document.
func (d *document) validate(place string, text []byte) error {
	d.mu.Lock()
	schema, err := d.compiled[place], error(nil)
	if schema == nil {
		if schema, err = d.compiler.Compile(contractURL + "#" + (&url.URL{Path: place}).EscapedPath()); err == nil {
			d.compiled[place] = schema
		}
	}
	d.mu.Unlock()
	if err != nil {
		return err
	}
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(text))
	if err != nil {
		return err
	}
	return schema.Validate(value)
}

func pointer(names ...string) string {
	var b strings.Builder
	for _, name := range names {
		b.WriteString("/" + strings.NewReplacer("~", "~0", "/", "~1").Replace(name))
	}
	return b.String()
}

func TestTheDocumentIsWhatIsServed(t *testing.T) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b))
	a := do(t, http.MethodGet, g.url+"/openapi.yaml", "", nil)
	require.Equal(t, http.StatusOK, a.status)
	require.Equal(t, "application/yaml", a.header.Get("Content-Type"))
	decode := func(text []byte) (doc map[string]any) {
		require.NoError(t, yaml.Unmarshal(text, &doc))
		return doc
	}
	text, err := os.ReadFile("../modules/intake/openapi.yaml")
	require.NoError(t, err)
	want, got := decode(text), decode(a.body)
	order, err := os.ReadFile(filepath.Join("../modules/intake", "schema/order.json"))
	require.NoError(t, err)
	for _, change := range []func(components map[string]any){
		func(c map[string]any) { c["schemas"].(map[string]any)["Order"] = decode(order) },
		func(c map[string]any) {
			c["requestBodies"].(map[string]any)["Order"].(map[string]any)["x-order-number-pointer"] = "/orderNumber"
		},
	} {
		change(want["components"].(map[string]any))
	}
	require.Equal(t, want, got)

	for _, path := range []string{"/openapi.yaml", "/docs", "/problems/invalid-order"} {
		tag := do(t, http.MethodGet, g.url+path, "", nil).header.Get("ETag")
		again := do(t, http.MethodGet, g.url+path, "", map[string]string{"If-None-Match": tag})
		require.Equal(t, http.StatusNotModified, again.status, path)
		require.Empty(t, again.body)
	}
}

// The document is only as good as what it refuses.
func TestTheContractRefuses(t *testing.T) {
	order := `{"id":"019aaaf3-6f2c-7d3e-8a4b-0c1d2e3f4a5b","orderNumber":"A-1","status":"accepted","attempts":0,` +
		`"acceptedAt":"2026-11-22T10:00:00.123Z","updatedAt":"2026-11-22T10:00:00.123Z","finishedAt":null,"nextAttemptAt":null,` +
		`"traceId":"4bf92f3577b34da6a3ce929d0e0e4736","backend":null,"problem":null,"links":{"self":"/orders/019aaaf3-6f2c-7d3e-8a4b-0c1d2e3f4a5b"}}`
	problem := `{"type":"/problems/malformed-json","title":"x","status":400,"detail":"y","instance":"/orders"}`
	header := func(pairs ...string) http.Header {
		h := http.Header{"Content-Type": {"application/json"}, "Vary": {"Prefer"}, "Location": {"/orders/019aaaf3-6f2c-7d3e-8a4b-0c1d2e3f4a5b"}}
		for i := 0; i < len(pairs); i += 2 {
			h.Set(pairs[i], pairs[i+1])
			if pairs[i+1] == "" {
				h.Del(pairs[i])
			}
		}
		return h
	}
	problemHeader := http.Header{"Content-Type": {"application/problem+json"}}
	for _, test := range []struct {
		name, method, path string
		a                  answer
		says               string
	}{
		{"nothing of this", "POST", "/orders", answer{202, header(), []byte(order)}, ""},
		{"nothing of a problem", "POST", "/orders", answer{400, problemHeader, []byte(problem)}, ""},
		{"a path", "GET", "/orders/x/y", answer{200, header(), []byte(order)}, "an undocumented path"},
		{"a method", "PUT", "/orders", answer{200, header(), []byte(order)}, "an undocumented path or method is answered 405"},
		{"a status", "POST", "/orders", answer{201, header(), []byte(order)}, "does not document this status"},
		{"a missing header", "POST", "/orders", answer{202, header("Location", ""), []byte(order)}, "the header Location is missing"},
		{"a header with another value", "POST", "/orders", answer{202, header("Location", "/orders/1"), []byte(order)}, "header Location"},
		{"a header", "POST", "/orders", answer{202, header("X-New", "1"), []byte(order)}, "the header X-New is not documented"},
		{"a media type", "POST", "/orders", answer{202, header("Content-Type", "text/html"), []byte(order)}, "media type"},
		{"a member", "POST", "/orders", answer{202, header(), []byte(strings.Replace(order, "{", `{"new":1,`, 1))}, "additional properties 'new'"},
		{"a missing member", "POST", "/orders", answer{202, header(), []byte(strings.Replace(order, `"attempts":0,`, "", 1))}, "missing property 'attempts'"},
		{"a state", "POST", "/orders", answer{202, header(), []byte(strings.Replace(order, "accepted", "lost", 1))}, "value must be one of"},
		{"a time in another zone", "POST", "/orders", answer{202, header(), []byte(strings.Replace(order, "123Z", "123+01:00", 1))}, "pattern"},
		{"a type of problem", "POST", "/orders", answer{400, problemHeader, []byte(strings.Replace(problem, "malformed-json", "new", 1))}, "value must be one of"},
		{"a type of problem with another status", "POST", "/orders", answer{400, problemHeader, []byte(strings.Replace(problem, "malformed-json", "overloaded", 1))}, "value must be one of"},
		{"a status in a problem", "POST", "/orders", answer{400, problemHeader, []byte(strings.Replace(problem, "400", "409", 1))}, "the problem's status is 409"},
		{"a body with a 304", "GET", "/docs", answer{304, http.Header{"Etag": {`"x"`}}, []byte("x")}, "no body is documented"},
	} {
		t.Run(test.name, func(t *testing.T) {
			err := contract.check("", test.method, &url.URL{Path: test.path}, test.a, true)
			if test.says == "" {
				require.NoError(t, err)
			} else {
				require.ErrorContains(t, err, test.says)
			}
		})
	}
}
