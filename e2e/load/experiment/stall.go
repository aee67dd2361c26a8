package experiment

import (
	"fmt"
	"math"
	"time"
)

// Of part stall: the load as a share of the capacity, how often a client tries again and after which pause (which doubles),
// and how long the backend stalls. The pause is not scaled. Without one a client could be there again before the gateway has
// noticed that it had left, and take its first attempt over: that is answered 202, and saved like an asynchronous order.
const (
	stallLoad    = 0.8
	stallRetries = 3
	stallPause   = 300 * time.Millisecond
	stallSeconds = 3
)

func stall() part {
	return part{
		name: "stall", title: "C. A stall of three seconds, and what it leaves",
		about: func(plan) string {
			return "The backend of part A at 80 % of its capacity stalls once, for three seconds. Clients wait one second and try up to four times in all, after pauses of about 0.3, 0.6 and 1.2 s. " +
				"The synchronous gateway is expected not to come back, although the load is never above the capacity: the retries keep the queue full of orders that " +
				"nobody waits for (a metastable failure). The asynchronous one is expected to answer on, and to work the stall off."
		},
		caveats: func(plan) []string {
			return []string{
				"Clients that wait longer between their attempts, or try less often, do less harm.",
				"What ends such a state in practice is less load or fewer retries; here neither happens.",
				"What is in the backend's queue when the load ends is worked off at once, with a latency of 0, to count how often each order was saved; that changes nothing about what is in it.",
				"The limit does not save the orders of the three seconds, it refuses them; those clients try again, and leave if that is in vain.",
				"The plots over time are of the first run.",
			}
		},
		points: stallPoints, judge: judgeStall, tables: stallTables, charts: stallCharts,
	}
}

func stallPoints(p plan) []point {
	var points []point
	for _, mode := range []string{modeSync, modeAsync, modeSyncLimit} {
		point := overloadPoint(p, mode, stallLoad, ArrivalsConstant, ServiceConstant, CancellationIgnored)
		point.part, point.retries, point.pause, point.settle = "stall", stallRetries, stallPause, true
		point.warmup, point.stallAfter, point.stallFor = p.either(1, 2), p.either(3, 5), p.seconds(stallSeconds)
		point.window = point.stallAfter + point.stallFor + p.either(7, 30)
		points = append(points, point)
	}
	return points
}

func judgeStall(_ plan, rows []row) []verdict {
	by := func(mode string) row { return first(rows, func(r row) bool { return r.mode == mode }) }
	sync, async, limited := by(modeSync), by(modeAsync), by(modeSyncLimit)
	return []verdict{
		atLeast("synchronous goodput before the stall", sync.before, 0.9*sync.load, "/s", "90 % of the load", sync),
		atMost("synchronous goodput long after the stall", sync.after, 0.1*sync.load, "/s", "10 % of the load: it does not come back", sync),
		atLeast("times that the backend saved each synchronous order since the stall", sync.copies, 3, "", "about as often as clients try", sync),
		atLeast("asynchronous goodput long after the stall", async.after, 0.99*async.load, "/s", "99 % of the load", async),
		atMost("times that the backend saved each asynchronous order", async.copies, 1, "", "no order twice", async),
		atMost("asynchronous orders lost", async.lost, 0, "", "", async),
		atLeast("synchronous goodput with a limit, long after the stall", limited.after, 0.9*limited.load, "/s", "90 % of the load", limited),
	}
}

func stallTables(p plan, rows []row) []table {
	t := table{
		Title:   fmt.Sprintf("%.0f/s on a backend of %.0f/s that stalls for %d s", math.Round(stallLoad*p.capacity()), p.capacity(), stallSeconds),
		Columns: []string{"way", "in time before /s", "in time after /s", "answered in time, of all", "attempts per order", "saved per order since the stall", "lost"},
	}
	for _, r := range rows {
		t.add(r.marked(r.mode), figure(r.before), figure(r.after), figure(100*(1-r.failed-r.timedOut))+" %", figure(r.attempts), figure(r.copies), figure(r.lost))
	}
	return []table{t}
}

func stallCharts(p plan, r partResult) []chart {
	point := stallPoints(p)[0]
	from := (point.warmup + point.stallAfter).Seconds()
	stalled := []band{{from: from, to: from + point.stallFor.Seconds(), label: "the backend stalls"}}
	return []chart{
		{name: "stall-goodput", title: "Orders answered in time, by the second in which they came", x: "time (s)", y: "orders/s", bands: stalled,
			lines: r.courses(func(i *instant) *float64 { return &i.goodput })},
		{name: "stall-saved", title: "Orders saved by the backend", x: "time (s)", y: "orders/s", bands: stalled,
			lines: r.courses(func(i *instant) *float64 { return &i.saved })},
		{name: "stall-waiting", title: "Calls at the backend, in service or waiting", x: "time (s)", y: "calls", bands: stalled,
			lines: r.courses(func(i *instant) *float64 { return &i.waiting })},
		{name: "stall-backlog", title: "Orders that wait in the gateway", x: "time (s)", y: "orders", bands: stalled,
			lines: r.courses(func(i *instant) *float64 { return &i.backlog })},
	}
}
