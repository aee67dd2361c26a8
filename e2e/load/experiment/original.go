package experiment

import (
	"fmt"
	"math"
	"slices"
	"strconv"
	"time"
)

// Of part original: at most so many orders at once, so many asynchronous workers, and a backend that slows down with the
// crowd. The contention is fitted to the original's table, by nothing but trying.
const (
	originalAtOnce     = 1000
	originalWorkers    = 16
	originalContention = 0.0019
	originalInService  = 230
)

// Of the clients of the third curve, who are refused where 16 orders are under way and come again until theirs is saved. If
// they did so at once, nothing would be measured but them; the longest pause keeps 1,000 of them to a few thousand attempts a
// second, of which the backend can save 320.
const (
	originalRetries  = 100_000
	originalPause    = 50 * time.Millisecond
	originalPauseMax = 400 * time.Millisecond
)

// originalTable is what the original measured, in orders per minute.
var originalTable = []struct {
	orders      int
	sync, async float64
}{
	{10, 7974, 8437}, {50, 11998, 14172}, {100, 7046, 15773}, {200, 3733, 16976},
	{500, 3342, 17985}, {1000, 3083, 17535}, {2000, 2834, 18118}, {3000, 3264, 17047},
}

// variantIdeal is a backend that does not mind a crowd.
const variantIdeal = "ideal backend"

func original() part {
	return part{
		name: "original", title: "B. The original's table: N orders, at most 1,000 at once",
		about: func(plan) string {
			return "The question that this project began with: how many orders a minute are saved when N of them come, at most 1,000 at once, counted until the last " +
				"one is saved. The backend takes 50 ms and slows down with the number n in service, 1 + 0.0019·n·max(0, n−16) times, with at most 230 in service; " +
				"the asynchronous gateway has 16 workers. And the same with an ideal backend, which serves any number at once in 50 ms."
		},
		caveats: func(plan) []string {
			return []string{
				"The contended backend is a fit: its two numbers were chosen such that the curve looks like the original's. It shows that a backend that suffers from a " +
					"crowd explains such a curve, not that this was the cause.",
				"The original explained its curve with the garbage collection of what waits. If that carried over to Go, the synchronous way would collapse with the ideal backend too; when this was " +
					"written it did not, and was many times faster than 16 workers. The last two checks say whether it is so here. Part D shows what it takes for the collector to matter.",
				"Asynchronous is faster here only because 16 workers do not crowd the backend. A limit of 16 synchronous orders does the same for it: that is the third curve. Its clients are " +
					"refused with 503 and try again after about 50 ms, then 100, 200 and from then on 400 ms, each pause drawn from half to one and a half times that, until their order is saved. " +
					"What it lacks are those pauses: with few orders, and at the end of many, workers wait for clients. Shorter ones would cost more refusals.",
				"Small N are over in a fraction of a second and say little.",
			}
		},
		points: originalPoints, judge: judgeOriginal, tables: originalTables, charts: originalCharts,
	}
}

func originalPoints(p plan) []point {
	numbers := []int{10, 50, 100, 200, 500, 1000, 2000, 3000}
	if p.Quick {
		numbers = []int{10, 50, 100, 500}
	}
	var points []point
	for _, mode := range []string{modeSync, modeAsync, modeSyncLimit} {
		for _, n := range numbers {
			if last := n == numbers[len(numbers)-1]; p.Quick && mode == modeSyncLimit && !last {
				continue
			}
			i := slices.IndexFunc(originalTable, func(line struct {
				orders      int
				sync, async float64
			}) bool {
				return line.orders == n
			})
			perMinute := originalTable[i].sync
			if mode != modeSync {
				perMinute = originalTable[i].async // a limit is about as good as so many workers
			}
			contended := originalPoint(p, mode, n, time.Duration(float64(n)/perMinute*float64(time.Minute)))
			contended.backend = append(contended.backend, "--capacity", strconv.Itoa(originalInService), "--contention", fmt.Sprint(originalContention))
			points = append(points, contended)
		}
		if mode == modeSyncLimit {
			continue // an ideal backend needs none
		}
		for _, n := range []int{numbers[0], numbers[len(numbers)-1]} {
			ideal := originalPoint(p, mode, n, time.Second)
			if mode == modeAsync {
				ideal.takes = time.Duration(n) * latency / originalWorkers
			}
			ideal.variant = variantIdeal
			points = append(points, ideal)
		}
	}
	return points
}

func originalPoint(p plan, mode string, n int, takes time.Duration) point {
	service := time.Duration(float64(latency) * p.TimeScale)
	settings := map[string]string{"dispatch.concurrency": strconv.Itoa(originalWorkers), "backend.timeout": "10m"}
	point := point{
		part: "original", mode: mode, orders: n, clients: min(n, originalAtOnce), takes: time.Duration(float64(takes) * p.TimeScale),
		// Nobody gives up: the original's clients did not.
		deadline: 10 * time.Minute,
		backend:  []string{"--latency", service.String()},
		settings: settings,
	}
	if mode == modeSyncLimit {
		settings["intake.sync_limit"] = strconv.Itoa(originalWorkers)
		point.retries, point.pause, point.pauseMax = originalRetries, originalPause, originalPauseMax
	}
	return point
}

func judgeOriginal(_ plan, rows []row) []verdict {
	sync, async := of(rows, modeSync, ""), of(rows, modeAsync, "")
	peak := func(rows []row) row {
		best := first(nil, nil)
		for _, r := range rows {
			if !(r.perMinute <= best.perMinute) {
				best = r
			}
		}
		return best
	}
	last := func(rows []row) row {
		if len(rows) == 0 {
			return first(nil, nil)
		}
		return rows[len(rows)-1]
	}
	bestSync, bestAsync, lastSync, lastAsync, lastLimited := peak(sync), peak(async), last(sync), last(async), last(of(rows, modeSyncLimit, ""))
	idealSync, idealAsync := of(rows, modeSync, variantIdeal), of(rows, modeAsync, variantIdeal)
	worst := 0.0
	for _, line := range originalTable {
		for _, r := range rows {
			if r.variant == "" && r.mode != modeSyncLimit && r.orders == line.orders && line.orders >= 100 {
				worst = max(worst, math.Abs(ratio(r, line.sync, line.async)-1))
			}
		}
	}
	return []verdict{
		atMost("synchronous orders a minute with the most orders", lastSync.perMinute, 0.6*bestSync.perMinute, "", fmt.Sprintf("60 %% of the best, at %d", bestSync.orders), lastSync, bestSync),
		atLeast("asynchronous orders a minute with the most orders", lastAsync.perMinute, 0.9*bestAsync.perMinute, "", fmt.Sprintf("90 %% of the best, at %d", bestAsync.orders), lastAsync, bestAsync),
		atLeast("asynchronous over synchronous there", lastAsync.perMinute/lastSync.perMinute, 3, " times", "", lastAsync, lastSync),
		atLeast("synchronous with a limit over synchronous there", lastLimited.perMinute/lastSync.perMinute, 2, " times", "a limit prevents the collapse too", lastLimited, lastSync),
		atMost("farthest from the original's table, from 100 orders on", 100*worst, 25, " %", "it is a fit"),
		atLeast("with an ideal backend, synchronous: most orders over fewest", last(idealSync).perMinute/first(idealSync, all).perMinute, 3, " times", "it does not collapse"),
		atLeast("with an ideal backend, synchronous over asynchronous", last(idealSync).perMinute/last(idealAsync).perMinute, 3, " times", "16 workers are 16 workers"),
	}
}

func all(row) bool { return true }

// ratio is what was measured over what the original measured.
func ratio(r row, sync, async float64) float64 {
	if r.mode == modeAsync {
		return r.perMinute / async
	}
	return r.perMinute / sync
}

func originalTables(_ plan, rows []row) []table {
	t := table{
		Title:   "Orders per minute, contended backend (a fit), beside the original's",
		Columns: []string{"N", "sync, original", "sync, measured", "ratio", "async, original", "async, measured", "ratio", "sync-limit"},
	}
	ideal := table{Title: "Orders per minute, ideal backend", Columns: []string{"N", "sync", "async, 16 workers", "sync over async"}}
	for _, line := range originalTable {
		at := func(mode, variant string) row {
			return first(of(rows, mode, variant), func(r row) bool { return r.orders == line.orders })
		}
		sync, async := at(modeSync, ""), at(modeAsync, "")
		if sync.orders > 0 {
			t.add(strconv.Itoa(line.orders), figure(line.sync), figure(sync.perMinute), figure(ratio(sync, line.sync, line.async)),
				figure(line.async), figure(async.perMinute), figure(ratio(async, line.sync, line.async)), figure(at(modeSyncLimit, "").perMinute))
		}
		if sync, async := at(modeSync, variantIdeal), at(modeAsync, variantIdeal); sync.orders > 0 {
			ideal.add(strconv.Itoa(line.orders), figure(sync.perMinute), figure(async.perMinute), figure(sync.perMinute/async.perMinute))
		}
	}
	return []table{t, ideal}
}

func originalCharts(_ plan, r partResult) []chart {
	orders := func(r *row) *float64 { n := float64(r.orders); return &n }
	perMinute := func(r *row) *float64 { return &r.perMinute }
	var sync, async []xy
	for _, line := range originalTable {
		sync = append(sync, xy{x: float64(line.orders), y: line.sync})
		async = append(async, xy{x: float64(line.orders), y: line.async})
	}
	return []chart{
		{name: "original-throughput", title: "Orders saved a minute, contended backend (a fit)", x: "orders sent, at most 1,000 at once (logarithmic)", y: "orders/min", logX: true,
			lines: []line{
				{label: "sync", colour: modeSync, points: r.curve(modeSync, "", orders, perMinute)},
				{label: "sync, original", colour: modeSync, dashed: true, points: sync},
				{label: "async, 16 workers", colour: modeAsync, points: r.curve(modeAsync, "", orders, perMinute)},
				{label: "async, original", colour: modeAsync, dashed: true, points: async},
				{label: fmt.Sprintf("sync with a limit of %d", originalWorkers), colour: modeSyncLimit, points: r.curve(modeSyncLimit, "", orders, perMinute)},
			}},
		{name: "original-ideal", title: "Orders saved a minute, ideal backend", x: "orders sent, at most 1,000 at once (logarithmic)", y: "orders/min (logarithmic)", logX: true, logY: true,
			lines: []line{
				{label: "sync", colour: modeSync, points: r.curve(modeSync, variantIdeal, orders, perMinute)},
				{label: "async, 16 workers", colour: modeAsync, points: r.curve(modeAsync, variantIdeal, orders, perMinute)},
			}},
	}
}
