package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// Clients of this file misbehave: by mistake, by bad luck, or on purpose. What
// must hold whatever they do is always the same: they get an answer that says
// what is wrong or are cut off, the process neither dies nor grows, orders of
// others are accepted and saved meanwhile, and nothing accepted is lost.

// patience is how long these tests wait for what should come much sooner.
const patience = 45 * time.Second

func TestABadOrderIsRefusedWithTheReason(t *testing.T) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b, "intake.max_body", "64KiB"))
	good := body("A-1")
	large := strings.Replace(good, "{", `{"pad":"`+strings.Repeat("x", 64<<10)+`",`, 1)

	for _, test := range []struct {
		name, contentType, body string
		status                  int
		problem, says           string
	}{
		{"no body", "application/json", "", 400, "malformed-json", "there is no JSON value"},
		{"not JSON", "application/json", "orderNumber=A-1", 400, "malformed-json", "line 1, column 1"},
		{"cut off", "application/json", good[:40], 400, "malformed-json", "ends before"},
		{"two values", "application/json", good + "\n" + good, 400, "malformed-json", "line 2, column 1"},
		{"a comment", "application/json", "/**/" + good, 400, "malformed-json", ""},
		{"a byte order mark", "application/json", "\ufeff" + good, 400, "malformed-json", ""},
		{"a NUL", "application/json", strings.Replace(good, "tea", "t\x00a", 1), 400, "malformed-json", ""},
		{"no UTF-8", "application/json", strings.Replace(good, "tea", "t\xffa", 1), 400, "malformed-json", ""},
		{"half a character", "application/json", strings.Replace(good, "tea", `\ud800`, 1), 400, "malformed-json", ""},
		{"a member twice", "application/json", strings.Replace(good, "{", `{"currency":"USD",`, 1), 400, "malformed-json", `"currency" stands twice`},
		{"a member of an item twice", "application/json", strings.Replace(good, `"sku":"tea"`, `"sku":"tea","\u0073ku":"tea"`, 1), 400, "malformed-json", `"sku" stands twice`},
		{"nested too deep", "application/json", strings.Repeat("[", 60_000), 400, "malformed-json", "nested deeper"},
		{"no media type", "", good, 415, "unsupported-media-type", "no Content-Type"},
		{"another media type", "text/plain", good, 415, "unsupported-media-type", "text/plain"},
		{"a media type like it", "application/jsonx", good, 415, "unsupported-media-type", ""},
		{"no media type at all", "application/json/x", good, 415, "unsupported-media-type", ""},
		{"another charset", "application/json; charset=iso-8859-1", good, 415, "unsupported-media-type", "UTF-8"},
		{"two charsets", "application/json; charset=utf-8; charset=utf-16", good, 415, "unsupported-media-type", ""},
		{"too large", "application/json", large, 413, "body-too-large", "64KiB"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := do(t, http.MethodPost, g.url+"/orders", test.body, map[string]string{"Content-Type": test.contentType}).problem(t, test.status, test.problem)
			require.Contains(t, p.Detail, test.says)
			require.Equal(t, "/orders", p.Instance)
		})
	}
	t.Run("too large, of unknown length", func(t *testing.T) {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, g.url+"/orders", struct{ io.Reader }{strings.NewReader(large)})
		require.NoError(t, err)
		req.Header.Set("Content-Type", "application/json")
		res, err := client.Do(req)
		require.NoError(t, err)
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		require.NoError(t, err)
		answer{res.StatusCode, res.Header, text}.problem(t, http.StatusRequestEntityTooLarge, "body-too-large")
	})

	for _, test := range []struct{ name, old, new, pointer, detail string }{
		{"a number that is none", `"A-1"`, `17`, "/orderNumber", "must be a string, is a number"},
		{"an empty number", `"A-1"`, `""`, "/orderNumber", "must have at least 1 character, has 0"},
		{"a number with a space", `"A-1"`, `"A 1"`, "/orderNumber", "must match the pattern ^[A-Za-z0-9._-]*$"},
		{"a missing member", `"customerId":"c-1",`, ``, "/customerId", "is required"},
		{"no items", `[{"sku":"tea","quantity":2,"unitPrice":4.5}]`, `[]`, "/items", "must have at least 1 item, has 0"},
		{"none of something", `"quantity":2`, `"quantity":0`, "/items/0/quantity", "must be at least 1"},
		{"half of something", `"quantity":2`, `"quantity":1.5`, "/items/0/quantity", "must be a whole number"},
		{"a price below nothing", `4.5`, `-0.01`, "/items/0/unitPrice", "must be at least 0"},
		{"an absurd price", `4.5`, `1e99999`, "/items/0/unitPrice", "must have at most 400 characters and an exponent from -400 to 400"},
		{"no currency of this world", `"EUR"`, `"Euro"`, "/currency", "must match the pattern ^[A-Za-z]{3}$"},
		{"no object", good, `[]`, "", "must be an object, is an array"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := g.post(t, strings.Replace(good, test.old, test.new, 1)).problem(t, http.StatusUnprocessableEntity, "invalid-order")
			require.Len(t, p.Errors, 1)
			require.Equal(t, test.pointer, p.Errors[0].Pointer)
			require.Equal(t, test.detail, p.Errors[0].Detail)
		})
	}
	t.Run("several faults are told at once", func(t *testing.T) {
		p := g.post(t, `{"orderNumber":"A-1","currency":"E","items":[{"sku":"tea","quantity":1,"unitPrice":1},{"sku":1}]}`).problem(t, http.StatusUnprocessableEntity, "invalid-order")
		var pointers []string
		for _, e := range p.Errors {
			pointers = append(pointers, e.Pointer)
		}
		require.Equal(t, []string{"/currency", "/customerId", "/items/1/quantity", "/items/1/sku", "/items/1/unitPrice"}, pointers)
	})

	require.Empty(t, g.numbered(t, ""), "nothing of this was accepted")
	require.Zero(t, b.stats(t).Requests)
	g.await(t, g.accept(t, "A-1").ID, "saved")
}

func TestUnknownPathsAndMethodsAreProblems(t *testing.T) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b))
	order := g.accept(t, "A-1")

	for _, path := range []string{"/", "/nothing", "/orders/", "/orders/" + order.ID + "/nothing", "/Orders", "/%00", "/orders%2f" + order.ID,
		// What is for operators is not to be had at the clients' address.
		"/livez", "/readyz", "/metrics", "/debug/pprof/", "/admin/status", "/admin/orders/" + order.ID + "/replay"} {
		t.Run("GET "+path, func(t *testing.T) {
			do(t, http.MethodGet, g.url+path, "", nil).problem(t, http.StatusNotFound, "not-found")
		})
	}
	for _, id := range []string{"x", "%00", "..%2f..%2fetc%2fpasswd", missingID, strings.Repeat("0", 4000), "'%20OR%201=1--"} {
		t.Run("GET /orders/"+id[:min(len(id), 20)], func(t *testing.T) {
			do(t, http.MethodGet, g.url+"/orders/"+id, "", nil).problem(t, http.StatusNotFound, "order-not-found")
		})
	}
	for _, test := range []struct{ method, url, allow string }{
		{"PUT", g.url + "/orders", "GET, HEAD, POST"},
		{"DELETE", g.url + "/orders", "GET, HEAD, POST"},
		{"OPTIONS", g.url + "/orders", "GET, HEAD, POST"},
		{"TRACE", g.url + "/orders", "GET, HEAD, POST"},
		{"get", g.url + "/orders", "GET, HEAD, POST"},
		{"BREW", g.url + "/orders", "GET, HEAD, POST"},
		{"POST", g.url + "/orders/" + order.ID, "GET, HEAD"},
		{"DELETE", g.url + "/orders/" + order.ID, "GET, HEAD"},
		{"POST", g.admin + "/readyz", "GET, HEAD"},
		{"GET", g.admin + "/admin/orders/" + order.ID + "/replay", "POST"},
	} {
		t.Run(test.method+" "+test.url[strings.LastIndex(test.url, ":"):], func(t *testing.T) {
			a := do(t, test.method, test.url, "", nil)
			a.problem(t, http.StatusMethodNotAllowed, "method-not-allowed")
			require.Equal(t, test.allow, a.header.Get("Allow"))
		})
	}
	for path, status := range map[string]int{"/orders": 200, "/orders/" + order.ID: 200, "/orders/" + missingID: 404, "/nothing": 404} {
		t.Run("HEAD "+path, func(t *testing.T) {
			a := do(t, http.MethodHead, g.url+path, "", nil)
			require.Equal(t, status, a.status)
			require.NotEmpty(t, a.header.Get("Content-Length"))
			require.Empty(t, a.body)
		})
	}
	g.await(t, order.ID, "saved")
}

func TestHostileHeadersNeverDoHarm(t *testing.T) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b))
	number := 0
	// post is an order of its own with these header lines.
	post := func(lines ...string) string {
		number++
		text := body(fmt.Sprintf("H-%d", number))
		return "POST /orders HTTP/1.1\r\nHost: sluice\r\nContent-Type: application/json\r\nConnection: close\r\n" +
			fmt.Sprintf("Content-Length: %d\r\n", len(text)) + strings.Join(lines, "\r\n") + "\r\n\r\n" + text
	}
	get := func(target string, lines ...string) string {
		return "GET " + target + " HTTP/1.1\r\nHost: sluice\r\nConnection: close\r\n" + strings.Join(append(lines, ""), "\r\n") + "\r\n"
	}
	long := strings.Repeat("x", 8<<10)
	many := func(n int) []string {
		lines := make([]string, n)
		for i := range lines {
			lines[i] = fmt.Sprintf("X-%d: y", i)
		}
		return lines
	}
	accepted, refused := []int{200, 202}, []int{400}
	for _, test := range []struct {
		name, request string
		want          []int
	}{
		{"a long field", post("X-Long: " + long), accepted},
		{"a huge field", post("X-Huge: " + strings.Repeat("x", 64<<10)), []int{431}},
		{"a long name", post(long + ": y"), accepted},
		{"many fields", post(many(800)...), accepted},
		{"too many fields", post(many(10_000)...), []int{431}},
		{"one field again and again", post(slices.Repeat([]string{"Accept: */*"}, 800)...), accepted},
		{"a NUL", post("X-A: a\x00b"), refused},
		{"a bell", post("X-A: a\x07b"), refused},
		{"a carriage return", post("X-A: a\rX-B: b"), refused},
		{"no UTF-8", post("X-A: \xff\xfe"), accepted},
		{"a space in a name", post("X A: b"), refused},
		{"a space behind a name", post("X-A : b"), refused},
		{"no name", post(": b"), refused},
		{"no colon", post("X-A"), refused},
		{"a second host", post("Host: other"), refused},
		{"a host that is none", "GET /orders HTTP/1.1\r\nHost: a b\r\n\r\n", refused},
		{"no host", "GET /orders HTTP/1.1\r\n\r\n", refused},
		{"a charset in strange letters", post(`Content-Type: text/plain`), accepted}, // the first one counts

		{"an open key", post(`Idempotency-Key: "k`), refused},
		{"no key", post(`Idempotency-Key:`), refused},
		{"an empty key", post(`Idempotency-Key: ""`), refused},
		{"a key of 255", post(`Idempotency-Key: ` + long[:255]), accepted},
		{"a key of 256", post(`Idempotency-Key: ` + long[:256]), refused},
		{"a long key", post(`Idempotency-Key: "` + long + `"`), refused},
		{"two keys", post(`Idempotency-Key: "a"`, `Idempotency-Key: "b"`), refused},
		{"a list of keys", post(`Idempotency-Key: "a", "b"`), refused},
		{"a key in strange letters", post("Idempotency-Key: \"\u00e4\""), refused},
		{"a key with an escape", post(`Idempotency-Key: "a\nb"`), refused},
		{"a key of another type", post(`Idempotency-Key: :YWJj:`), accepted}, // a bare token to us

		{"to wait for ever", post("Prefer: wait=99999999999999999999"), []int{200}},
		{"to wait backwards", post("Prefer: wait=-1"), []int{202}},
		{"to wait a fraction", post("Prefer: wait=1.5"), []int{202}},
		{"to wait an open string", post(`Prefer: wait="`), []int{202}},
		{"nothing, often", post("Prefer: " + strings.Repeat(",;=", 2000)), []int{202}},
		{"to wait twice", post("Prefer: wait=x, wait=30"), []int{202}},

		{"a trace of nothing", post("traceparent: "), accepted},
		{"a trace of zeros", post("traceparent: 00-00000000000000000000000000000000-0000000000000000-00"), accepted},
		{"a trace with other letters", post("traceparent: 00-zzzzzzzzzzzzzzzzzzzzzzzzzzzzzzzz-zzzzzzzzzzzzzzzz-zz"), accepted},
		{"a trace of a bad version", post("traceparent: ff-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"), accepted},
		{"a trace too long", post("traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01-" + long), accepted},
		{"two traces", post("traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "traceparent: x"), accepted},
		{"a state of traces too long", post("traceparent: 00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01", "tracestate: "+long), accepted},
		{"odd baggage", post("baggage: " + strings.Repeat("a=b;c,%zz,=,", 500)), accepted},

		{"a negative length", "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", refused},
		{"a signed length", "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: +2\r\n\r\n{}", refused},
		{"a length beyond all numbers", "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n", refused},
		{"the largest length", "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: 9223372036854775807\r\n\r\n", []int{413}},
		{"an expectation", post("Expect: wonders"), []int{417}},
		{"an upgrade", post("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAAP__"), accepted},
		{"a coding", post("Content-Encoding: gzip"), accepted}, // a lie: it was not coded

		{"a tag again and again", get("/orders/"+missingID, "If-None-Match: "+strings.Repeat(`W/"a",`, 1000)), []int{404}},
		{"a whole URL", get("http://elsewhere.test/orders"), []int{200}},
		{"a long target", get("/orders?x=" + strings.Repeat("x", 64<<10)), []int{431}},
		{"a target that is no path", get("orders"), refused},
		{"a target with a bad escape", get("/orders/%zz"), refused},
		{"a query with a bad escape", get("/orders?limit=%zz"), []int{400}},
		{"a query with a semicolon", get("/orders?limit=1;status=saved"), []int{400}},
		{"a query with a NUL", get("/orders?orderNumber=%00&status="), []int{200, 400}},
		{"a limit beyond all numbers", get("/orders?limit=99999999999999999999"), refused},
		{"a path upwards", get("/orders/../../../etc/passwd"), []int{301, 307, 404}},
		{"a path with two slashes", get("//elsewhere.test/"), []int{301, 307, 404}},
		{"a star", "OPTIONS * HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", []int{200}},
		{"a tunnel", "CONNECT elsewhere.test:443 HTTP/1.1\r\nHost: elsewhere.test:443\r\nConnection: close\r\n\r\n", []int{400, 404, 405}},
		{"no version", "GET /orders\r\n\r\n", refused},
		{"no request", strings.Repeat("\x16\x03\x01\x02", 10) + "\r\n\r\n", refused},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := g.dial(t)
			c.send(t, test.request)
			res := c.receive(t)
			require.Contains(t, test.want, res.status, "%.200s", res.body)
			if res.status == http.StatusAccepted {
				require.Regexp(t, "^[0-9a-f]{32}$", res.order(t).TraceID)
				require.NotContains(t, res.order(t).TraceID, strings.Repeat("0", 32))
			}
		})
	}
	require.NotContains(t, g.log(), "panic")
	g.drained(t, patience)
	for _, o := range g.numbered(t, "") {
		require.Equal(t, "saved", o.Status, "what came with odd headers is an order like others")
	}
}

// hidden stands in the text behind a request. A server that reads the request's
// length otherwise than the proxy before it takes it for a request of its own.
var hidden = "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\n" +
	fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body("HIDDEN")), body("HIDDEN"))

func TestRequestsCannotBeSmuggled(t *testing.T) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b))
	post := func(header, body string) string {
		return "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + header + "\r\n\r\n" + body
	}
	text := body("VISIBLE")
	chunked := fmt.Sprintf("%x\r\n%s\r\n0\r\n\r\n", len(text), text)
	length := fmt.Sprintf("Content-Length: %d", len(text))

	for name, request := range map[string]string{
		"two lengths":                  post(length+"\r\nContent-Length: 3", text+hidden),
		"two lengths in one":           post(length+", 3", text+hidden),
		"a length in hex":              post(fmt.Sprintf("Content-Length: 0x%x", len(text)), text+hidden),
		"a coding like chunked":        post(length+"\r\nTransfer-Encoding: xchunked", text+hidden),
		"chunked, and then another":    post(length+"\r\nTransfer-Encoding: chunked, identity", text+hidden),
		"another, and then chunked":    post(length+"\r\nTransfer-Encoding: gzip, chunked", text+hidden),
		"two codings":                  post("Transfer-Encoding: identity\r\nTransfer-Encoding: chunked", chunked+hidden),
		"chunked twice":                post("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked", chunked+hidden),
		"a space behind the name":      post(length+"\r\nTransfer-Encoding : chunked", text+hidden),
		"a tab before chunked":         post(length+"\r\nTransfer-Encoding:\x0bchunked", text+hidden),
		"chunked in quotes":            post(length+"\r\nTransfer-Encoding: \"chunked\"", text+hidden),
		"a chunk of no size":           post("Transfer-Encoding: chunked", "\r\n"+text+"\r\n0\r\n\r\n"+hidden),
		"a chunk size with a sign":     post("Transfer-Encoding: chunked", "+"+chunked+hidden),
		"a chunk size below 0":         post("Transfer-Encoding: chunked", "-"+chunked+hidden),
		"a chunk size in C":            post("Transfer-Encoding: chunked", "0x"+chunked+hidden),
		"a chunk size beyond numbers":  post("Transfer-Encoding: chunked", "1000000000000000"+chunked+hidden),
		"a chunk longer than its size": post("Transfer-Encoding: chunked", "3\r\n"+text+"\r\n0\r\n\r\n"+hidden),
		"a line feed alone":            post("Transfer-Encoding: chunked", strings.Replace(chunked, "\r\n", "\n", 1)+hidden),
		"chunked in HTTP/1.0":          strings.Replace(post("Transfer-Encoding: chunked", chunked+hidden), "HTTP/1.1", "HTTP/1.0", 1),
	} {
		t.Run(name, func(t *testing.T) {
			c := g.dial(t)
			c.send(t, request)
			a := c.receive(t)
			require.Contains(t, []int{400, 501}, a.status, string(a.body))
			require.Zero(t, c.remains(t), "one answer, and no more than that")
			require.Empty(t, g.numbered(t, "VISIBLE"))
			require.Empty(t, g.numbered(t, "HIDDEN"))
		})
	}

	// RFC 9112, section 6.3: the coding goes before the length. The trap is to
	// see less of it (and the rest as another request) or more.
	t.Run("a coding and a length", func(t *testing.T) {
		c := g.dial(t)
		c.send(t, post("Content-Length: 5\r\nTransfer-Encoding: chunked\r\nConnection: close", chunked))
		a := c.receive(t)
		require.Equal(t, http.StatusAccepted, a.status, string(a.body))
		require.Zero(t, c.remains(t))
		require.Equal(t, "VISIBLE", *a.order(t).OrderNumber)
	})
	g.drained(t, patience)
	require.Equal(t, 1, b.stats(t).Requests)
}

func TestSlowClientsAreCutOffAndDisturbNobody(t *testing.T) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b, "http.read_header_timeout", "2s", "http.read_timeout", "2s", "http.idle_timeout", "2s"))
	const head = "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
	const each = 60
	cut, release := context.WithCancel(t.Context())
	defer release()
	var wg sync.WaitGroup
	var mu sync.Mutex
	seen := map[string]map[int]int{} // kind: answer (0 = none): how often
	for name, kind := range map[string]struct{ at, drip string }{
		"says nothing":                 {"", ""},
		"begins a header":              {"POST /ord", ""},
		"sends a header slowly":        {head, "X-Slow: x\r\n"},
		"sends a field slowly":         {head + "X-Slow: ", "x"},
		"begins a body":                {head + "Content-Length: 1000\r\n\r\n{", ""},
		"sends a body slowly":          {head + "Content-Length: 1000000\r\n\r\n{", " "},
		"sends chunks slowly":          {head + "Transfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n"},
		"sends no more than a request": {"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", ""},
	} {
		for range each {
			c := g.dial(t)
			wg.Go(func() {
				status := c.dripUntilCut(cut, kind.at, kind.drip)
				mu.Lock()
				defer mu.Unlock()
				if seen[name] == nil {
					seen[name] = map[int]int{}
				}
				seen[name][status]++
			})
		}
	}
	var done atomic.Bool
	go func() {
		wg.Wait()
		done.Store(true)
	}()
	var ids []string
	for i := 0; !done.Load() || i < 100; i++ {
		ids = append(ids, g.accept(t, fmt.Sprintf("A-%d", i)).ID)
	}
	wg.Wait()
	t.Logf("%d orders accepted while %d clients were slow; answers to those: %v", len(ids), 8*each, seen)
	require.NoError(t, cut.Err())
	for name, answers := range seen {
		switch {
		case strings.Contains(name, "body"), strings.Contains(name, "chunk"):
			require.Equal(t, map[int]int{http.StatusRequestTimeout: each}, answers, name)
		case strings.Contains(name, "request"):
			require.Equal(t, map[int]int{http.StatusNotFound: each}, answers, name)
		default: // a header that is not complete gets no answer, or 400
			require.Equal(t, each, answers[0]+answers[http.StatusBadRequest], name)
		}
	}
	for _, id := range ids {
		g.await(t, id, "saved")
	}
	require.Equal(t, len(ids), b.stats(t).Requests)
	require.Zero(t, g.terminate(t))
}

func TestClientsMayLeaveAtAnyMoment(t *testing.T) {
	b := backend(t, "--latency", "100ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b))
	g.await(t, g.accept(t, "A-0").ID, "saved")
	before := g.connections(t)
	const each = 20
	post := func(path, header, number string) string {
		return "POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + header + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body(number)), body(number))
	}
	for i := range each {
		for kind, text := range map[string]string{
			"body":  strings.TrimSuffix(post("/orders", "", fmt.Sprintf("body-%d", i)), "}"),
			"chunk": "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n" + body(fmt.Sprintf("chunk-%d", i)),
			"sent":  post("/orders", "", fmt.Sprintf("sent-%d", i)),
			"wait":  post("/orders", "Prefer: wait=20\r\n", fmt.Sprintf("wait-%d", i)),
			"sync":  post("/orders/sync", "", fmt.Sprintf("sync-%d", i)),
		} {
			c := g.dial(t)
			c.send(t, text)
			if i%2 == 0 && (kind == "body" || kind == "chunk") {
				// With a reset, as if the machine had gone away.
				require.NoError(t, c.Conn.(*net.TCPConn).SetLinger(0))
			}
			require.NoError(t, c.Close())
		}
	}
	eventually(t, patience, func() bool { return g.connections(t) <= before }, "connections are served that are gone")
	// What was sent in part is not an order. What was sent in full may be one;
	// its client does not know, sends it again, and has one order.
	ids := map[string]string{}
	for i := range each {
		require.Empty(t, g.numbered(t, fmt.Sprintf("body-%d", i)))
		require.Empty(t, g.numbered(t, fmt.Sprintf("chunk-%d", i)))
		for _, kind := range []string{"sent", "wait", "sync"} {
			number := fmt.Sprintf("%s-%d", kind, i)
			ids[number] = g.accept(t, number).ID
			require.Len(t, g.numbered(t, number), 1)
		}
	}
	g.drained(t, patience)
	g.requireAllSaved(t, ids)
	stats := b.stats(t)
	t.Logf("backend after clients left: %+v", stats)
	require.Zero(t, stats.Repeats)
}

func TestTenThousandIdleConnections(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("memory and open files are read from /proc")
	}
	const n, timeout = 10_000, "8s"
	b := backend(t, "--latency", "1ms")
	g := serve(t, false, embedded(t.TempDir()), fast(b, "http.read_header_timeout", timeout, "http.idle_timeout", timeout))
	first, err := g.flood(t.Context(), 8, 100, func(i int) string { return fmt.Sprintf("before-%d", i) })
	require.NoError(t, err)
	files, memory := openFiles(t, g.process), residentMemory(t, g.process)

	started := time.Now()
	conns, err := openMany(g.url, n)
	defer func() {
		for _, c := range conns {
			_ = c.Close() // it may be closed
		}
	}()
	if errors.Is(err, syscall.EMFILE) {
		if os.Getenv("CI") != "" {
			require.NoError(t, err)
		}
		t.Skipf("this machine does not allow 10,000 connections of one process (ulimit -n): %v", err)
	}
	require.NoError(t, err)
	opened := time.Since(started)
	require.GreaterOrEqual(t, openFiles(t, g.process), files+n-100, "so many are open at once")

	during, err := g.flood(t.Context(), 8, 500, func(i int) string { return fmt.Sprintf("during-%d", i) })
	require.NoError(t, err)
	grown := residentMemory(t, g.process)
	t.Logf("%d connections opened in %v; open files %d then %d; memory %d MiB then %d MiB; 500 orders accepted meanwhile",
		n, opened.Round(time.Millisecond), files, openFiles(t, g.process), memory>>20, grown>>20)
	require.Less(t, grown, int64(1<<30))
	g.drained(t, patience)

	// Half of them have sent a request, and the other half nothing ever.
	deadline := time.Now().Add(patience)
	for _, c := range conns {
		require.NoError(t, c.SetReadDeadline(deadline))
		_, err := c.Read(make([]byte, 1))
		require.ErrorIs(t, err, io.EOF, "an idle connection is closed by the server")
	}
	eventually(t, patience, func() bool { return openFiles(t, g.process) < files+100 }, "files are left open")
	g.requireAllSaved(t, first, during)
	require.Equal(t, 600, b.stats(t).Requests)
	require.Zero(t, g.terminate(t))
}

// openMany opens idle connections; every other one has sent a request and got
// its answer. It needs no goroutine for each, of which a test with the race
// detector may have 8,000.
func openMany(url string, n int) ([]net.Conn, error) {
	var (
		mu    sync.Mutex
		conns []net.Conn
		first error
		wg    sync.WaitGroup
		next  atomic.Int64
	)
	for range 32 {
		wg.Go(func() {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				c, err := net.DialTimeout("tcp", strings.TrimPrefix(url, "http://"), patience)
				if err == nil && i%2 == 0 {
					err = askNothing(c)
				}
				mu.Lock()
				if c != nil {
					conns = append(conns, c)
				}
				if first == nil {
					first = err
				}
				mu.Unlock()
				if err != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return conns, first
}

func askNothing(c net.Conn) error {
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		return err
	}
	if _, err := io.WriteString(c, "GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		return err
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, err = io.Copy(io.Discard, res.Body)
	return err
}

func TestClientsThatDoNotReadTheirAnswersAreCutOff(t *testing.T) {
	talkative := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, strings.Repeat("bla ", 256<<10))
	}))
	defer talkative.Close()
	g := serve(t, true, embedded(t.TempDir()), settings{"backend.url": talkative.URL, "dispatch.max_response": "1MiB", "http.write_timeout": "2s"})
	o := g.await(t, g.accept(t, "A-0").ID, "saved")
	before := g.connections(t)
	// Far more than what fits between the two ends.
	request := "GET /orders/" + o.ID + " HTTP/1.1\r\nHost: x\r\n\r\n"
	for range 4 {
		c := g.dial(t)
		require.NoError(t, c.Conn.(*net.TCPConn).SetReadBuffer(4<<10))
		c.send(t, strings.Repeat(request, 20))
	}
	eventually(t, patience, func() bool {
		require.Equal(t, http.StatusAccepted, g.post(t, body("A-0")).status)
		return g.connections(t) <= before
	}, "who does not read holds a connection for ever")
	// Who reads slowly has all the time that it takes.
	const answers = 14
	c := g.dial(t)
	c.send(t, strings.Repeat(request, answers-1)+strings.Replace(request, "Host: x", "Host: x\r\nConnection: close", 1))
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	read := int64(0)
	for range 50 {
		<-tick.C
		n, err := io.CopyN(io.Discard, c.in, 256<<10)
		require.NoError(t, err)
		read += n
	}
	require.Greater(t, read+c.remains(t), int64(answers<<20))
}

func TestClientsCannotTakeAllFilesOfTheProcess(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("open files are read from /proc")
	}
	const limit = 160
	b := backend(t, "--latency", "100ms")
	s := fast(b, "http.addr", "127.0.0.1:0", "http.admin_addr", "127.0.0.1:0", "http.read_header_timeout", "1s",
		"store.dsn", filepath.Join(t.TempDir(), "sluice.db"), "log.format", "json", "dispatch.concurrency", "16", "dispatch.max_attempts", "1")
	p := launch(t, "/bin/sh", s.env(), "-c", fmt.Sprintf(`ulimit -n %d && exec "$0" serve`, limit), binary(t, true))
	g := &gateway{p, "http://" + p.field(t, "ready", "addr"), "http://" + p.field(t, "ready", "admin_addr")}
	ids, err := g.flood(t.Context(), 8, 100, func(i int) string { return fmt.Sprintf("A-%d", i) })
	require.NoError(t, err)
	client.CloseIdleConnections()
	for range limit + 40 {
		g.dial(t) // and say nothing
	}
	eventually(t, patience, func() bool {
		require.Less(t, openFiles(t, p), limit, "some are left for the backend, the store and the operator")
		return g.status(t).Backlog == 0
	}, "the backlog is not empty")
	ids["B-0"] = g.accept(t, "B-0").ID
	g.drained(t, patience)
	g.requireAllSaved(t, ids)
	require.NotContains(t, p.log(), "too many open files")
}

func TestBeyondTheConnectionLimitClientsWaitTheirTurn(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("open files are read from /proc")
	}
	const limit, n = 20, 60
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b, "http.max_connections", "20", "http.read_header_timeout", "1s", "http.idle_timeout", "1s"))
	g.await(t, g.accept(t, "A-0").ID, "saved")
	files, most := openFiles(t, g.process), 0
	for range n {
		g.dial(t) // and say nothing
	}
	accepted := make(chan answer)
	go func() {
		a, _ := try(t.Context(), http.MethodPost, g.url+"/orders", body("A-1"), map[string]string{"Content-Type": "application/json", "Connection": "close"})
		accepted <- a
	}()
	for waiting := true; waiting; {
		select {
		case a := <-accepted:
			require.Equal(t, http.StatusAccepted, a.status, string(a.body))
			waiting = false
		default:
			g.status(t) // operators come through all the time
		}
		most = max(most, openFiles(t, g.process))
	}
	t.Logf("open files: %d at rest, %d with %d clients at the door", files, most, n)
	require.LessOrEqual(t, most, files+limit+10)
	g.drained(t, patience)
	require.Equal(t, 2, b.stats(t).Requests)
}

// padded is a valid order of this size, at most 1 MiB.
func padded(number string, size int) string {
	text := strings.TrimSuffix(body(number), "}") + `,"pad":"`
	return text + padding[:size-len(text)-len(`"}`)] + `"}`
}

var padding = strings.Repeat("x", 1<<20)

func TestManyLargeBodiesAtOnceTakeBoundedMemory(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("memory is read from /proc")
	}
	const n = 300
	t.Setenv("GOGC", "100") // what the process needs counts, not how late it collects its garbage
	b := backend(t, "--latency", "1ms")
	g := serve(t, false, embedded(t.TempDir()), fast(b, "http.read_timeout", "1m"))
	memory := residentMemory(t, g.process)

	// Everybody sends a part and waits, until somebody is told that there is no
	// room.
	var sent, answered sync.WaitGroup
	resume, answers, refused := make(chan struct{}), make([]answer, n), make(chan struct{}, n)
	for i := range n {
		c := g.dial(t)
		text := padded(fmt.Sprintf("large-%d", i), 1<<20)
		sent.Add(1)
		go func() {
			_, err := fmt.Fprintf(c, "POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s", len(text), text[:64<<10])
			sent.Done()
			<-resume
			if err == nil {
				_, _ = io.WriteString(c, text[64<<10:]) // refused orders are not read to their end
			}
		}()
		answered.Go(func() {
			answers[i], _ = c.answer() // status 0 if there is none
			if answers[i].status == http.StatusServiceUnavailable {
				refused <- struct{}{}
			}
		})
	}
	sent.Wait()
	small, err := g.flood(t.Context(), 8, 200, func(i int) string { return fmt.Sprintf("small-%d", i) })
	require.NoError(t, err, "small orders do not wait for large ones")
	select {
	case <-refused:
	case <-time.After(patience):
		require.Fail(t, "all large orders wait for each other")
	}
	held := residentMemory(t, g.process)
	close(resume)
	peak := held
	done := make(chan struct{})
	go func() { answered.Wait(); close(done) }()
	eventually(t, patience, func() bool {
		peak = max(peak, residentMemory(t, g.process))
		select {
		case <-done:
			return true
		default:
			return false
		}
	}, "large orders are not answered")

	large := map[string]string{}
	for i, a := range answers {
		switch a.status {
		case http.StatusAccepted:
			large[fmt.Sprintf("large-%d", i)] = a.order(t).ID
		default: // there was no room; that may be said, and nothing else
			a.problem(t, http.StatusServiceUnavailable, "overloaded")
			require.NotEmpty(t, a.header.Get("Retry-After"))
		}
	}
	t.Logf("%d of %d large orders accepted; memory %d MiB at rest, %d MiB while they came slowly, %d MiB at most", len(large), n, memory>>20, held>>20, peak>>20)
	require.GreaterOrEqual(t, len(large), 200)
	require.Less(t, len(large), n)
	require.Less(t, peak, int64(1<<30))
	g.drained(t, patience)
	g.requireAllSaved(t, small, large)
	require.Equal(t, len(small)+len(large), b.stats(t).Requests)
}

func TestOrdersThatAreCostlyToCheckTakeBoundedMemory(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("memory is read from /proc")
	}
	t.Setenv("GOGC", "100") // as above
	b := backend(t, "--latency", "1ms")
	g := serve(t, false, embedded(t.TempDir()), fast(b))
	// Each of the items has three faults.
	costly := strings.Replace(body("A-1"), "[{", "["+strings.Repeat("{},", 40_000)+"{", 1)
	var wg sync.WaitGroup
	answers := make([]answer, 24)
	for i := range answers {
		wg.Go(func() { answers[i], _ = try(t.Context(), http.MethodPost, g.url+"/orders", costly, jsonHeader()) })
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	peak, ids := int64(0), map[string]string{}
	for i, busy := 0, true; busy; i++ {
		peak = max(peak, residentMemory(t, g.process))
		number := fmt.Sprintf("good-%d", i)
		ids[number] = g.accept(t, number).ID
		select {
		case <-done:
			busy = false
		default:
		}
	}
	t.Logf("memory %d MiB at most while %d orders of %d KiB were checked; %d others accepted meanwhile", peak>>20, len(answers), len(costly)>>10, len(ids))
	for _, a := range answers {
		p := a.problem(t, http.StatusUnprocessableEntity, "invalid-order")
		require.Len(t, p.Errors, 20)
		require.Equal(t, "/items/0/quantity", p.Errors[0].Pointer)
	}
	require.Less(t, peak, int64(512<<20))
	g.drained(t, patience)
	g.requireAllSaved(t, ids)
}

func TestAClientThatWaitsIsNotCutOffByTheReadTimeout(t *testing.T) {
	b := backend(t, "--latency", "4s")
	g := serve(t, true, embedded(t.TempDir()), fast(b, "http.read_header_timeout", "1s", "http.read_timeout", "1s", "http.idle_timeout", "1s"))
	known := g.accept(t, "A-0")
	post := func(path, number, more string) string {
		return "POST " + path + " HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n" + more + fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body(number)), body(number))
	}
	var wg sync.WaitGroup
	for name, requests := range map[string][]string{
		"wait":         {post("/orders", "A-1", "Prefer: wait=20\r\n")},
		"chunked wait": {fmt.Sprintf("POST /orders HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nPrefer: wait=20\r\nTransfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n", len(body("A-2")), body("A-2"))},
		"second wait":  {post("/orders", "A-3", ""), post("/orders", "A-3", "Prefer: wait=20\r\n")},
		"get":          {"GET /orders/" + known.ID + " HTTP/1.1\r\nHost: x\r\nPrefer: wait=20\r\n\r\n"},
		"sync":         {post("/orders/sync", "A-4", "")},
		"large sync":   {strings.Replace(post("/orders/sync", "A-5", ""), fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(body("A-5")), body("A-5")), "Content-Length: 500000\r\n\r\n"+padded("A-5", 500_000), 1)},
	} {
		c := g.dial(t)
		wg.Go(func() {
			var a answer
			var err error
			for _, request := range requests {
				if _, err = io.WriteString(c, request); err == nil {
					a, err = c.answer()
				}
			}
			var o order
			if err == nil {
				err = json.Unmarshal(a.body, &o)
			}
			if err != nil || a.status != http.StatusOK || o.Status != "saved" {
				t.Errorf("%s: status %d, %s, error %v", name, a.status, a.body, err)
			}
		})
	}
	wg.Wait()
	g.drained(t, patience)
	require.Equal(t, 6, b.stats(t).Orders)
	require.Zero(t, b.stats(t).Repeats)
}

func TestWithAFullDiskNothingAcceptedIsLost(t *testing.T) {
	b, dir := backend(t, "--latency", "200ms"), t.TempDir()
	file := filepath.Join(dir, "sluice.db")
	s := fast(b, "dispatch.concurrency", "16", "store.dsn", file+"?_pragma=max_page_count(250)", "http.shutdown_timeout", "2s")
	g := serve(t, true, embedded(dir), s)

	accepted := map[string]string{}
	var full answer
	for i := 0; full.status == 0; i++ {
		require.Less(t, i, 5000, "the database does not become full")
		number := fmt.Sprintf("A-%d", i)
		switch a := g.post(t, padded(number, 2000)); a.status {
		case http.StatusAccepted:
			accepted[number] = a.order(t).ID
		default:
			full = a
		}
	}
	full.problem(t, http.StatusServiceUnavailable, "storage-unavailable")
	t.Logf("%d orders accepted until the disk was full; backlog then %d", len(accepted), g.status(t).Backlog)
	require.NotEmpty(t, full.header.Get("Retry-After"))

	var report struct {
		Status string
		Checks map[string]struct{ Status, Error string }
	}
	eventually(t, patience, func() bool {
		a := do(t, http.MethodGet, g.admin+"/readyz", "", nil)
		require.NoError(t, json.Unmarshal(a.body, &report))
		return a.status == http.StatusServiceUnavailable
	}, "ready with a full disk")
	require.Equal(t, "unavailable", report.Status)
	require.Equal(t, "failed", report.Checks["storage"].Status)
	require.Contains(t, report.Checks["storage"].Error, "full")
	require.Equal(t, http.StatusOK, do(t, http.MethodGet, g.admin+"/livez", "", nil).status)

	// It says no at once, again and again, and still tells of what it has.
	started := time.Now()
	for i := range 50 {
		number := fmt.Sprintf("B-%d", i)
		switch a := g.post(t, padded(number, 2000)); a.status {
		case http.StatusAccepted: // a smaller row may fit where a larger one did not
			accepted[number] = a.order(t).ID
		default:
			a.problem(t, http.StatusServiceUnavailable, "storage-unavailable")
		}
	}
	require.Less(t, time.Since(started), patience)
	for number, id := range accepted {
		require.Equal(t, number, *g.get(t, id).OrderNumber)
	}
	g.terminate(t) // whose outcomes could not be stored is unfinished business, so the code may be 1

	s["store.dsn"] = file
	g = serve(t, true, embedded(dir), s)
	g.drained(t, patience)
	g.requireAllSaved(t, accepted)
	require.Equal(t, len(accepted), b.stats(t).Orders, "what was refused was never sent")
	require.Zero(t, g.terminate(t))
}

// wire is a connection of a client that speaks HTTP by hand.
type wire struct {
	net.Conn
	in       *bufio.Reader
	sent     string // by send, the beginning
	answered bool   // at least once
}

// dial connects to the clients' address; the connection is closed after the
// test. Whatever is awaited on it comes within patience.
func (g *gateway) dial(t testing.TB) *wire {
	t.Helper()
	conn, err := net.DialTimeout("tcp", strings.TrimPrefix(g.url, "http://"), patience)
	require.NoError(t, err)
	t.Cleanup(func() { _ = conn.Close() }) // it may be closed
	require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
	return &wire{Conn: conn, in: bufio.NewReader(conn)}
}

// send writes text. A server that has seen enough may have hung up before the
// end; what it says to the beginning is what counts.
func (c *wire) send(t testing.TB, text string) {
	t.Helper()
	c.sent += text[:min(len(text), 64<<10)]
	if _, err := io.WriteString(c, text); err != nil {
		require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
	}
}

// receive reads one answer.
func (c *wire) receive(t testing.TB) answer {
	t.Helper()
	a, err := c.answer()
	require.NoError(t, err)
	return a
}

func (c *wire) answer() (answer, error) {
	method, _, _ := strings.Cut(c.sent, " ")
	res, err := http.ReadResponse(c.in, &http.Request{Method: method})
	for err == nil && res.StatusCode == http.StatusContinue {
		res, err = http.ReadResponse(c.in, &http.Request{Method: method})
	}
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	a := answer{res.StatusCode, res.Header, text}
	if err == nil && !c.answered {
		c.answered = true
		err = contract.checkRaw(c.sent, a)
	}
	return a, err
}

// remains waits until the server hangs up, and returns how many bytes came
// before.
func (c *wire) remains(t testing.TB) int64 {
	t.Helper()
	n, err := io.Copy(io.Discard, c.in)
	if err != nil {
		require.NotErrorIs(t, err, os.ErrDeadlineExceeded, "the server does not hang up")
	}
	return n
}

// dripUntilCut sends text, and then a drip ten times a second until the server
// hangs up. It returns the status that the server answered with, 0 for none. It
// gives up when ctx ends or patience does.
func (c *wire) dripUntilCut(ctx context.Context, text, drip string) int {
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		_, err := io.WriteString(c, text)
		for err == nil && drip != "" {
			select {
			case <-tick.C:
				_, err = io.WriteString(c, drip)
			case <-stop:
				return
			case <-ctx.Done():
				_ = c.Close() // the test has failed
				return
			}
		}
	})
	defer wg.Wait()
	defer close(stop)
	a, err := c.answer()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		return -1
	}
	if _, err = io.Copy(io.Discard, c.in); errors.Is(err, os.ErrDeadlineExceeded) {
		return -1
	}
	return a.status
}

// numbered returns the orders with a number, or all of the last 500.
func (g *gateway) numbered(t testing.TB, number string) []order {
	t.Helper()
	var list struct{ Orders []order }
	getJSON(t, g.url+"/orders?limit=500&orderNumber="+number, &list)
	return list.Orders
}

// requireAllSaved looks at every order.
func (g *gateway) requireAllSaved(t testing.TB, accepted ...map[string]string) {
	t.Helper()
	for _, ids := range accepted {
		for number, id := range ids {
			o := g.get(t, id)
			require.Equal(t, number, *o.OrderNumber)
			require.Equal(t, "saved", o.Status, number)
		}
	}
}

// connections asks the profiler how many goroutines serve one.
func (g *gateway) connections(t testing.TB) int {
	t.Helper()
	a := do(t, http.MethodGet, g.admin+"/debug/pprof/goroutine?debug=2", "", nil)
	require.Equal(t, http.StatusOK, a.status)
	return strings.Count(string(a.body), "created by net/http.(*Server).Serve ")
}

// openFiles returns how many files and connections a process has open (Linux).
func openFiles(t testing.TB, p *process) int {
	t.Helper()
	files, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	require.NoError(t, err)
	return len(files)
}
