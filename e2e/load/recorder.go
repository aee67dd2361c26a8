package load

import (
	"strconv"
	"sync"
	"time"

	"github.com/HdrHistogram/hdrhistogram-go"
)

// lateAfter is how much later than planned an order can begin without being called late.
const lateAfter = 10 * time.Millisecond

// Histograms count microseconds, to three digits in the result and to two in every second of the series. What takes longer
// than an hour counts as an hour.
const (
	longest       = int64(time.Hour / time.Microsecond)
	resultDigits  = 3
	secondsDigits = 2
)

// recorder counts. It is safe for concurrent use; all times are since the start.
type recorder struct {
	start time.Time

	mu       sync.Mutex
	result   Result                  // the counts of what arrived in the measured window
	accepted *hdrhistogram.Histogram // latencies of 2xx
	all      *hdrhistogram.Histogram // latencies of all orders that ended
	late     lateness                // of what arrived in the measured window
	stopped  time.Duration           // when the run was cut short; 0: not
	lastEnd  time.Duration           // when the last order ended that was not cut
	inFlight int64
	reached  int64                   // attempts that had a connection, the warm-up's included
	failure  error                   // the first one
	second   *hdrhistogram.Histogram // latencies of 2xx of the present second
	good     [2]int64                // answered as good in the second before the present one, and in the present one
	series   []Second                // up to the present second
}

// lateness adds up how far orders began behind the plan.
type lateness struct {
	begun, late, waited int64 // waited: late for want of a connection
	sum, worst          time.Duration
}

func newRecorder() *recorder {
	return &recorder{
		start:    time.Now(),
		result:   Result{Statuses: map[string]int64{}, Errors: map[string]int64{}},
		accepted: newHistogram(resultDigits), all: newHistogram(resultDigits), second: newHistogram(secondsDigits),
		series: []Second{{}},
	}
}

// now is the time since the start.
func (r *recorder) now() time.Duration { return time.Since(r.start) }

// stop notes that the run is cut short. Only the first call counts.
func (r *recorder) stop() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped == 0 {
		r.stopped = max(1, r.now())
	}
}

// arrived counts an order whose time has come.
func (r *recorder) arrived(o *order) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.roll()
	r.inFlight++
	r.series[int(o.at/time.Second)].Offered++
	if o.counted {
		r.result.Orders.Offered++
	}
}

// begun counts how late the first attempt of an order is, which is sent now or never.
func (r *recorder) begun(o *order) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !o.counted {
		return
	}
	limit := lateAfter + o.grace
	lag := r.now() - o.at
	r.late.begun++
	r.late.sum += lag
	r.late.worst = max(r.late.worst, lag)
	if lag > limit {
		r.late.late++
		if o.ready-o.at <= limit {
			r.late.waited++
		}
	}
}

// sent counts an attempt that is sent now.
func (r *recorder) sent(o *order) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.roll()
	r.series[len(r.series)-1].Sent++
	if o.counted {
		r.result.Attempts++
	}
}

// answered counts what an attempt came to, and returns the time of that.
func (r *recorder) answered(o *order, a attempt) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.roll()
	present := &r.series[len(r.series)-1]
	switch {
	case a.accepted():
		present.Accepted++
	case a.failure != failInterrupted:
		present.Errors++
	}
	if a.reached() {
		r.reached++
	}
	if r.failure == nil && a.failure != failInterrupted {
		r.failure = a.err
	}
	switch {
	case !o.counted:
	case a.failure != "":
		r.result.Errors[a.failure]++
	default:
		r.result.Statuses[strconv.Itoa(a.status)]++
	}
	return now
}

// ended counts an order whose last attempt was a.
func (r *recorder) ended(o *order, a attempt) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.roll()
	latency := now - o.at
	r.inFlight--
	if a.failure != failInterrupted {
		r.lastEnd = now
	}
	if a.accepted() {
		record(r.second, latency)
	}
	if a.good() {
		r.series[int(o.at/time.Second)].Good++
		r.good[1]++
	}
	if o.counted {
		r.count(a, latency)
	}
}

// The methods below want r.mu held.

func (r *recorder) count(a attempt, latency time.Duration) {
	orders := &r.result.Orders
	switch {
	case a.failure == failInterrupted:
		orders.Unfinished++
		return
	case a.good():
		orders.Good++
	case a.timedOut():
		orders.TimedOut++
	default:
		orders.Failed++
	}
	record(r.all, latency)
	if a.accepted() {
		record(r.accepted, latency)
	}
}

// roll makes the series reach to the present second, and returns the present time.
func (r *recorder) roll() time.Duration {
	now := r.now()
	for last := len(r.series) - 1; last < int(now/time.Second); last++ {
		ending := &r.series[last]
		ending.InFlight = r.inFlight
		ending.P50MS, ending.P99MS = percentile(r.second, 50), percentile(r.second, 99)
		r.second.Reset()
		r.good = [2]int64{r.good[1], 0}
		r.series = append(r.series, Second{T: last + 1})
	}
	return now
}

// progress returns the last second that is over.
func (r *recorder) progress() Progress {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.roll()
	over := r.series[max(0, len(r.series)-2)]
	return Progress{Elapsed: now, Offered: over.Offered, Sent: over.Sent, Accepted: over.Accepted, Good: r.good[0],
		InFlight: r.inFlight, P99MS: over.P99MS}
}

// conclude returns the result of a run that is over.
func (r *recorder) conclude(cfg Config, cpu time.Duration) Result {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.roll()
	present := &r.series[len(r.series)-1]
	present.P50MS, present.P99MS = percentile(r.second, 50), percentile(r.second, 99)
	result := r.result
	result.describe(cfg)
	end := r.window(cfg)
	result.rate(end - cfg.Warmup)
	result.DrainSeconds = seconds(max(0, r.lastEnd-end))
	result.LatencyMS, result.LatencyAllMS = summary(r.accepted), summary(r.all)
	result.Late = r.late.tell()
	result.distrust(r.late)
	result.EndedEarly = r.stopped > 0
	result.Series = r.series
	result.CPUSeconds = seconds(cpu)
	if r.reached == 0 {
		result.unreached = r.failure
	}
	return result
}

// window returns when the measured window ends. In the open loop that is the end of the plan, in the closed loop, and where
// all orders come in one burst, that of the last order.
func (r *recorder) window(cfg Config) time.Duration {
	end := r.lastEnd
	if length := cfg.plan().Duration(); cfg.Closed == 0 && length > 0 {
		end = length
	} else if r.stopped > 0 {
		end = r.stopped
	}
	if r.stopped > 0 {
		end = min(end, r.stopped)
	}
	return end
}

// newHistogram returns a histogram of microseconds.
func newHistogram(digits int) *hdrhistogram.Histogram { return hdrhistogram.New(1, longest, digits) }

func record(h *hdrhistogram.Histogram, d time.Duration) {
	micros := int64((d + time.Microsecond/2) / time.Microsecond)
	_ = h.RecordValue(min(max(0, micros), longest)) // fails only outside of these bounds
}

// percentile is nil where there is nothing to tell.
func percentile(h *hdrhistogram.Histogram, p float64) *float64 {
	if h.TotalCount() == 0 {
		return nil
	}
	ms := float64(h.ValueAtQuantile(p)) / 1000
	return &ms
}

func summary(h *hdrhistogram.Histogram) *Latency {
	if h.TotalCount() == 0 {
		return nil
	}
	at := func(p float64) float64 { return float64(h.ValueAtQuantile(p)) / 1000 }
	return &Latency{Min: float64(h.Min()) / 1000, Mean: round(h.Mean() / 1000), P50: at(50), P90: at(90), P95: at(95), P99: at(99),
		P999: at(99.9), Max: float64(h.Max()) / 1000}
}
