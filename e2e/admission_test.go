package e2e

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"io"
	"maps"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/dunglas/httpsfv"
	"github.com/stretchr/testify/require"
)

// keyring writes http.api_keys for name, key pairs.
func keyring(pairs ...string) string {
	var entries []string
	for i := 0; i+1 < len(pairs); i += 2 {
		entries = append(entries, fmt.Sprintf("%s:%x", pairs[i], sha256.Sum256([]byte(pairs[i+1]))))
	}
	return strings.Join(entries, ",")
}

// caller is a client of a gateway with one API key.
type caller struct {
	g   *gateway
	key string
}

func (c caller) do(t testing.TB, method, path, body string, header ...string) answer {
	t.Helper()
	return do(t, method, c.g.url+path, body, jsonHeader(append(header, "Authorization", "Bearer "+c.key)...))
}

func (c caller) post(t testing.TB, body string, header ...string) answer {
	t.Helper()
	return c.do(t, http.MethodPost, "/orders", body, header...)
}

func (c caller) accept(t testing.TB, body string, header ...string) order {
	t.Helper()
	a := c.post(t, body, header...)
	require.Equal(t, http.StatusAccepted, a.status, string(a.body))
	require.Empty(t, a.header.Get("Idempotent-Replayed"))
	return a.order(t)
}

// list returns the ids of the orders that the client is shown.
func (c caller) list(t testing.TB, query string) []string {
	t.Helper()
	a := c.do(t, http.MethodGet, "/orders"+query, "")
	require.Equal(t, http.StatusOK, a.status, string(a.body))
	var page struct{ Orders []order }
	require.NoError(t, json.Unmarshal(a.body, &page))
	ids := []string{}
	for _, o := range page.Orders {
		ids = append(ids, o.ID)
	}
	return ids
}

func (c caller) await(t testing.TB, id, state string) {
	t.Helper()
	eventually(t, time.Minute, func() bool {
		return c.do(t, http.MethodGet, "/orders/"+id, "").order(t).Status == state
	}, "order %s is not %s", id, state)
}

func TestOrdersBelongToTheNameOfTheKey(t *testing.T) { eachHome(t, testOrdersBelongToTheNameOfTheKey) }

func testOrdersBelongToTheNameOfTheKey(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms")
	keys := keyring("shop", "shop-old", "pos", "pos-1", "shop", "shop-new")
	g := serve(t, true, h, fast(b, "http.api_keys", keys))
	shop, renewed, pos := caller{g, "shop-old"}, caller{g, "shop-new"}, caller{g, "pos-1"}

	// The same number and the same Idempotency-Key under two names are two
	// orders, with the same body or another one.
	mine := shop.accept(t, body("A-1"), "Idempotency-Key", `"k"`)
	other := strings.Replace(body("A-1"), "tea", "coffee", 1)
	yours := pos.accept(t, other, "Idempotency-Key", `"k"`)
	require.NotEqual(t, mine.ID, yours.ID)
	same := pos.accept(t, body("A-2"), "Idempotency-Key", `"k-2"`)
	require.NotEqual(t, same.ID, shop.accept(t, body("A-2"), "Idempotency-Key", `"k-2"`).ID)

	// Both keys of a name are the same client: replays, conflicts, reads.
	for _, client := range []caller{shop, renewed} {
		for _, header := range [][]string{nil, {"Idempotency-Key", `"k"`}} {
			a := client.post(t, body("A-1"), header...)
			require.Equal(t, http.StatusAccepted, a.status)
			require.Equal(t, "true", a.header.Get("Idempotent-Replayed"))
			require.Equal(t, mine.ID, a.order(t).ID)
		}
		p := client.post(t, other).problem(t, http.StatusConflict, "duplicate-order-number")
		require.Equal(t, "/orders/"+mine.ID, p.Order)
		p = client.post(t, body("A-3"), "Idempotency-Key", `"k"`).problem(t, http.StatusUnprocessableEntity, "idempotency-key-reused")
		require.Equal(t, "/orders/"+mine.ID, p.Order)
		client.await(t, mine.ID, "saved")
	}
	pos.await(t, yours.ID, "saved")

	// Another's order and one that does not exist get the same answer.
	for _, path := range []string{"/orders/%s", "/orders/%s/attempts"} {
		for _, header := range [][]string{nil, {"Prefer", "wait=30"}, {"If-None-Match", "*"}} {
			hers := shop.do(t, http.MethodGet, fmt.Sprintf(path, yours.ID), "", header...)
			none := shop.do(t, http.MethodGet, fmt.Sprintf(path, missingID), "", header...)
			hers.problem(t, http.StatusNotFound, "order-not-found")
			require.Equal(t, string(none.body), strings.ReplaceAll(string(hers.body), yours.ID, missingID))
			for _, a := range []answer{hers, none} {
				a.header.Del("Date")
			}
			require.Equal(t, none.header, hers.header)
		}
	}

	// The direct way, too.
	direct := func(c caller) answer { return c.do(t, http.MethodPost, "/orders/sync", body("A-9")) }
	first, second := direct(shop), direct(pos)
	require.Equal(t, http.StatusOK, first.status, string(first.body))
	require.Equal(t, http.StatusOK, second.status, string(second.body))
	require.Empty(t, second.header.Get("Idempotent-Replayed"))
	require.Equal(t, "true", direct(renewed).header.Get("Idempotent-Replayed"))

	// Lists show one's own, in every way to ask.
	require.Len(t, shop.list(t, ""), 3)
	require.Equal(t, shop.list(t, ""), renewed.list(t, ""))
	require.Equal(t, []string{mine.ID}, shop.list(t, "?orderNumber=A-1"))
	require.Equal(t, []string{yours.ID}, pos.list(t, "?orderNumber=A-1"))
	require.Contains(t, pos.list(t, "?status=saved"), yours.ID)
	require.NotContains(t, pos.list(t, "?status=saved"), mine.ID)

	// After a restart without the old key: the orders are the name's.
	require.Zero(t, g.terminate(t))
	for _, secret := range []string{"shop-old", "pos-1", keys[5:20]} {
		require.NotContains(t, g.log(), secret)
	}
	g = serve(t, true, h, fast(b, "http.api_keys", keyring("pos", "pos-1", "shop", "shop-new")))
	shop.g, renewed.g = g, g
	shop.do(t, http.MethodGet, "/orders", "").problem(t, http.StatusUnauthorized, "unauthorized")
	require.Len(t, renewed.list(t, ""), 3)
	require.Equal(t, mine.ID, renewed.post(t, body("A-1")).order(t).ID)
}

func TestWithoutAKeyThereIsNothingButTheDocumentation(t *testing.T) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b, "http.api_keys", keyring("shop", "s3cret")))
	known := caller{g, "s3cret"}.accept(t, body("A-1"))
	for _, test := range []struct{ name, lines, challenge string }{
		{"no field", "", `Bearer realm="sluice"`},
		{"another scheme", "Authorization: Basic czNjcmV0Og==\r\n", `Bearer realm="sluice"`},
		{"a wrong key", "Authorization: Bearer secret\r\n", `Bearer realm="sluice", error="invalid_token"`},
		{"two fields", "Authorization: Bearer s3cret\r\nAuthorization: Bearer s3cret\r\n", `Bearer realm="sluice", error="invalid_request"`},
		{"two keys", "Authorization: Bearer s3cret, Bearer s3cret\r\n", `Bearer realm="sluice", error="invalid_request"`},
		{"a long key", "Authorization: Bearer " + strings.Repeat("x", 12<<10) + "\r\n", `Bearer realm="sluice", error="invalid_token"`},
		{"no UTF-8", "Authorization: Bearer \xff\xfe\r\n", `Bearer realm="sluice", error="invalid_request"`},
	} {
		t.Run(test.name, func(t *testing.T) {
			for _, request := range []string{"GET /orders", "GET /orders/" + known.ID, "GET /orders/" + missingID, "POST /orders", "POST /orders/sync", "DELETE /orders", "GET /nothing", "POST /docs", "GET /docs/../orders"} {
				c := g.dial(t)
				c.send(t, request+" HTTP/1.1\r\nHost: sluice\r\nContent-Type: application/json\r\nContent-Length: 2\r\nConnection: close\r\n"+test.lines+"\r\n{}")
				a := c.receive(t)
				a.problem(t, http.StatusUnauthorized, "unauthorized")
				require.Equal(t, test.challenge, a.header.Get("WWW-Authenticate"), request)
				require.NotContains(t, string(a.body), "s3cret")
			}
		})
	}
	for name, lines := range map[string]string{
		"a huge field": "Authorization: Bearer " + strings.Repeat("x", 64<<10), "a NUL": "Authorization: Bearer s3cret\x00", "a line": "Authorization: Bearer s3cret\rx",
	} {
		t.Run(name, func(t *testing.T) {
			c := g.dial(t)
			c.send(t, "GET /orders HTTP/1.1\r\nHost: sluice\r\nConnection: close\r\n"+lines+"\r\n\r\n")
			require.Contains(t, []int{400, 431}, c.receive(t).status)
		})
	}
	for _, path := range []string{"/problems/unauthorized", "/openapi.yaml", "/docs"} {
		require.NotEqual(t, http.StatusUnauthorized, do(t, http.MethodGet, g.url+path, "", nil).status, path)
	}
	require.Equal(t, http.StatusOK, do(t, http.MethodGet, g.url+"/orders", "", map[string]string{"Authorization": "bearer  s3cret"}).status)
	require.Equal(t, http.StatusOK, do(t, http.MethodGet, g.admin+"/admin/status", "", nil).status, "operators need no key")
	require.Contains(t, string(do(t, http.MethodGet, g.admin+"/metrics", "", nil).body), `sluice_http_unauthorized_total{`)
	require.NotContains(t, g.log(), "s3cret")
}

// rateLeft reads the field RateLimit of an answer.
func rateLeft(t testing.TB, a answer) (remaining, seconds int64) {
	t.Helper()
	list, err := httpsfv.UnmarshalList(a.header.Values("RateLimit"))
	require.NoError(t, err)
	require.Len(t, list, 1)
	item, ok := list[0].(httpsfv.Item)
	require.True(t, ok)
	r, _ := item.Params.Get("r")
	s, _ := item.Params.Get("t")
	remaining, ok = r.(int64)
	require.True(t, ok)
	seconds, ok = s.(int64)
	require.True(t, ok)
	return remaining, seconds
}

func TestAFloodAboveTheRateIsBoundedAndEveryoneGetsThrough(t *testing.T) {
	b := backend(t, "--latency", "1ms")
	const rate, orders = 40, 120
	g := serve(t, true, embedded(t.TempDir()), fast(b, "http.api_keys", keyring("shop", "s", "pos", "p"), "http.rate_limit", strconv.Itoa(rate)))
	started := time.Now()
	var flood sync.WaitGroup
	refusals := make(chan int, orders)
	for i := range orders {
		flood.Go(func() {
			header := jsonHeader("Authorization", "Bearer s")
			for n := 0; ; n++ {
				a, err := try(t.Context(), http.MethodPost, g.url+"/orders", body(fmt.Sprintf("A-%d", i)), header)
				if err != nil || a.status != http.StatusTooManyRequests && a.status != http.StatusAccepted {
					t.Errorf("%v: %d %s", err, a.status, a.body)
					return
				}
				if a.header.Get("RateLimit-Policy") != `"default";q=40;w=1` {
					t.Errorf("RateLimit-Policy is %q", a.header.Get("RateLimit-Policy"))
				}
				if a.status == http.StatusAccepted {
					refusals <- n
					return
				}
				seconds, err := strconv.Atoi(a.header.Get("Retry-After"))
				if err != nil || seconds < 1 {
					t.Errorf("Retry-After is %q", a.header.Get("Retry-After"))
					return
				}
				<-time.After(time.Duration(seconds) * time.Second)
			}
		})
	}
	// Meanwhile another name is not limited by it.
	pos := caller{g, "p"}
	pos.accept(t, body("A-1"))
	flood.Wait()
	took := time.Since(started)
	close(refusals)
	refused := 0
	for n := range refusals {
		refused += n
	}
	t.Logf("%d orders at %d/s took %v, %d refusals", orders, rate, took.Round(time.Millisecond), refused)
	require.GreaterOrEqual(t, took, (orders-rate)/rate*time.Second, "never above the rate")
	require.Positive(t, refused)
	require.Len(t, caller{g, "s"}.list(t, "?limit=500"), orders)

	a := pos.do(t, http.MethodPost, "/orders/sync", body("A-2"))
	require.Equal(t, http.StatusOK, a.status)
	remaining, seconds := rateLeft(t, a)
	require.LessOrEqual(t, remaining, int64(rate))
	require.EqualValues(t, 1, seconds)
	require.Empty(t, pos.do(t, http.MethodGet, "/orders", "").header.Get("RateLimit"), "reading is not limited")
	g.drained(t, time.Minute)
}

func TestTheBacklogLimitHoldsUnderConcurrency(t *testing.T) {
	eachHome(t, testTheBacklogLimitHoldsUnderConcurrency)
}

func testTheBacklogLimitHoldsUnderConcurrency(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms")
	b.control(t, `{"down": true}`)
	const limit = 20
	g := serve(t, true, h, fast(b, "intake.max_backlog", strconv.Itoa(limit), "dispatch.max_attempts", "1000"))
	var mu sync.Mutex
	accepted := map[string]bool{}
	var flood sync.WaitGroup
	for i := range 200 {
		flood.Go(func() {
			a, err := try(t.Context(), http.MethodPost, g.url+"/orders", body(fmt.Sprintf("A-%d", i)), jsonHeader())
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				t.Error(err)
			case a.status == http.StatusAccepted:
				accepted[a.header.Get("Location")] = true
			case a.status != http.StatusServiceUnavailable || a.header.Get("Retry-After") == "":
				t.Errorf("%d %s", a.status, a.body)
			}
		})
	}
	flood.Wait()
	t.Logf("%d of 200 at once accepted, the limit is %d", len(accepted), limit)
	require.LessOrEqual(t, len(accepted), limit, "not one more")
	for i := 0; len(accepted) < limit; i++ { // those that came too close together were refused early
		a := g.post(t, body(fmt.Sprintf("B-%d", i)))
		require.Equal(t, http.StatusAccepted, a.status, string(a.body))
		accepted[a.header.Get("Location")] = true
	}
	g.post(t, body("C-1")).problem(t, http.StatusServiceUnavailable, "backlog-full")
	require.Equal(t, limit, g.status(t).Backlog)

	// The direct way has no queue. When there is room again, orders are taken.
	b.control(t, `{"down": false}`)
	require.Equal(t, http.StatusOK, do(t, http.MethodPost, g.url+"/orders/sync", body("D-1"), jsonHeader()).status)
	g.drained(t, time.Minute)
	g.accept(t, "C-1")
}

func TestClientsComeByTLSAndARenewedCertificateIsShown(t *testing.T) {
	dir := t.TempDir()
	authority, authorityKey := certificate(t, nil, nil, 1)
	roots := x509.NewCertPool()
	roots.AddCert(authority)
	files := settings{"http.tls_cert": filepath.Join(dir, "cert.pem"), "http.tls_key": filepath.Join(dir, "key.pem")}
	renew := func(serial int64) {
		cert, key := certificate(t, authority, authorityKey, serial)
		der, err := x509.MarshalPKCS8PrivateKey(key)
		require.NoError(t, err)
		for path, block := range map[string]*pem.Block{
			files["http.tls_cert"]: {Type: "CERTIFICATE", Bytes: cert.Raw}, files["http.tls_key"]: {Type: "PRIVATE KEY", Bytes: der},
		} {
			require.NoError(t, os.WriteFile(path+".new", pem.EncodeToMemory(block), 0o600))
			require.NoError(t, os.Rename(path+".new", path))
		}
	}
	renew(2)
	b := backend(t, "--latency", "1ms")
	more := fast(b, "http.api_keys", keyring("shop", "s"))
	maps.Copy(more, files)
	g := serve(t, true, embedded(dir), more)
	addr := strings.TrimPrefix(g.url, "http://")

	// send posts an order on a connection of its own, and returns the serial
	// number of the certificate that was shown.
	send := func(number string) int64 {
		transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}}
		defer transport.CloseIdleConnections()
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+addr+"/orders", strings.NewReader(body(number)))
		require.NoError(t, err)
		req.Header = http.Header{"Content-Type": {"application/json"}, "Authorization": {"Bearer s"}}
		res, err := transport.RoundTrip(req)
		require.NoError(t, err)
		defer res.Body.Close()
		text, err := io.ReadAll(res.Body)
		require.NoError(t, err)
		require.Equal(t, http.StatusAccepted, res.StatusCode, string(text))
		require.Equal(t, 2, res.ProtoMajor)
		return res.TLS.PeerCertificates[0].SerialNumber.Int64()
	}
	require.EqualValues(t, 2, send("A-2"))
	renew(3)
	require.EqualValues(t, 3, send("A-3"))
	require.Equal(t, http.StatusBadRequest, do(t, http.MethodGet, g.url+"/orders", "", nil).status, "plain HTTP at the TLS port")
	g.drained(t, time.Minute) // asked for at the admin address, which is plain
	require.Zero(t, g.terminate(t))

	require.NoError(t, os.Remove(files["http.tls_key"]))
	p := launchServe(t, true, embedded(t.TempDir()), more)
	require.Equal(t, 2, p.exit(t))
	require.Contains(t, p.log(), "http.tls_key: open "+files["http.tls_key"])
	require.False(t, bytes.Contains([]byte(p.log()), []byte("PRIVATE")))
}

// certificate makes one for 127.0.0.1, or an authority if there is none to sign it.
func certificate(t testing.TB, signer *x509.Certificate, signerKey *ecdsa.PrivateKey, serial int64) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	require.NoError(t, err)
	template := &x509.Certificate{
		SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	if signer == nil {
		template.Subject = pkix.Name{CommonName: "a test's authority"}
		template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
		signer, signerKey = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer, key.Public(), signerKey)
	require.NoError(t, err)
	cert, err := x509.ParseCertificate(der)
	require.NoError(t, err)
	return cert, key
}
