package load

import (
	"context"
	"math"
	"math/rand/v2"
	"net"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// times are those of all arrivals of a plan.
func times(t *testing.T, text, arrivals string) []time.Duration {
	t.Helper()
	plan, err := ParsePlan(text)
	require.NoError(t, err)
	var all []time.Duration
	schedule := newSchedule(plan, arrivals, rand.New(rand.NewPCG(1, 2)))
	for a, ok := schedule.next(); ok; a, ok = schedule.next() {
		all = append(all, a.at)
	}
	require.True(t, slices.IsSorted(all))
	return all
}

// perWindow counts arrivals in each window of a plan.
func perWindow(all []time.Duration, window time.Duration, windows int) []float64 {
	counts := make([]float64, windows)
	for _, at := range all {
		counts[at/window]++
	}
	return counts
}

func TestConstantArrivalsAreEvenlySpaced(t *testing.T) {
	require.Equal(t, []time.Duration{0, 250 * time.Millisecond, 500 * time.Millisecond, 750 * time.Millisecond}, times(t, "4/s:1s", Constant))
	require.Len(t, times(t, "500/s:30s", Constant), 15_000)
	require.Len(t, times(t, "0.1/s:30s", Constant), 3)
}

func TestAStepGoesOnWhereTheOneBeforeEnded(t *testing.T) {
	all := times(t, "10/s:1s, 20/s:1s, 0/s:2s, 5/s:1s", Constant)
	require.Equal(t, []float64{10, 20, 0, 0, 5}, perWindow(all, time.Second, 5))
	// Half an order that is due at the end of a phase comes in the next one.
	require.Equal(t, []time.Duration{0, time.Second, 2 * time.Second}, times(t, "1/s:500ms, 1/s:2s", Constant))
}

func TestARampChangesEvenly(t *testing.T) {
	up := perWindow(times(t, "0/s-100/s:10s", Constant), time.Second, 10)
	down := perWindow(times(t, "100/s-0/s:10s", Constant), time.Second, 10)
	for second := range 10 {
		require.InDelta(t, 10*second+5, up[second], 1)
		require.InDelta(t, 95-10*second, down[second], 1)
	}
}

func TestABurstComesAtOneInstant(t *testing.T) {
	for _, arrivals := range []string{Constant, Poisson} {
		all := times(t, "0/s:1s, burst 3, 0/s:1s, burst 2", arrivals)
		require.Equal(t, []time.Duration{time.Second, time.Second, time.Second, 2 * time.Second, 2 * time.Second}, all)
	}
}

func TestPoissonArrivalsHaveTheirMeanAndVariance(t *testing.T) {
	// A thousand a second, in 40,000 windows in which 25 are to be expected: their mean and their variance.
	const windows, mean = 40_000, 25.0
	all := times(t, "1000/s:1000s", Poisson)
	var sum, squares float64
	for _, n := range perWindow(all, 25*time.Millisecond, windows) {
		sum += n
		squares += (n - mean) * (n - mean)
	}
	require.InEpsilon(t, mean, sum/windows, 0.02)
	require.InEpsilon(t, mean, squares/windows, 0.02)
	// The gaps between them: a share of 1/e is longer than their mean.
	long := 0
	for i := 1; i < len(all); i++ {
		if all[i]-all[i-1] > time.Millisecond {
			long++
		}
	}
	require.InEpsilon(t, 1/math.E, float64(long)/float64(len(all)), 0.02)
}

func TestPoissonArrivalsFollowARamp(t *testing.T) {
	counts := perWindow(times(t, "0/s-20000/s:10s", Poisson), time.Second, 10)
	for second, n := range counts {
		want := 2000*float64(second) + 1000
		require.InDelta(t, want, n, 4*math.Sqrt(want))
	}
}

func TestAPlanSaysWhatIsWrongWithIt(t *testing.T) {
	for text, says := range map[string]string{
		"":                    `phase 1, "": is neither a rate with a duration, such as 500/s:30s or 100/s-1000/s:60s, nor a burst, such as burst 5000`,
		"500/s:30s, 500":      `phase 2, "500": is neither a rate`,
		"500:30s":             `phase 1, "500:30s": "500" is not a rate such as 500/s, from 0 to 1000000`,
		"-1/s:1s":             `"-1/s" is not a rate`,
		"NaN/s:1s":            `"NaN/s" is not a rate`,
		"2000000/s:1s":        `"2000000/s" is not a rate`,
		"1/s-:1s":             `"" is not a rate`,
		"1/s-x/s:1s":          `"x/s" is not a rate`,
		"1/s:":                `"" is not a duration such as 30s or 5m, more than 0 and at most 24h0m0s`,
		"1/s:30":              `"30" is not a duration`,
		"1/s:0s":              `"0s" is not a duration`,
		"1/s:25h":             `"25h" is not a duration`,
		"1/s:20h, 1/s:20h":    "lasts 40h0m0s, more than 24h0m0s",
		"burst":               `"" is not a number of orders from 1 to 1000000`,
		"burst 0":             `"0" is not a number`,
		"burst many":          `"many" is not a number`,
		"0/s:1s, 0/s-0/s:10s": "has no orders",
		"1/s:1s,":             `phase 2, ""`,
	} {
		_, err := ParsePlan(text)
		require.ErrorContains(t, err, says, text)
	}
}

func FuzzPlan(f *testing.F) {
	for _, seed := range []string{"500/s:30s", "100/s-1000/s:60s, burst 5000", "0/s:1h,1e-3/s-1e6/s:1ns", "burst 1", " 7.5/s:1m30s ", "1/s-:1s", "1/s--0/s:1s"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		plan, err := ParsePlan(text)
		if err != nil {
			return
		}
		again, err := ParsePlan(plan.String())
		require.NoError(t, err, plan.String())
		require.Equal(t, plan, again)
		for _, arrivals := range []string{Constant, Poisson} {
			schedule, last := newSchedule(plan, arrivals, rand.New(rand.NewPCG(1, 2))), time.Duration(0)
			for range 2000 {
				a, ok := schedule.next()
				if !ok {
					break
				}
				require.GreaterOrEqual(t, a.at, last)
				require.LessOrEqual(t, a.at, plan.Duration())
				last = a.at
			}
		}
	})
}

// runBehind runs a generator that got no CPU for a while: it began further back than it knows.
func runBehind(t *testing.T, text string, behind, deadline time.Duration) Result {
	t.Helper()
	plan, err := ParsePlan(text)
	require.NoError(t, err)
	cfg := Config{URL: "http://none.test", Plan: plan, Deadline: deadline}
	client, err := newClient(cfg, func(context.Context, string, string) (net.Conn, error) { return nil, syscall.ECONNREFUSED })
	require.NoError(t, err)
	g := &generator{cfg: cfg, client: client, bodies: newTemplate(cfg), recorder: newRecorder()}
	g.recorder.start = g.recorder.start.Add(-behind)
	g.run(t.Context())
	return g.recorder.conclude(cfg, 0)
}

func TestAGeneratorThatFallsBehindSaysSo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runBehind(t, "100/s:2s", 500*time.Millisecond, 0)
		require.EqualValues(t, 200, r.Orders.Offered, "none is left out")
		require.EqualValues(t, 49, r.Late.Count, "those meant for up to 490 ms, which is 10 ms ago, and not the one at 490 ms")
		require.InDelta(t, 500, r.Late.WorstMS, 0)
		require.False(t, r.Trustworthy)
		require.Equal(t, "24.5 % of the orders were begun late, by up to 500 ms: the generator did not keep up", r.Why)
		require.InDelta(t, 500, r.LatencyAllMS.Max, 1, "the waiting counts")
	})
}

func TestAGeneratorThatIsTooLateForAClientSendsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runBehind(t, "100/s:2s", 500*time.Millisecond, 200*time.Millisecond)
		// The clients of the first 300 ms have left.
		require.Equal(t, Orders{Offered: 200, TimedOut: 31, Failed: 169}, r.Orders)
		require.Equal(t, map[string]int64{"unsent": 31, "refused": 169}, r.Errors)
		require.EqualValues(t, 169, r.Attempts)
	})
}

func TestABurstMayTakeAMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := runBehind(t, "burst 1000", 20*time.Millisecond, 0)
		// The nth order may be 10 ms and n times 0.05 ms behind.
		require.EqualValues(t, 199, r.Late.Count)
	})
}
