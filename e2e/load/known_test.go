package load_test

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"sluice/e2e/load"
)

// The generator against servers of which theory says what must be measured. BenchmarkKnown prints how near a real machine
// comes to that.

// onFakeClock runs a test in a bubble of its own, beside others.
func onFakeClock(t *testing.T, test func(t *testing.T)) {
	t.Parallel()
	synctest.Test(t, test)
}

func TestAConstantLatencyIsMeasured(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, takes(50*time.Millisecond))
		r := run(t, k, config(func(c *load.Config) { c.Rate, c.Duration = 200, 5*time.Second }))
		require.Equal(t, load.Orders{Offered: 1000, Good: 1000}, r.Orders)
		require.EqualValues(t, 1000, r.Attempts)
		require.Equal(t, map[string]int64{"200": 1000}, r.Statuses)
		require.Empty(t, r.Errors)
		require.InDelta(t, 5, r.MeasuredSeconds, 0)
		for _, rate := range []float64{r.Offered, r.Sent, r.Answered, r.Accepted, r.Goodput} {
			require.InDelta(t, 200, rate, 0)
		}
		for _, ms := range []float64{r.LatencyMS.Min, r.LatencyMS.Mean, r.LatencyMS.P50, r.LatencyMS.P999, r.LatencyMS.Max} {
			require.InDelta(t, 50, ms, 0.1)
		}
		require.Equal(t, r.LatencyMS, r.LatencyAllMS)
		require.Equal(t, load.Late{}, r.Late)
		require.True(t, r.Trustworthy, r.Why)
		require.InDelta(t, 0.045, r.DrainSeconds, 0.001)
		require.Len(t, k.bodies, 1000, "every order is another one")
	})
}

func TestADistributionOfLatenciesIsMeasured(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		// Exponential, with a mean of 100 ms: of n requests in a random order, one for each nth of the distribution.
		const n, mean = 2000, 100 * time.Millisecond
		ranks := rand.New(rand.NewPCG(1, 1)).Perm(n)
		var next atomic.Int64
		k := newKnown(t, func(k *known, _ http.ResponseWriter, r *http.Request) {
			share := min(float64(ranks[next.Add(1)-1]+1)/n, 1-0.5/n)
			k.pass(r, time.Duration(-math.Log(1-share)*float64(mean)))
		})
		r := run(t, k, config(func(c *load.Config) { c.Rate, c.Duration = 400, 5*time.Second }))
		requireNear(t, 100, r.LatencyMS.Mean, "mean")
		for share, got := range map[float64]float64{0.5: r.LatencyMS.P50, 0.9: r.LatencyMS.P90, 0.95: r.LatencyMS.P95, 0.99: r.LatencyMS.P99, 0.999: r.LatencyMS.P999} {
			requireNear(t, -100*math.Log(1-share), got, fmt.Sprintf("%.1f %%", 100*share))
		}
	})
}

// Two requests a second more than it can do pile up, and everybody waits longer than the one before.
func TestACapacityIsMeasured(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, oneAtATime(10*time.Millisecond))
		r := run(t, k, config(func(c *load.Config) { c.Rate, c.Duration = 200, 5*time.Second }))
		// The nth order, from 0, arrives at 5n ms and is done at 10(n+1) ms: latencies go evenly from 10 ms to 5,005 ms.
		require.EqualValues(t, 1000, r.Orders.Good)
		requireNear(t, 10, r.LatencyMS.Min, "least")
		requireNear(t, 2507.5, r.LatencyMS.Mean, "mean")
		requireNear(t, 2505, r.LatencyMS.P50, "p50")
		requireNear(t, 4505, r.LatencyMS.P90, "p90")
		requireNear(t, 4955, r.LatencyMS.P99, "p99")
		requireNear(t, 5005, r.LatencyMS.Max, "most")
		requireNear(t, 5, r.DrainSeconds, "the time after the plan")
		// By the clock it is never more than the capacity.
		for _, second := range r.Series[:10] {
			require.InDelta(t, 100, second.Accepted, 1)
		}
		require.InDelta(t, 500, r.Series[4].InFlight, 1, "half of what came in the first five seconds")
		require.True(t, r.Trustworthy, r.Why)
	})
}

func TestWhoGivesUpAtTheDeadlineStillCostsTheServer(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, oneAtATime(10*time.Millisecond))
		r := run(t, k, config(func(c *load.Config) { c.Rate, c.Duration, c.Deadline = 200, 5*time.Second, time.Second }))
		// As above, and who would wait longer than a second leaves: all from the 199th on, whose answer would take 1,005 ms.
		require.InDelta(t, 199, r.Orders.Good, 1)
		require.Equal(t, 1000-r.Orders.Good, r.Orders.TimedOut)
		requireNear(t, 39.8, r.Goodput, "goodput")
		require.Equal(t, map[string]int64{"timeout": r.Orders.TimedOut}, r.Errors)
		requireNear(t, 1000, r.LatencyMS.Max, "nobody waits longer")
		requireNear(t, 1000, r.LatencyAllMS.P50, "who left counts with the time until then")
		require.InDelta(t, 0.995, r.DrainSeconds, 0.001, "the last client left")
		require.InDelta(t, 199, r.Series[0].Good, 1, "goodput belongs to the second in which the order was meant to arrive")
		require.Zero(t, r.Series[2].Good)
		require.True(t, r.Trustworthy, r.Why)
		<-time.After(time.Minute)
		left, _ := k.seen()
		require.InDelta(t, r.Orders.TimedOut, left, 1, "who leaves closes the connection; one may leave at the moment of its answer")
	})
}

// stalls is a server that takes 20 ms and does nothing at all from the 4th second to the 5th.
func stalls(k *known, _ http.ResponseWriter, r *http.Request) {
	const from, to, takes = 4 * time.Second, 5 * time.Second, 20 * time.Millisecond
	k.pass(r, takes)
	if now := time.Since(k.start); now >= from && now < to {
		k.pass(r, to-now)
	}
}

func TestAStallIsChargedWithEverybodyWhoCameMeanwhile(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, stalls)
		r := run(t, k, config(func(c *load.Config) { c.Rate, c.Duration = 200, 10*time.Second }))
		// A tenth of the orders wait, evenly from 20 ms to 1,020 ms; those 20 ms before the stall are caught by it as well.
		require.EqualValues(t, 2000, r.Orders.Good)
		requireNear(t, 20, r.LatencyMS.P50, "p50")
		requireNear(t, 520, r.LatencyMS.P95, "p95: half of the tenth")
		requireNear(t, 920, r.LatencyMS.P99, "p99: nine tenths of it")
		requireNear(t, 1010, r.LatencyMS.P999, "p99.9: 99 hundredths of it")
		require.True(t, r.Trustworthy, r.Why)
	})
}

func TestAClosedLoopHidesTheStall(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, stalls)
		r := run(t, k, config(func(c *load.Config) { c.Closed, c.Duration = 4, 10*time.Second }))
		require.Equal(t, "closed", r.Mode)
		// Nine seconds of 4 in 20 ms, and the four that were caught.
		requireNear(t, 1800, float64(r.Orders.Good), "orders")
		requireNear(t, 180, r.Goodput, "goodput")
		requireNear(t, 20, r.LatencyMS.P99, "p99")
		requireNear(t, 1020, r.LatencyMS.Max, "most")
	})
}

func TestACapOnConnectionsShowsAsBeingLate(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, takes(100*time.Millisecond))
		r := run(t, k, config(func(c *load.Config) { c.Rate, c.Duration, c.Connections = 200, 5*time.Second, 10 }))
		// Ten in 100 ms are 100 a second: latencies are those of TestACapacityIsMeasured, in groups of ten.
		_, connections := k.seen()
		require.Equal(t, 10, connections)
		require.EqualValues(t, 1000, r.Orders.Good)
		requireNear(t, 2550, r.LatencyMS.P50, "p50")
		requireNear(t, 5000, r.LatencyMS.P99, "p99")
		require.Greater(t, r.Late.Count, int64(970))
		requireNear(t, 4950, r.Late.WorstMS, "worst")
		require.False(t, r.Trustworthy)
		require.Contains(t, r.Why, "all 10 connections were taken")
	})
}

func TestWhoLeavesBeforeThereIsAConnectionHasSentNothing(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, takes(10*time.Second))
		r := run(t, k, config(func(c *load.Config) { c.Plan, c.Connections, c.Deadline = plan(t, "burst 10"), 4, time.Second }))
		require.Equal(t, load.Orders{Offered: 10, TimedOut: 10}, r.Orders)
		require.EqualValues(t, 4, r.Attempts)
		require.Equal(t, map[string]int64{"timeout": 4, "unsent": 6}, r.Errors)
		require.EqualValues(t, 6, r.Late.Count)
		require.Nil(t, r.LatencyMS)
		require.InDelta(t, 1000, r.LatencyAllMS.P50, 1)
	})
}

func TestRefusedConnectionsAreCounted(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		refuse := func(context.Context, string, string) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
		}
		r, err := load.Run(t.Context(), config(func(c *load.Config) { c.Rate, c.Duration, c.Retries = 100, time.Second, 2 }), load.Deps{Dial: refuse})
		require.NoError(t, err)
		require.Equal(t, load.Orders{Offered: 100, Failed: 100}, r.Orders)
		require.EqualValues(t, 300, r.Attempts)
		require.Equal(t, map[string]int64{"refused": 300}, r.Errors)
		require.Empty(t, r.Statuses)
		require.ErrorIs(t, r.Unreached(), syscall.ECONNREFUSED)
		require.EqualValues(t, 300, r.Series[0].Errors)
	})
}

func TestAFullMachineMakesTheRunUntrustworthy(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		full := func(context.Context, string, string) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Err: syscall.EMFILE}
		}
		r, err := load.Run(t.Context(), config(func(c *load.Config) { c.Rate, c.Duration = 10, time.Second }), load.Deps{Dial: full})
		require.NoError(t, err)
		require.Equal(t, map[string]int64{"local": 10}, r.Errors)
		require.False(t, r.Trustworthy)
		require.Contains(t, r.Why, "10 attempts failed because this machine")
	})
}

func TestTheSameOrderIsTriedAgain(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		// Each order is answered with 503, then 429, then 202.
		k := newKnown(t, func(k *known, w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(k.nth(r, http.StatusServiceUnavailable, http.StatusTooManyRequests, http.StatusAccepted))
		})
		r := run(t, k, config(func(c *load.Config) {
			c.Rate, c.Duration, c.Retries, c.RetryPause = 100, 5*time.Second, 3, 100*time.Millisecond
		}))
		require.Equal(t, load.Orders{Offered: 500, Good: 500}, r.Orders)
		require.EqualValues(t, 1500, r.Attempts)
		require.Equal(t, map[string]int64{"202": 500, "429": 500, "503": 500}, r.Statuses)
		require.InDelta(t, 300, r.Sent, 0)
		require.InDelta(t, 300, r.Answered, 0)
		require.InDelta(t, 100, r.Accepted, 0)
		require.Len(t, k.bodies, 500)
		for _, times := range k.bodies {
			require.Equal(t, 3, times)
		}
		// The pauses are 100 ms and 200 ms, each drawn evenly from half to one and a half times that.
		requireNear(t, 300, r.LatencyMS.Mean, "mean")
		require.GreaterOrEqual(t, r.LatencyMS.Min, 149.9)
		require.LessOrEqual(t, r.LatencyMS.Max, 450.5)
	})
}

func TestPausesGrowToTheirLongest(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, func(k *known, w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(k.nth(r, 503, 503, 503, 503, 503, http.StatusAccepted))
		})
		r := run(t, k, config(func(c *load.Config) {
			c.Rate, c.Duration, c.Retries, c.RetryPause, c.RetryPauseMax = 100, 5*time.Second, 9, 100*time.Millisecond, 300*time.Millisecond
		}))
		require.Equal(t, load.Orders{Offered: 500, Good: 500}, r.Orders)
		// 100 ms, 200 ms, and three times 300 ms, each drawn evenly from half to one and a half times that.
		requireNear(t, 1200, r.LatencyMS.Mean, "mean")
		require.GreaterOrEqual(t, r.LatencyMS.Min, 599.9)
		require.LessOrEqual(t, r.LatencyMS.Max, 1801.8)
	})
}

func TestAnswersThatAreFinalAreNotTriedAgain(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, func(_ *known, w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusUnprocessableEntity) })
		r := run(t, k, config(func(c *load.Config) { c.Rate, c.Duration, c.Retries = 10, time.Second, 3 }))
		require.Equal(t, load.Orders{Offered: 10, Failed: 10}, r.Orders)
		require.Equal(t, map[string]int64{"422": 10}, r.Statuses)
		require.NoError(t, r.Unreached())
	})
}

func TestEveryAttemptHasTheDeadline(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		// The first attempt of each order hangs, the second takes 100 ms.
		k := newKnown(t, func(k *known, _ http.ResponseWriter, r *http.Request) {
			k.pass(r, time.Duration(k.nth(r, 10_000, 100))*time.Millisecond)
		})
		r := run(t, k, config(func(c *load.Config) { c.Rate, c.Duration, c.Retries, c.Deadline = 50, 2*time.Second, 1, time.Second }))
		require.Equal(t, load.Orders{Offered: 100, Good: 100}, r.Orders)
		require.Equal(t, map[string]int64{"timeout": 100}, r.Errors)
		require.Equal(t, map[string]int64{"200": 100}, r.Statuses)
		requireNear(t, 1100, r.LatencyMS.P50, "counted from the intended time of the order")
	})
}

func TestAConnectionThatIsCutIsCounted(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, func(*known, http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) })
		r := run(t, k, config(func(c *load.Config) { c.Rate, c.Duration = 10, time.Second }))
		require.Equal(t, map[string]int64{"closed": 10}, r.Errors)
		require.Len(t, k.arrived, 10, "nothing is sent twice unseen")
		require.NoError(t, r.Unreached())
	})
}

func TestTheWarmUpIsSentAndNotCounted(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		// Slow at first, as servers are.
		k := newKnown(t, func(k *known, _ http.ResponseWriter, r *http.Request) {
			if time.Since(k.start) < time.Second {
				k.pass(r, time.Second)
			}
		})
		r := run(t, k, config(func(c *load.Config) { c.Rate, c.Duration, c.Warmup = 100, 4*time.Second, time.Second }))
		require.Len(t, k.arrived, 400)
		require.Equal(t, load.Orders{Offered: 300, Good: 300}, r.Orders)
		require.EqualValues(t, 300, r.Attempts)
		require.Equal(t, map[string]int64{"200": 300}, r.Statuses)
		require.InDelta(t, 3, r.MeasuredSeconds, 0)
		require.InDelta(t, 100, r.Goodput, 0)
		require.Less(t, r.LatencyAllMS.Max, 1.0)
		require.EqualValues(t, 100, r.Series[0].Offered)
		require.EqualValues(t, 0, r.Series[0].Accepted)
		require.EqualValues(t, 100, r.Series[0].InFlight)
		require.EqualValues(t, 200, r.Series[1].Accepted)
		require.Nil(t, r.Series[0].P99MS)
		requireNear(t, 1000, *r.Series[1].P99MS, "the warm-up is in the series")
	})
}

func TestABurstIsMeasuredToItsLastAnswer(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, oneAtATime(10*time.Millisecond))
		r := run(t, k, config(func(c *load.Config) { c.Plan = plan(t, "burst 500") }))
		require.EqualValues(t, 500, r.Orders.Good)
		requireNear(t, 5, r.MeasuredSeconds, "measured")
		requireNear(t, 100, r.Goodput, "goodput")
		requireNear(t, 2500, r.LatencyMS.P50, "p50")
		require.True(t, r.Trustworthy, r.Why)
	})
}

func TestAClosedLoopEndsAfterItsOrders(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, takes(100*time.Millisecond))
		r := run(t, k, config(func(c *load.Config) { c.Closed, c.Orders = 20, 500 }))
		require.Equal(t, load.Orders{Offered: 500, Good: 500}, r.Orders)
		_, connections := k.seen()
		require.Equal(t, 20, connections)
		requireNear(t, 2.5, r.MeasuredSeconds, "measured")
		requireNear(t, 200, r.Goodput, "goodput")
		requireNear(t, 100, r.LatencyMS.P99, "p99")
		require.Equal(t, "20 at once, 500 orders", r.Plan)
	})
}

func TestARunThatIsCutShortIsAShorterRun(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, takes(500*time.Millisecond))
		ctx, cancel := context.WithTimeout(t.Context(), 2995*time.Millisecond)
		defer cancel()
		r, err := load.Run(ctx, config(func(c *load.Config) { c.Rate, c.Duration = 100, time.Hour }), load.Deps{Dial: k.dial})
		require.NoError(t, err)
		require.True(t, r.EndedEarly)
		require.InDelta(t, 2.995, r.MeasuredSeconds, 0.001)
		require.Equal(t, load.Orders{Offered: 300, Good: 250, Unfinished: 50}, r.Orders)
		require.Equal(t, map[string]int64{"interrupted": 50}, r.Errors)
		require.Equal(t, 2995*time.Millisecond, time.Since(k.start), "nobody is waited for")
	})
}

func TestOverARealNetwork(t *testing.T) {
	var requests atomic.Int64
	url := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		if requests.Add(1)%10 == 0 {
			panic(http.ErrAbortHandler)
		}
		w.WriteHeader(http.StatusAccepted)
	})
	require.NoError(t, load.Reach(t.Context(), url))
	for name, change := range map[string]func(*load.Config){
		"open loop":   func(c *load.Config) { c.Plan = plan(t, "500/s:200ms, burst 100") },
		"closed loop": func(c *load.Config) { c.Closed, c.Orders = 10, 200 },
	} {
		t.Run(name, func(t *testing.T) {
			requests.Store(0)
			cfg := load.DefaultConfig()
			cfg.URL, cfg.Connections = url, 20
			change(&cfg)
			r, err := load.Run(t.Context(), cfg, load.Deps{})
			require.NoError(t, err)
			require.Equal(t, load.Orders{Offered: 200, Good: 180, Failed: 20}, r.Orders)
			require.Equal(t, map[string]int64{"202": 180}, r.Statuses)
			require.Equal(t, map[string]int64{"closed": 20}, r.Errors)
			require.EqualValues(t, 200, requests.Load())
			require.LessOrEqual(t, r.LatencyMS.Min, r.LatencyMS.P50)
			require.LessOrEqual(t, r.LatencyMS.P50, r.LatencyMS.Max)
			require.Positive(t, r.LatencyMS.Min)
			require.Positive(t, r.CPUSeconds)
		})
	}
}

func TestProgressIsToldEverySecond(t *testing.T) {
	onFakeClock(t, func(t *testing.T) {
		k := newKnown(t, takes(100*time.Millisecond))
		var told []load.Progress
		_, err := load.Run(t.Context(), config(func(c *load.Config) { c.Rate, c.Duration = 100, 3*time.Second }),
			load.Deps{Dial: k.dial, Progress: func(p load.Progress) { told = append(told, p) }})
		require.NoError(t, err)
		require.Len(t, told, 3)
		second := told[1]
		require.Equal(t, 2*time.Second, second.Elapsed)
		require.EqualValues(t, 100, second.Offered)
		require.InDelta(t, 100, second.Sent, 1)
		require.InDelta(t, 100, second.Good, 1)
		require.InDelta(t, 10, second.InFlight, 1)
		require.True(t, strings.HasPrefix(second.String(), "   2 s  offered 100/s  sent 100/s"), second.String())
	})
}
