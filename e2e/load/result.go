package load

import (
	"fmt"
	"math"
	"strings"
	"time"
)

// Result is what came of a run. Unless it says otherwise a number is about the orders that were meant to arrive in the
// measured window, whenever they were answered: from the end of the warm-up to the end of the plan, or, in the closed loop
// and where all orders come in one burst, to the last answer. Rates are per second of that window.
type Result struct {
	URL  string `json:"url"`
	Mode string `json:"mode"` // open or closed
	// Plan is the plan of the open loop, or a description of the closed one.
	Plan          string  `json:"plan"`
	Arrivals      string  `json:"arrivals"`    // constant or poisson; "" in the closed loop
	Connections   int     `json:"connections"` // the bound, 0 = none
	DeadlineMS    float64 `json:"deadline_ms"` // 0 = none but the limit of 30 s
	Retries       int     `json:"retries"`
	Seed          uint64  `json:"seed"`
	WarmupSeconds float64 `json:"warmup_seconds"`

	MeasuredSeconds float64 `json:"measured_seconds"`
	Offered         float64 `json:"offered"`  // orders that arrived, per second
	Sent            float64 `json:"sent"`     // attempts, per second
	Answered        float64 `json:"answered"` // attempts with an answer of any status, per second
	Accepted        float64 `json:"accepted"` // attempts answered with 2xx, per second
	Goodput         float64 `json:"goodput"`  // orders answered with 2xx before the deadline, per second

	Orders   Orders           `json:"orders"`
	Attempts int64            `json:"attempts"`
	Statuses map[string]int64 `json:"statuses"` // attempts by the status of their answer
	// Errors counts attempts without an answer, by kind: timeout, refused, reset, closed, dial, local, interrupted, other;
	// and unsent, where a client left before its attempt could be sent (which is not among Attempts).
	Errors map[string]int64 `json:"errors"`

	// LatencyMS is of the orders that were answered with 2xx, from the intended time to the end of the answer; in the
	// closed loop from the time of sending. nil if there are none.
	LatencyMS *Latency `json:"latency_ms"`
	// LatencyAllMS is the same of all orders that ended; one that timed out counts with the time at which its client left.
	LatencyAllMS *Latency `json:"latency_all_ms"`

	Late Late `json:"late"`
	// Trustworthy is false if the generator did not do what it was to do; Why says what.
	Trustworthy bool   `json:"trustworthy"`
	Why         string `json:"why,omitempty"`
	// EndedEarly is true if the run was interrupted.
	EndedEarly bool `json:"ended_early"`
	// DrainSeconds is how long after the measured window the last order ended.
	DrainSeconds float64 `json:"drain_seconds"`
	// CPUSeconds is the CPU time of this process from the first order to the last answer. 0 on Windows.
	CPUSeconds float64  `json:"cpu_seconds"`
	Series     []Second `json:"series"`

	unreached error
}

// Orders counts orders by what became of them. Offered is the sum of the others.
type Orders struct {
	Offered    int64 `json:"offered"`
	Good       int64 `json:"good"`       // answered with 2xx before the deadline
	Failed     int64 `json:"failed"`     // the last attempt had another answer, or no connection
	TimedOut   int64 `json:"timed_out"`  // the client left
	Unfinished int64 `json:"unfinished"` // cut, because the run was interrupted
}

// Latency is a distribution, in milliseconds, exact to 0.1 %.
type Latency struct {
	Min  float64 `json:"min"`
	Mean float64 `json:"mean"`
	P50  float64 `json:"p50"`
	P90  float64 `json:"p90"`
	P95  float64 `json:"p95"`
	P99  float64 `json:"p99"`
	P999 float64 `json:"p999"`
	Max  float64 `json:"max"`
}

// Late is how far the generator fell behind its plan.
type Late struct {
	// Count is how many orders were begun more than 10 ms after their time; in a burst, after that and 0.05 ms for each
	// order before them, since nobody can send thousands at one instant.
	Count   int64   `json:"count"`
	MeanMS  float64 `json:"mean_ms"` // of all orders
	WorstMS float64 `json:"worst_ms"`
}

// Second is one second of a run, the warm-up and the time after the plan included. Offered and Good belong to the second
// for which an order was planned, all else to the second in which it happened.
type Second struct {
	T        int      `json:"t"` // begins so many seconds after the start
	Offered  int64    `json:"offered"`
	Sent     int64    `json:"sent"`     // attempts
	Accepted int64    `json:"accepted"` // answers with 2xx
	Good     int64    `json:"good"`
	Errors   int64    `json:"errors"`    // attempts that ended otherwise
	InFlight int64    `json:"in_flight"` // orders under way at the end of the second
	P50MS    *float64 `json:"p50_ms"`    // of the answers with 2xx, exact to 1 %; nil if there are none
	P99MS    *float64 `json:"p99_ms"`
}

// Progress is how a run is going: counts of the last full second, by the time at which things happened.
type Progress struct {
	Elapsed                       time.Duration
	Offered, Sent, Accepted, Good int64
	InFlight                      int64    // now
	P99MS                         *float64 // nil if nothing was accepted
}

// Unreached returns why, if not a single attempt of the run had a connection.
func (r Result) Unreached() error { return r.unreached }

// trusted is the share of orders that may be late.
const trusted = 0.01

func (r *Result) describe(cfg Config) {
	r.URL, r.Connections, r.Retries, r.Seed = cfg.URL, cfg.Connections, cfg.Retries, cfg.Seed
	r.DeadlineMS, r.WarmupSeconds = milliseconds(cfg.Deadline), seconds(cfg.Warmup)
	if cfg.Closed == 0 {
		r.Mode, r.Plan, r.Arrivals = "open", cfg.plan().String(), cfg.Arrivals
		return
	}
	r.Mode = "closed"
	parts := []string{fmt.Sprintf("%d at once", cfg.Closed)}
	if cfg.Orders > 0 {
		parts = append(parts, fmt.Sprintf("%d orders", cfg.Orders))
	}
	if cfg.Duration > 0 {
		parts = append(parts, cfg.Duration.String())
	}
	r.Plan = strings.Join(parts, ", ")
}

// rate fills in what is per second of the window.
func (r *Result) rate(window time.Duration) {
	if window <= 0 {
		return
	}
	var answered, accepted int64
	for status, n := range r.Statuses {
		answered += n
		if strings.HasPrefix(status, "2") {
			accepted += n
		}
	}
	per := func(n int64) float64 { return round(float64(n) / window.Seconds()) }
	r.MeasuredSeconds = seconds(window)
	r.Offered, r.Sent, r.Answered, r.Accepted = per(r.Orders.Offered), per(r.Attempts), per(answered), per(accepted)
	r.Goodput = per(r.Orders.Good)
}

// distrust says why the numbers are not what they should be, if so.
func (r *Result) distrust(l lateness) {
	var why []string
	if r.Orders.Offered == 0 {
		why = append(why, "no order arrived in the measured window")
	}
	if l.late > 0 && float64(l.late) > trusted*float64(l.begun) {
		cause := "the generator did not keep up"
		if l.waited > l.late/2 {
			cause = fmt.Sprintf("all %d connections were taken", r.Connections)
		}
		why = append(why, fmt.Sprintf("%.1f %% of the orders were begun late, by up to %.0f ms: %s",
			100*float64(l.late)/float64(l.begun), milliseconds(l.worst), cause))
	}
	if n := r.Errors[failLocal]; n > 0 {
		why = append(why, fmt.Sprintf("%d attempts failed because this machine has no more open files or ports to give", n))
	}
	r.Trustworthy, r.Why = len(why) == 0, strings.Join(why, "; ")
}

func (l lateness) tell() Late {
	if l.begun == 0 {
		return Late{}
	}
	return Late{Count: l.late, MeanMS: milliseconds(l.sum / time.Duration(l.begun)), WorstMS: milliseconds(l.worst)}
}

func round(x float64) float64 { return math.Round(1000*x) / 1000 }

func seconds(d time.Duration) float64 { return round(d.Seconds()) }

func milliseconds(d time.Duration) float64 { return round(float64(d) / float64(time.Millisecond)) }
