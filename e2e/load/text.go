package load

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// String is the result for people.
func (r Result) String() string {
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-10s%s\n", name, fmt.Sprintf(format, args...))
	}

	line(r.Mode+" loop", "  %s", r.setting())
	measured := fmt.Sprintf("%.1f s", r.MeasuredSeconds)
	if r.WarmupSeconds > 0 {
		measured += fmt.Sprintf(", after %.1f s of warm-up", r.WarmupSeconds)
	}
	if r.EndedEarly {
		measured += "; ended early"
	}
	if r.DrainSeconds >= 0.1 {
		measured += fmt.Sprintf("; the last order ended %.1f s later", r.DrainSeconds)
	}
	line("measured", "%s", measured)
	line("offered", "%s  %d orders", perSecond(r.Offered), r.Orders.Offered)
	line("sent", "%s  %d attempts", perSecond(r.Sent), r.Attempts)
	line("accepted", "%s", perSecond(r.Accepted))
	line("goodput", "%s  %d orders, %s", perSecond(r.Goodput), r.Orders.Good, r.rest())
	line("answers", "%s", counts(r.Statuses))
	if len(r.Errors) > 0 {
		line("errors", "%s", counts(r.Errors))
	}
	fmt.Fprintf(&b, "%-10s%9s%9s%9s%9s%9s%9s%9s%9s\n", "ms", "min", "mean", "p50", "p90", "p95", "p99", "p99.9", "max")
	r.LatencyMS.write(&b, "2xx")
	r.LatencyAllMS.write(&b, "all")
	line("late", "%d begun too late; %.2f ms behind the plan in the mean, %.1f ms at the worst", r.Late.Count, r.Late.MeanMS, r.Late.WorstMS)
	line("generator", "%.2f s of CPU", r.CPUSeconds)
	if !r.Trustworthy {
		line("", "NOT TRUSTWORTHY: %s", r.Why)
	}
	return b.String()
}

func (r Result) setting() string {
	setting := r.Plan
	if r.Arrivals != "" {
		setting += ", " + r.Arrivals + " arrivals"
	}
	if r.DeadlineMS > 0 {
		setting += ", deadline " + (time.Duration(r.DeadlineMS * float64(time.Millisecond))).String()
	}
	if r.Retries > 0 {
		setting += fmt.Sprintf(", %d retries", r.Retries)
	}
	if r.Connections > 0 {
		setting += fmt.Sprintf(", %d connections", r.Connections)
	}
	return setting + ", to " + r.URL
}

// rest tells of the orders that are not good.
func (r Result) rest() string {
	rest := fmt.Sprintf("%d failed, %d timed out", r.Orders.Failed, r.Orders.TimedOut)
	if r.Orders.Unfinished > 0 {
		rest += fmt.Sprintf(", %d unfinished", r.Orders.Unfinished)
	}
	return rest
}

func (l *Latency) write(b *strings.Builder, name string) {
	if l == nil {
		fmt.Fprintf(b, "%-10s%9s\n", name, "none")
		return
	}
	fmt.Fprintf(b, "%-10s", name)
	for _, ms := range []float64{l.Min, l.Mean, l.P50, l.P90, l.P95, l.P99, l.P999, l.Max} {
		fmt.Fprintf(b, "%9.1f", ms)
	}
	b.WriteByte('\n')
}

// String is one line.
func (p Progress) String() string {
	p99 := "-"
	if p.P99MS != nil {
		p99 = fmt.Sprintf("%.1f ms", *p.P99MS)
	}
	return fmt.Sprintf("%4.0f s  offered %d/s  sent %d/s  accepted %d/s  good %d/s  in flight %d  p99 %s",
		p.Elapsed.Seconds(), p.Offered, p.Sent, p.Accepted, p.Good, p.InFlight, p99)
}

func perSecond(rate float64) string { return fmt.Sprintf("%9.1f/s", rate) }

// counts lists counts, the largest first.
func counts(of map[string]int64) string {
	if len(of) == 0 {
		return "none"
	}
	names := slices.SortedFunc(maps.Keys(of), func(a, b string) int {
		return cmp.Or(cmp.Compare(of[b], of[a]), cmp.Compare(a, b))
	})
	for i, name := range names {
		names[i] = fmt.Sprintf("%s: %d", name, of[name])
	}
	return strings.Join(names, ", ")
}
