package main

import (
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"sync"
)

const (
	// garbagePercent of what is in use may pile up as garbage between two
	// collections, but no more than garbageMost, as long as no more than that is
	// in use.
	garbagePercent = 400
	garbageMost    = 64 << 20
	// garbagePercentMin is for a process that has so much in use that it would
	// do little else but collect.
	garbagePercentMin = 50
)

// collectorPace is set again after each collection, from what that found in use:
// thousands of clients that wait are in use, and four times as much garbage
// beside them would be a waste.
var collectorPace = sync.OnceFunc(func() {
	debug.SetGCPercent(garbagePercent)
	afterCollection(garbagePercent)
})

// afterCollection waits for the end of the next collection, which frees an
// object that nobody has.
func afterCollection(percent int) {
	runtime.AddCleanup(new([16]byte), func(before int) {
		// Stacks are scanned as well, and count like the heap.
		use := []metrics.Sample{{Name: "/gc/heap/live:bytes"}, {Name: "/gc/scan/stack:bytes"}}
		metrics.Read(use)
		now := garbagePercentFor(use[0].Value.Uint64() + use[1].Value.Uint64())
		if now != before {
			debug.SetGCPercent(now)
		}
		afterCollection(now)
	}, percent)
}

// garbagePercentFor returns the pace for so many bytes in use, in steps of ten.
func garbagePercentFor(use uint64) int {
	percent := garbageMost * 100 / max(use, 1)
	return int(min(max(percent/10*10, garbagePercentMin), garbagePercent))
}
