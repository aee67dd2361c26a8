package httpserver_test

import (
	"context"
	"net/http"
	"net/http/httptest"
	"strconv"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/dunglas/httpsfv"
	"github.com/stretchr/testify/require"
	metricnoop "go.opentelemetry.io/otel/metric/noop"

	"sluice/platform/httpserver"
)

// limited stands one route with a rate limit behind Admission, and one without.
func limited(t *testing.T, cfg httpserver.Config) http.Handler {
	t.Helper()
	require.NoError(t, cfg.Validate())
	mux := http.NewServeMux()
	mux.HandleFunc("POST /orders", httpserver.RateLimited(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusAccepted) }))
	mux.HandleFunc("POST /batch", func(w http.ResponseWriter, r *http.Request) {
		httpserver.DescribeRate(w, r)
		n, err := strconv.Atoi(r.URL.Query().Get("n"))
		if err == nil {
			err = httpserver.WaitRate(r.Context(), n)
		}
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
		}
	})
	mux.HandleFunc("GET /orders", func(http.ResponseWriter, *http.Request) {})
	h, err := httpserver.Admission(cfg, metricnoop.NewMeterProvider().Meter(""), httpserver.Pages(), httpserver.Handler(mux, quiet()))
	require.NoError(t, err)
	return h
}

func withRate(perSecond, burst int, entries ...string) httpserver.Config {
	cfg := withKeys(entries...)
	cfg.RateLimit, cfg.RateBurst = perSecond, burst
	return cfg
}

// left reads both fields as a client would.
func left(t *testing.T, header http.Header) (quota, window, remaining, seconds int64) {
	t.Helper()
	item := func(field string) httpsfv.Item {
		list, err := httpsfv.UnmarshalList(header.Values(field))
		require.NoError(t, err, field)
		require.Len(t, list, 1, field)
		item, ok := list[0].(httpsfv.Item)
		require.True(t, ok)
		require.Equal(t, "default", item.Value)
		return item
	}
	number := func(i httpsfv.Item, name string) int64 {
		value, ok := i.Params.Get(name)
		require.True(t, ok, name)
		n, ok := value.(int64)
		require.True(t, ok, name)
		require.GreaterOrEqual(t, n, int64(0))
		return n
	}
	policy, limit := item("RateLimit-Policy"), item("RateLimit")
	return number(policy, "q"), number(policy, "w"), number(limit, "r"), number(limit, "t")
}

func TestTheRateLimitIsToldAndKept(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := limited(t, withRate(2, 5))
		post := func() *httptest.ResponseRecorder { return ask(h, "POST", "/orders") }
		for i := range 5 {
			w := post()
			require.Equal(t, http.StatusAccepted, w.Code)
			require.Equal(t, `"default";q=5;w=3`, w.Header().Get("RateLimit-Policy"), "5 in the time that 5 take to come back")
			require.Equal(t, `"default";r=`+strconv.Itoa(4-i)+`;t=1`, w.Header().Get("RateLimit"))
			require.Empty(t, w.Header().Get("Retry-After"))
		}
		w := post()
		require.Equal(t, http.StatusTooManyRequests, w.Code)
		require.Equal(t, "1", w.Header().Get("Retry-After"))
		require.Equal(t, `"default";r=0;t=1`, w.Header().Get("RateLimit"))
		require.Contains(t, w.Body.String(), `"type":"/problems/rate-limited"`)
		require.Contains(t, w.Body.String(), "2 orders a second")
		require.Equal(t, http.StatusOK, ask(h, "GET", "/orders").Code, "reading is not limited")
		require.Empty(t, ask(h, "GET", "/orders").Header().Get("RateLimit"))

		<-time.After(time.Second)
		require.Equal(t, http.StatusAccepted, post().Code)
		require.Equal(t, http.StatusAccepted, post().Code)
		require.Equal(t, http.StatusTooManyRequests, post().Code)
		<-time.After(time.Hour)
		_, _, remaining, _ := left(t, post().Header())
		require.EqualValues(t, 4, remaining, "a pause gives the burst back and no more")
	})
}

func TestEachNameHasARateOfItsOwn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := limited(t, withRate(1, 0, entry("shop", "a"), entry("pos", "p"), entry("shop", "b")))
		require.Equal(t, http.StatusAccepted, ask(h, "POST", "/orders", "Bearer a").Code)
		require.Equal(t, http.StatusTooManyRequests, ask(h, "POST", "/orders", "Bearer a").Code)
		require.Equal(t, http.StatusTooManyRequests, ask(h, "POST", "/orders", "Bearer b").Code, "another key of the same name")
		require.Equal(t, http.StatusAccepted, ask(h, "POST", "/orders", "Bearer p").Code)
		w := ask(h, "POST", "/orders", "Bearer x")
		require.Equal(t, http.StatusUnauthorized, w.Code)
		require.Empty(t, w.Header().Get("RateLimit"), "strangers learn nothing of others")
	})
}

func TestWithoutALimitNothingIsSaid(t *testing.T) {
	for _, cfg := range []httpserver.Config{withRate(0, 0), withRate(0, 10), withRate(0, 0, entry("shop", "a"))} {
		h := limited(t, cfg)
		for range 100 {
			w := ask(h, "POST", "/orders", "Bearer a")
			require.Equal(t, http.StatusAccepted, w.Code)
			require.Empty(t, w.Header().Get("RateLimit"))
			require.Empty(t, w.Header().Get("RateLimit-Policy"))
		}
		require.Equal(t, http.StatusOK, ask(h, "POST", "/batch?n=1000000", "Bearer a").Code)
	}
}

func TestAStreamWaitsForItsRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := limited(t, withRate(10, 20))
		started := time.Now()
		w := ask(h, "POST", "/batch?n=70")
		require.Equal(t, http.StatusOK, w.Code)
		require.Equal(t, `"default";r=20;t=1`, w.Header().Get("RateLimit"))
		require.Equal(t, 5*time.Second, time.Since(started), "20 at once, 50 at 10 a second")

		// While it waits, others of the client are told for how long.
		waiting := make(chan struct{})
		go func() {
			defer close(waiting)
			ask(h, "POST", "/batch?n=20")
		}()
		synctest.Wait()
		w = ask(h, "POST", "/orders")
		require.Equal(t, http.StatusTooManyRequests, w.Code)
		require.Equal(t, "3", w.Header().Get("Retry-After"))
		require.Equal(t, `"default";r=0;t=3`, w.Header().Get("RateLimit"))
		<-waiting
	})
}

func TestAStreamStopsWaitingWithItsRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := limited(t, withRate(1, 1))
		ctx, cancel := context.WithCancel(t.Context())
		w := httptest.NewRecorder()
		done := make(chan struct{})
		go func() {
			defer close(done)
			h.ServeHTTP(w, httptest.NewRequestWithContext(ctx, "POST", "/batch?n=100", nil))
		}()
		synctest.Wait()
		cancel()
		<-done
		require.Equal(t, http.StatusBadRequest, w.Code)
	})
}

// Clients that come again when they are told to all get through, at the rate
// and not above it.
func TestAFloodIsServedAtTheRate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const clients, rate = 500, 50
		h := limited(t, withRate(rate, 0))
		started := time.Now()
		var flood sync.WaitGroup
		for range clients {
			flood.Go(func() {
				for {
					w := ask(h, "POST", "/orders")
					if w.Code == http.StatusAccepted {
						return
					}
					seconds, err := strconv.Atoi(w.Header().Get("Retry-After"))
					if err != nil || seconds < 1 {
						t.Errorf("Retry-After is %q", w.Header().Get("Retry-After"))
						return
					}
					<-time.After(time.Duration(seconds) * time.Second)
				}
			})
		}
		flood.Wait()
		require.Equal(t, (clients-rate)/rate*time.Second, time.Since(started))
	})
}
