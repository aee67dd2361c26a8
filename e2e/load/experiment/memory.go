package experiment

import (
	"context"
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Of part memory.
const (
	memorySize    = 16 << 10
	memoryLatency = time.Second
	// memoryDeadline is time enough for an order, if nothing holds it up for longer than the backend takes for it.
	memoryDeadline = 2 * time.Second
	// memoryWorkers is the bounded window: the asynchronous gateway's permits, and the limit of the third curve.
	memoryWorkers = 64
	// memoryWindow is how many orders it has in memory, beyond those that are being committed.
	memoryWindow = 128
	// memoryProcessors are those of the gateway. Go's collector takes up to half of what there is when memory runs out
	// (gcCPULimiter), and what is left has to be too little or the gateway lives on: with more processors that would be
	// a matter of how many the machine happens to have.
	memoryProcessors = 1
	// memoryShare is the load as a share of what the gateway can do with memory enough: more than what the collector
	// leaves it without, less than all.
	memoryShare = 0.5
)

// variantLimited is a gateway with little memory.
const variantLimited = "little memory"

// probeMemory is how many orders a second the gateway takes on an ideal backend and with memory enough. It is not found out
// by waiting clients of a slow backend, since that is what is measured later.
func probeMemory(ctx context.Context, b *bench) (float64, error) {
	m, err := b.measure(ctx, point{part: "memory", mode: modeSync, orders: 2000, clients: 64, size: memorySize, deadline: time.Minute,
		backend: []string{"--latency", "0s"}, processors: memoryProcessors}, 1)
	if err != nil {
		return 0, fmt.Errorf("probe a gateway with one processor: %w", err)
	}
	return m.row.perMinute / 60, nil
}

// memoryLoad scales part memory to what probeMemory has found. More than the most is no clearer and takes the processors of
// the load generator; less than the least would wait in little memory.
func memoryLoad(probed float64) float64 {
	const step, least, most = 50, 400, 2500
	return min(max(math.Ceil(memoryShare*probed/step)*step, least), most)
}

// memoryLimit is too little for the orders that wait in a second, and plenty for an asynchronous gateway.
func (p plan) memoryLimit() string { return fmt.Sprintf("%.0f MiB", max(p.memoryRate*64/1000, 32)) }

func memory() part {
	return part{
		name: "memory", title: "D. Memory: what waits has to be somewhere",
		about: func(p plan) string {
			return "Orders of 16 KiB on a backend that takes one second for each, for any number at once. The gateway has one processor and about half of the load that it bears " +
				"without waiting for anything (which is measured first), from 400 to 2,500 orders a second. In the synchronous gateway a second's orders wait at any time, with all that they hold. " +
				"With a GOMEMLIMIT of " + p.memoryLimit() + " (64 KiB for each of them) that is expected to be more than there is room for: the garbage collector runs all the time, the requests " +
				"take longer, more of them wait. This is the feedback of the original, in Go. The asynchronous gateway keeps what waits on the disk, and at most 128 orders in memory."
		},
		caveats: func(plan) []string {
			return []string{
				"The limit is chosen to be too small. Without it the same gateway takes the memory that it needs, and the collector has little to do.",
				"The collector takes no more than half of the processors. A gateway that has twice the processors that its load needs lives with too little memory, at that price.",
				"The memory of the Go runtime, which GOMEMLIMIT bounds, does not have SQLite's: its page cache is bounded too, and allocated from the system (modernc.org/memory). The resident memory has both, " +
					"and the program itself.",
				"The asynchronous gateway saves 64 orders a second here, since that is its limit of concurrent calls; the rest is its backlog, on disk.",
				"A backend that serves any number at once is the best case for the synchronous way.",
				"The plots over time are of the first run.",
			}
		},
		points: memoryPoints, judge: judgeMemory, tables: memoryTables, charts: memoryCharts,
	}
}

func memoryPoints(p plan) []point {
	type kind struct{ mode, variant string }
	kinds := []kind{{modeSync, variantLimited}, {modeSync, ""}, {modeAsync, variantLimited}}
	if !p.Quick {
		kinds = append(kinds, kind{modeSyncLimit, variantLimited})
	}
	var points []point
	for _, k := range kinds {
		point := point{
			part: "memory", mode: k.mode, variant: k.variant, rate: p.memoryRate, arrivals: ArrivalsConstant, size: memorySize,
			warmup: p.either(3, 5), window: p.either(5, 20), deadline: memoryDeadline, processors: memoryProcessors,
			backend:  []string{"--latency", memoryLatency.String()},
			settings: map[string]string{"dispatch.concurrency": strconv.Itoa(memoryWorkers), "pubsub.gochannel.window": strconv.Itoa(memoryWindow)},
		}
		if k.variant == variantLimited {
			point.memoryLimit = strings.ReplaceAll(p.memoryLimit(), " ", "")
		}
		if k.mode == modeSyncLimit {
			point.settings["intake.sync_limit"] = strconv.Itoa(memoryWorkers)
		}
		points = append(points, point)
	}
	return points
}

func judgeMemory(p plan, rows []row) []verdict {
	by := func(mode, variant string) row { return first(of(rows, mode, variant), all) }
	tight, roomy, async := by(modeSync, variantLimited), by(modeSync, ""), by(modeAsync, variantLimited)
	verdicts := []verdict{
		atLeast("synchronous goodput with memory enough", roomy.goodput, 0.9*roomy.load, "/s", "90 % of the load", roomy),
		atMost("synchronous goodput with little memory", tight.goodput, 0.7*roomy.goodput, "/s", "70 % of that", tight, roomy),
		atLeast("the collector's share of a core there", tight.collector, 0.25, " cores", "", tight),
		atLeast("times what it is with memory enough", tight.collector/roomy.collector, 3, "", "", tight, roomy),
		atLeast("asynchronous goodput with little memory", async.goodput, 0.95*async.load, "/s", "95 % of the load", async),
		atMost("the collector's share of a core there", async.collector, math.Max(0.5*tight.collector, 0.1), " cores", "half of the synchronous one's", async, tight),
	}
	if p.Quick {
		return verdicts
	}
	limited, most := by(modeSyncLimit, variantLimited), memoryWorkers/memoryLatency.Seconds()
	return append(verdicts, atLeast("synchronous goodput with little memory and a limit", limited.goodput, 0.8*most, "/s",
		fmt.Sprintf("80 %% of the %.0f/s that it lets through", most), limited))
}

func memoryTables(p plan, rows []row) []table {
	t := table{Title: fmt.Sprintf("%.0f orders a second of 16 KiB on a backend of 1 s", p.memoryRate),
		Columns: []string{"way", "memory limit", "in time /s", "2xx p50 ms", "2xx p99 ms", "most Go memory MiB", "most resident MiB", "most goroutines", "collector, cores", "gateway, cores"}}
	for _, r := range rows {
		limit := "none"
		if r.variant == variantLimited {
			limit = p.memoryLimit()
		}
		t.add(r.marked(r.mode), limit, figure(r.goodput), figure(r.p50), figure(r.p99), figure(r.memory), figure(r.resident), figure(r.goroutines), figure(r.collector), figure(r.gatewayCores))
	}
	return []table{t}
}

func memoryCharts(p plan, r partResult) []chart {
	lines := func(y func(i *instant) *float64) []line {
		var lines []line
		for _, point := range memoryPoints(p) {
			l := line{label: point.mode + ", " + p.memoryLimit(), colour: point.mode}
			if point.variant == "" {
				l.label, l.dashed = point.mode+", no limit", true
			}
			l.points = r.course(func(i instant) bool { return i.mode == point.mode && i.variant == point.variant }, y)
			lines = append(lines, l)
		}
		return lines
	}
	return []chart{
		{name: "memory-goodput", title: "Orders answered in time", x: "time (s)", y: "orders/s", lines: lines(func(i *instant) *float64 { return &i.goodput })},
		{name: "memory-used", title: "Memory of the gateway's Go runtime", x: "time (s)", y: "MiB", lines: lines(func(i *instant) *float64 { return &i.memory })},
		{name: "memory-goroutines", title: "Goroutines of the gateway", x: "time (s)", y: "goroutines", lines: lines(func(i *instant) *float64 { return &i.goroutines })},
		{name: "memory-collector", title: "Garbage collector", x: "time (s)", y: "cores", lines: lines(func(i *instant) *float64 { return &i.collector })},
	}
}
