package httpserver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/pprof"
	"sync"
	"time"
)

// checkLimit bounds one check: a probe that waits longer is not answered in time
// for the orchestrator anyway.
const checkLimit = 2 * time.Second

// The states of a process, as /readyz names them.
const (
	statusStarting    = "starting"
	statusReady       = "ready"
	statusDraining    = "draining"
	statusUnavailable = "unavailable" // ready, but a critical check fails
)

// Health knows whether the process may be sent requests. It is safe for
// concurrent use.
type Health struct {
	mu     sync.Mutex
	status string // starting, ready or draining
	checks []*check
}

// NewHealth returns a Health that is starting and has no checks.
func NewHealth() *Health { return &Health{status: statusStarting} }

// Add has every readiness report run probe, at most once at a time and with a
// limit of 2s on its context. While a critical probe fails the process is
// unavailable; another one is reported only. Names should differ: of two checks
// with one name, the report shows the later.
func (h *Health) Add(name string, critical bool, probe func(ctx context.Context) error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.checks = append(h.checks, &check{name: name, critical: critical, probe: probe, turn: make(chan struct{}, 1)})
}

// SetReady ends the start. It does nothing once the process drains.
func (h *Health) SetReady() {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.status == statusStarting {
		h.status = statusReady
	}
}

// SetDraining says that the process stops and takes no more requests. There is
// no way back.
func (h *Health) SetDraining() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.status = statusDraining
}

// Admin returns the routes that every process has: GET /livez, /readyz, /metrics
// and /debug/pprof/. A check that begins or ceases to fail is logged. A nil
// metrics leaves /metrics out. The caller adds its own routes and serves the mux
// through Handler.
func Admin(h *Health, metrics http.Handler, logger *slog.Logger) *http.ServeMux {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /livez", func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		WriteJSON(w, r, http.StatusOK, map[string]string{"status": "ok"})
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		report := h.report(r.Context(), logger)
		status := http.StatusServiceUnavailable
		if report.Status == statusReady {
			status = http.StatusOK
		}
		w.Header().Set("Cache-Control", "no-store")
		WriteJSON(w, r, status, report)
	})
	if metrics != nil {
		mux.Handle("GET /metrics", metrics)
	}
	mux.HandleFunc("GET /debug/pprof/", pprof.Index)
	mux.HandleFunc("GET /debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("GET /debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("GET /debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("POST /debug/pprof/symbol", pprof.Symbol) // how go tool pprof asks
	mux.HandleFunc("GET /debug/pprof/trace", pprof.Trace)
	return mux
}

// report is the body of /readyz.
type report struct {
	Status string                 `json:"status"`
	Checks map[string]checkReport `json:"checks"`
}

type checkReport struct {
	Status   string `json:"status"` // ok or failed
	Critical bool   `json:"critical"`
	Error    string `json:"error,omitempty"`
}

// report runs all checks side by side.
func (h *Health) report(ctx context.Context, logger *slog.Logger) report {
	h.mu.Lock()
	checks := h.checks[:len(h.checks):len(h.checks)]
	h.mu.Unlock()

	errs := make([]error, len(checks))
	var wait sync.WaitGroup
	for i, c := range checks {
		wait.Go(func() { errs[i] = c.run(ctx) })
	}
	wait.Wait()

	h.mu.Lock()
	defer h.mu.Unlock()
	// Read after the checks: a drain that began meanwhile counts.
	result := report{Status: h.status, Checks: make(map[string]checkReport, len(checks))}
	for i, c := range checks {
		entry := checkReport{Status: "ok", Critical: c.critical}
		if errs[i] != nil {
			entry.Status, entry.Error = "failed", errs[i].Error()
			if c.critical && result.Status == statusReady {
				result.Status = statusUnavailable
			}
		}
		result.Checks[c.name] = entry
		if ctx.Err() == nil { // else it is the asker who went away, not the check that failed
			c.note(ctx, errs[i], logger)
		}
	}
	return result
}

type check struct {
	name     string
	critical bool
	probe    func(ctx context.Context) error
	turn     chan struct{} // holds one token while the probe runs
	failing  bool          // guarded by Health.mu
}

// run returns after checkLimit even if the probe does not obey its context. The
// goroutine of such a probe cannot be waited for; the turn keeps it the only one
// however often the report is asked for.
func (c *check) run(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, checkLimit)
	defer cancel()
	select {
	case c.turn <- struct{}{}:
	case <-ctx.Done():
		return errors.New("the check before this one has not ended yet")
	}

	result := make(chan error, 1)
	go func() {
		defer func() { <-c.turn }()
		defer func() {
			if cause := recover(); cause != nil {
				result <- fmt.Errorf("check panicked: %v", cause)
			}
		}()
		result <- c.probe(ctx)
	}()
	select {
	case err := <-result:
		return err
	case <-ctx.Done():
		return fmt.Errorf("no result: %w", ctx.Err())
	}
}

// note logs a change, and only a change: probes come every few seconds.
func (c *check) note(ctx context.Context, err error, logger *slog.Logger) {
	switch {
	case err != nil && !c.failing:
		logger.WarnContext(ctx, "health check fails", "check", c.name, "critical", c.critical, "error", err)
	case err == nil && c.failing:
		logger.InfoContext(ctx, "health check is well again", "check", c.name)
	}
	c.failing = err != nil
}
