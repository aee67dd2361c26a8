package httpserver_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"sluice/platform/httpserver"
)

func readyz(t *testing.T, admin http.Handler) (int, string) {
	t.Helper()
	recorder := httptest.NewRecorder()
	admin.ServeHTTP(recorder, httptest.NewRequest("GET", "/readyz", nil))
	require.Equal(t, "application/json", recorder.Header().Get("Content-Type"))
	require.Equal(t, "no-store", recorder.Header().Get("Cache-Control"))
	return recorder.Code, recorder.Body.String()
}

func TestReadyzFollowsTheLifeOfTheProcess(t *testing.T) {
	health := httpserver.NewHealth()
	admin := httpserver.Admin(health, nil, quiet())
	requireState := func(status int, state string) {
		t.Helper()
		code, body := readyz(t, admin)
		require.Equal(t, status, code)
		require.JSONEq(t, `{"status":"`+state+`","checks":{}}`, body)
	}
	requireState(http.StatusServiceUnavailable, "starting")
	health.SetReady()
	requireState(http.StatusOK, "ready")
	health.SetDraining()
	requireState(http.StatusServiceUnavailable, "draining")
	health.SetReady()
	requireState(http.StatusServiceUnavailable, "draining")
}

func TestReadyzChecks(t *testing.T) {
	var logs logbook
	var storage, broker atomic.Pointer[string]
	probe := func(fault *atomic.Pointer[string]) func(context.Context) error {
		return func(context.Context) error {
			if text := fault.Load(); text != nil {
				return errors.New(*text)
			}
			return nil
		}
	}
	health := httpserver.NewHealth()
	health.Add("storage", true, probe(&storage))
	health.Add("broker", false, probe(&broker))
	health.SetReady()
	admin := httpserver.Admin(health, nil, logs.logger(slog.LevelInfo))
	down := "no route to host"

	code, body := readyz(t, admin)
	require.Equal(t, http.StatusOK, code)
	require.JSONEq(t, `{"status":"ready","checks":{
		"storage":{"status":"ok","critical":true},
		"broker":{"status":"ok","critical":false}}}`, body)
	require.Empty(t, logs.String())

	broker.Store(&down)
	for range 3 {
		code, body = readyz(t, admin)
	}
	require.Equal(t, http.StatusOK, code, "a failure that is not critical keeps the process ready")
	require.JSONEq(t, `{"status":"ready","checks":{
		"storage":{"status":"ok","critical":true},
		"broker":{"status":"failed","critical":false,"error":"no route to host"}}}`, body)
	require.Equal(t, 1, strings.Count(logs.String(), "health check fails"), "a change is logged once")

	storage.Store(&down)
	code, body = readyz(t, admin)
	require.Equal(t, http.StatusServiceUnavailable, code)
	require.Contains(t, body, `"status":"unavailable"`)

	health.SetDraining()
	_, body = readyz(t, admin)
	require.Contains(t, body, `"status":"draining"`, "the life of the process goes first")

	storage.Store(nil)
	broker.Store(nil)
	readyz(t, admin)
	require.Equal(t, 2, strings.Count(logs.String(), "health check is well again"))
}

func TestReadyzOutlastsBadChecks(t *testing.T) {
	t.Run("one that panics fails", func(t *testing.T) {
		health := httpserver.NewHealth()
		health.Add("storage", true, func(context.Context) error { panic("nil pointer") })
		health.SetReady()
		code, body := readyz(t, httpserver.Admin(health, nil, quiet()))
		require.Equal(t, http.StatusServiceUnavailable, code)
		require.Contains(t, body, "check panicked: nil pointer")
	})

	t.Run("one that hangs costs two seconds and one goroutine", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			var runs atomic.Int64
			release := make(chan struct{})
			health := httpserver.NewHealth()
			health.Add("broker", false, func(context.Context) error {
				runs.Add(1)
				<-release
				return nil
			})
			health.SetReady()
			admin := httpserver.Admin(health, nil, quiet())
			for _, fault := range []string{"no result: context deadline exceeded", "the check before this one has not ended yet"} {
				start := time.Now()
				code, body := readyz(t, admin)
				require.Equal(t, http.StatusOK, code)
				require.Contains(t, body, fault)
				require.Equal(t, 2*time.Second, time.Since(start))
			}
			require.EqualValues(t, 1, runs.Load())

			close(release)
			_, body := readyz(t, admin)
			require.Contains(t, body, `"broker":{"status":"ok"`)
		})
	})
}

func TestAdminRoutes(t *testing.T) {
	metrics := http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		_, _ = io.WriteString(w, "up 1\n") // a recorder does not fail
	})
	get := func(h http.Handler, method, path string) *httptest.ResponseRecorder {
		recorder := httptest.NewRecorder()
		h.ServeHTTP(recorder, httptest.NewRequest(method, path, nil))
		return recorder
	}
	admin := httpserver.Handler(httpserver.Admin(httpserver.NewHealth(), metrics, quiet()), quiet())

	alive := get(admin, "GET", "/livez")
	require.Equal(t, http.StatusOK, alive.Code, "alive while it is starting")
	require.True(t, json.Valid(alive.Body.Bytes()))
	require.Equal(t, "up 1\n", get(admin, "GET", "/metrics").Body.String())

	for _, path := range []string{"", "cmdline", "symbol", "goroutine?debug=1", "heap", "profile?seconds=1"} {
		require.Equal(t, http.StatusOK, get(admin, "GET", "/debug/pprof/"+path).Code, path)
	}
	require.Contains(t, get(admin, "GET", "/debug/pprof/goroutine?debug=1").Body.String(), "goroutine profile")
	require.Equal(t, http.StatusOK, get(admin, "POST", "/debug/pprof/symbol").Code)

	require.Equal(t, http.StatusMethodNotAllowed, get(admin, "POST", "/readyz").Code)
	require.Equal(t, http.StatusNotFound, get(admin, "GET", "/").Code)

	bare := httpserver.Handler(httpserver.Admin(httpserver.NewHealth(), nil, quiet()), quiet())
	require.Equal(t, http.StatusNotFound, get(bare, "GET", "/metrics").Code)
}
