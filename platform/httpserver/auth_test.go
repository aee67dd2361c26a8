package httpserver_test

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"sluice/platform/httpserver"
)

// entry is what http.api_keys holds for a key that somebody has chosen.
func entry(name, key string) string {
	hash := sha256.Sum256([]byte(key))
	return name + ":" + hex.EncodeToString(hash[:])
}

// admitted stands a mux behind Admission. Its routes say who is asking.
func admitted(t testing.TB, cfg httpserver.Config) http.Handler {
	t.Helper()
	require.NoError(t, cfg.Validate())
	mux := http.NewServeMux()
	who := func(w http.ResponseWriter, r *http.Request) {
		httpserver.WriteJSON(w, r, http.StatusOK, httpserver.ClientName(r.Context()))
	}
	mux.HandleFunc("GET /who", who)
	mux.HandleFunc("GET /docs", who)
	mux.HandleFunc("GET /docs/{page}", who)
	h, err := httpserver.Admission(cfg, metricnoop.NewMeterProvider().Meter(""), httpserver.Pages("/docs", "/docs/"), httpserver.Handler(mux, quiet()))
	require.NoError(t, err)
	return h
}

func withKeys(entries ...string) httpserver.Config {
	cfg := httpserver.DefaultConfig()
	cfg.APIKeys = entries
	return cfg
}

// ask sends a request with these Authorization fields past all clients and
// servers, so that they arrive as they are.
func ask(h http.Handler, method, target string, fields ...string) *httptest.ResponseRecorder {
	r := httptest.NewRequest(method, target, nil)
	if fields != nil {
		r.Header["Authorization"] = fields
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

func TestAKeySaysWhoIsAsking(t *testing.T) {
	h := admitted(t, withKeys(entry("shop", "old"), entry("pos", "p"), entry("shop", "new"), entry("x", "a+b/c-d.e_f~==")))
	for field, name := range map[string]string{
		"Bearer old":            "shop",
		"Bearer new":            "shop",
		"Bearer p":              "pos",
		"bearer p":              "pos",
		"BEARER p":              "pos",
		"Bearer    p":           "pos",
		" Bearer p \t":          "pos",
		"Bearer a+b/c-d.e_f~==": "x",
	} {
		w := ask(h, "GET", "/who", field)
		require.Equal(t, http.StatusOK, w.Code, field)
		require.JSONEq(t, `"`+name+`"`, w.Body.String(), field)
		require.Empty(t, w.Header().Get("WWW-Authenticate"))
	}
}

func TestWithoutAValidKeyNobodyIsLetIn(t *testing.T) {
	h := admitted(t, withKeys(entry("shop", "old"), entry("pos", "p")))
	const none, invalid, malformed = `Bearer realm="sluice"`, `Bearer realm="sluice", error="invalid_token"`, `Bearer realm="sluice", error="invalid_request"`
	for _, test := range []struct {
		name      string
		fields    []string
		challenge string
	}{
		{"no field", nil, none},
		{"an empty field", []string{""}, none},
		{"another scheme", []string{"Basic b2xkOg=="}, none},
		{"a scheme that begins alike", []string{"Bearers old"}, none},
		{"a key alone", []string{"old"}, none},
		{"a tab behind the scheme", []string{"Bearer\told"}, none},
		{"no key", []string{"Bearer"}, malformed},
		{"an empty key", []string{"Bearer "}, malformed},
		{"a key that nobody has", []string{"Bearer older"}, invalid},
		{"the beginning of a key", []string{"Bearer ol"}, invalid},
		{"a key in other case", []string{"Bearer OLD"}, invalid},
		{"a name", []string{"Bearer shop"}, invalid},
		{"a hash", []string{"Bearer " + entry("", "old")[1:]}, invalid},
		{"an entry", []string{"Bearer " + entry("shop", "old")}, malformed}, // a colon is no part of a key
		{"two keys", []string{"Bearer old p"}, malformed},
		{"two keys with a comma", []string{"Bearer old, Bearer p"}, malformed},
		{"a key in quotes", []string{`Bearer "old"`}, malformed},
		{"two fields", []string{"Bearer old", "Bearer p"}, malformed},
		{"the same field twice", []string{"Bearer old", "Bearer old"}, malformed},
		{"a NUL", []string{"Bearer old\x00"}, malformed},
		{"a line", []string{"Bearer old\r\nX: y"}, malformed},
		{"a tab in a key", []string{"Bearer o\tld"}, malformed},
		{"no UTF-8", []string{"Bearer \xff\xfe"}, malformed},
		{"other letters", []string{"Bearer öld"}, malformed},
		{"an equals sign in the middle", []string{"Bearer o=ld"}, malformed},
		{"equals signs alone", []string{"Bearer =="}, malformed},
		{"a huge key", []string{"Bearer " + strings.Repeat("x", 1<<20)}, invalid},
		{"a huge scheme", []string{strings.Repeat("x", 1<<20)}, none},
	} {
		t.Run(test.name, func(t *testing.T) {
			// On a route, where there is none, with a method that a route does
			// not have: a stranger cannot tell.
			for _, target := range []string{"/who", "/nothing", "/", "*"} {
				for _, method := range []string{"GET", "HEAD", "POST", "OPTIONS"} {
					w := ask(h, method, target, test.fields...)
					require.Equal(t, http.StatusUnauthorized, w.Code)
					require.Equal(t, []string{test.challenge}, w.Header()["Www-Authenticate"])
					if method == "HEAD" {
						continue
					}
					require.Equal(t, "application/problem+json", w.Header().Get("Content-Type"))
					var p map[string]any
					require.NoError(t, json.Unmarshal(w.Body.Bytes(), &p))
					require.Equal(t, "/problems/unauthorized", p["type"])
					require.EqualValues(t, 401, p["status"])
					require.NotContains(t, p["detail"], "old", "a key is not repeated")
				}
			}
			// What is open is open, whatever comes with it.
			require.JSONEq(t, `""`, ask(h, "GET", "/docs", test.fields...).Body.String())
		})
	}
}

func TestOpenPages(t *testing.T) {
	h := admitted(t, withKeys(entry("shop", "s")))
	for _, open := range []struct{ method, target string }{{"GET", "/docs"}, {"HEAD", "/docs"}, {"GET", "/docs/x"}, {"GET", "/docs/"}, {"GET", "/docs?a=/../b"}} {
		require.NotEqual(t, http.StatusUnauthorized, ask(h, open.method, open.target).Code, open)
	}
	for _, closed := range []struct{ method, target string }{
		{"POST", "/docs"}, {"DELETE", "/docs/x"}, {"OPTIONS", "/docs"}, {"GET", "/doc"}, {"GET", "/docsx"}, {"GET", "/Docs"}, {"GET", "/"},
		{"GET", "/docs/../who"}, {"GET", "/docs/%2e%2e/who"}, {"GET", "/docs/..%2fwho"}, {"GET", "/docs//who"}, {"GET", "//docs/who"}, {"GET", "/docs/./x"},
		{"GET", `/docs/..\who`}, {"GET", "/who/docs/"}, {"GET", "/who?/docs"}, {"GET", "/%64ocs"},
	} {
		require.Equal(t, http.StatusUnauthorized, ask(h, closed.method, closed.target).Code, closed)
	}
	w := ask(h, "GET", "/docs/x", "Bearer s")
	require.JSONEq(t, `"shop"`, w.Body.String(), "whoever says who he is is known here too")
}

func TestWithoutKeysEverybodyIsLetIn(t *testing.T) {
	h := admitted(t, withKeys())
	for _, fields := range [][]string{nil, {"Bearer x"}, {"Basic x"}, {"a", "b"}} {
		require.JSONEq(t, `""`, ask(h, "GET", "/who", fields...).Body.String())
	}
}

func TestBadKeysAreNoAdmission(t *testing.T) {
	_, err := httpserver.Admission(withKeys("shop"), metricnoop.NewMeterProvider().Meter(""), httpserver.Pages(), http.NotFoundHandler())
	require.ErrorContains(t, err, "http.api_keys: entry 1: must be name:sha256hex")
}

func TestRefusedRequestsAreCounted(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	meter := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader)).Meter("test")
	h, err := httpserver.Admission(withKeys(entry("shop", "s")), meter, httpserver.Pages(), http.NotFoundHandler())
	require.NoError(t, err)
	for _, field := range []string{"Bearer s", "Bearer x", "Bearer y", "Basic z"} {
		ask(h, "GET", "/", field)
	}
	var all metricdata.ResourceMetrics
	require.NoError(t, reader.Collect(t.Context(), &all))
	got := map[string]int64{}
	sum, ok := all.ScopeMetrics[0].Metrics[0].Data.(metricdata.Sum[int64])
	require.True(t, ok)
	for _, point := range sum.DataPoints {
		reason, _ := point.Attributes.Value("reason")
		got[reason.AsString()] = point.Value
	}
	require.Equal(t, map[string]int64{"unknown-key": 2, "no-key": 1}, got)
}

func TestANewKeyOpensTheDoor(t *testing.T) {
	key, line, err := httpserver.NewAPIKey("shop")
	require.NoError(t, err)
	require.Equal(t, entry("shop", key), line)
	require.Len(t, key, 64)
	other, _, err := httpserver.NewAPIKey("shop")
	require.NoError(t, err)
	require.NotEqual(t, key, other)
	require.JSONEq(t, `"shop"`, ask(admitted(t, withKeys(line)), "GET", "/who", "Bearer "+key).Body.String())

	for _, name := range []string{"", "a b", "a:b", "a,b", "ä", strings.Repeat("n", 41)} {
		_, _, err := httpserver.NewAPIKey(name)
		require.ErrorContains(t, err, "the name must be")
	}
}

func TestAPIKeysDoNotShowTheirHashes(t *testing.T) {
	keys := httpserver.APIKeys{entry("shop", "s"), "a-key-in-the-wrong-place", "pos:another"}
	text, err := json.Marshal(keys)
	require.NoError(t, err)
	shown := []string{string(text), fmt.Sprint(keys), fmt.Sprintf("%+v %#v %d %x %q %s", keys, keys, keys, keys, keys, keys), fmt.Sprintf("%+v", withKeys(keys...))}
	var logs logbook
	logs.logger(slog.LevelInfo).Info("x", "keys", keys)
	for _, text := range append(shown, logs.String()) {
		require.Contains(t, text, "shop")
		for _, secret := range []string{entry("shop", "s")[5:15], "wrong", "another"} {
			require.NotContains(t, text, secret)
		}
	}
	require.Equal(t, []string{"shop:<secret>", "<secret>", "<secret>"}, keys.Redacted())
	require.Equal(t, 2, httpserver.APIKeys{entry("a", "1"), entry("b", "2"), entry("a", "3")}.Names())
}

// Whatever stands in the fields and in the entries, only a key that an entry
// has the hash of opens the door, and it opens it under the entry's name.
func FuzzAuthorization(f *testing.F) {
	for _, field := range []string{"", "Bearer s", "bearer  s ", "Bearer", "Bearer s=", "Basic s", "Bearer s, Bearer s", "Bearer \x00", "Bearer " + strings.Repeat("=", 40), "Bearer ü"} {
		f.Add(field, "", false)
		f.Add(field, "Bearer s", true)
	}
	h := admitted(f, withKeys(entry("shop", "s"), entry("pos", "s=")))
	f.Fuzz(func(t *testing.T, one, two string, both bool) {
		fields := []string{one}
		if both {
			fields = append(fields, two)
		}
		w := ask(h, "GET", "/who", fields...)
		words := strings.Fields(one)
		switch {
		case w.Code == http.StatusUnauthorized:
			require.Regexp(t, `^Bearer realm="sluice"(, error="invalid_(token|request)")?$`, w.Header().Get("WWW-Authenticate"))
			require.True(t, both || one != "Bearer s")
		case both, len(words) != 2, !strings.EqualFold(words[0], "Bearer"):
			require.Fail(t, "let in", "%q", fields)
		default:
			name := map[string]string{"s": "shop", "s=": "pos"}[words[1]]
			require.NotEmpty(t, name, "%q", fields)
			require.JSONEq(t, `"`+name+`"`, w.Body.String())
		}
	})
}

func FuzzAPIKeys(f *testing.F) {
	good := entry("shop", "s")
	for _, seed := range []string{"", good, strings.ToUpper(good), good + "0", good[:68], "shop:", ":" + good[5:], "a b" + good[4:], good[5:] + ":shop", entry("shop", ""), "shop:" + strings.Repeat("zz", 32), good + ":x", "ü" + good} {
		f.Add(seed, good)
	}
	f.Fuzz(func(t *testing.T, one, two string) {
		cfg := withKeys(one, two)
		_, hash, _ := strings.Cut(one, ":")
		for _, text := range cfg.APIKeys.Redacted() {
			if len(hash) > 16 {
				require.NotContains(t, text, hash)
			}
		}
		err := cfg.Validate()
		if err != nil {
			require.True(t, strings.HasPrefix(err.Error(), "http.api_keys: entry "), err)
			return
		}
		for _, e := range cfg.APIKeys {
			require.Regexp(t, `^[A-Za-z0-9._-]{1,40}:[0-9A-Fa-f]{64}$`, e)
		}
		_, err = httpserver.Admission(cfg, metricnoop.NewMeterProvider().Meter(""), httpserver.Pages(), http.NotFoundHandler())
		require.NoError(t, err)
	})
}

// BenchmarkAuthenticate is what a key costs each request, by how many there are.
func BenchmarkAuthenticate(b *testing.B) {
	for _, n := range []int{1, 10, 100, 1000} {
		b.Run(fmt.Sprintf("keys=%d", n), func(b *testing.B) {
			var entries []string
			for i := range n {
				entries = append(entries, entry("shop", fmt.Sprint(i)))
			}
			nothing := http.HandlerFunc(func(http.ResponseWriter, *http.Request) {})
			h, err := httpserver.Admission(withKeys(entries...), metricnoop.NewMeterProvider().Meter(""), httpserver.Pages(), nothing)
			require.NoError(b, err)
			r := httptest.NewRequest("GET", "/", nil)
			r.Header.Set("Authorization", "Bearer 0")
			w := httptest.NewRecorder()
			b.ReportAllocs()
			for b.Loop() {
				h.ServeHTTP(w, r)
			}
		})
	}
}
