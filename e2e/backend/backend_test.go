package backend_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"sluice/e2e/backend"
)

// What is about time runs on the fake clock of synctest: exact, and not to be disturbed by a busy machine.

func TestLatency(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := backend.DefaultConfig()
		cfg.Latency = 3 * time.Second
		b := newBackend(t, cfg)
		start := time.Now()
		require.Equal(t, http.StatusOK, post(b, "a", "A-1").Code)
		require.Equal(t, 3*time.Second, time.Since(start))
	})
}

func TestLatencyOverARealConnection(t *testing.T) {
	cfg := backend.DefaultConfig()
	cfg.Latency = 30 * time.Millisecond
	s := serve(t, cfg)
	start := time.Now()
	require.Equal(t, http.StatusOK, s.post("a", "A-1").status)
	require.GreaterOrEqual(t, time.Since(start), 30*time.Millisecond)
}

func TestJitterSpreadsEvenlyAroundTheLatency(t *testing.T) {
	for name, tc := range map[string]struct{ latency, low, middle, high time.Duration }{
		"around the latency": {10 * time.Second, 6 * time.Second, 10 * time.Second, 14 * time.Second},
		"never below zero":   {2 * time.Second, 0, 2 * time.Second, 6 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBackend(t, instant(func(cfg *backend.Config) { cfg.Latency, cfg.Jitter = tc.latency, 4*time.Second }))
				var took []time.Duration
				for i := range 400 {
					start := time.Now()
					post(b, fmt.Sprint(i), "")
					took = append(took, time.Since(start))
				}
				slices.Sort(took)
				require.GreaterOrEqual(t, took[0], tc.low)
				require.LessOrEqual(t, took[399], tc.high)
				// Evenly: 400 draws miss an end, or the middle, by so much less than once in a million million runs.
				require.Less(t, took[0], tc.low+time.Second)
				require.Greater(t, took[399], tc.high-time.Second)
				require.InDelta(t, tc.middle, took[200], float64(1500*time.Millisecond))
			})
		})
	}
}

func TestCapacityWorksOffTheQueueInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) { cfg.Latency, cfg.Capacity = time.Second, 2 }))
		start := time.Now()
		done := arriveOneByOne(b, 6)
		require.Equal(t, int64(6), b.Stats().InFlight)
		for i := range 6 {
			order := <-done
			require.Contains(t, []int{i / 2 * 2, i/2*2 + 1}, order, "two at a time, first come, first served")
			require.Equal(t, time.Duration(i/2+1)*time.Second, time.Since(start))
		}
		require.Equal(t, backend.Stats{Requests: 6, Orders: 6, MaxInFlight: 6}, b.Stats())
	})
}

func TestCapacityChangesWhileRequestsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) { cfg.Latency, cfg.Capacity = time.Second, 1 }))
		start := time.Now()
		done := arriveOneByOne(b, 10)
		require.Equal(t, 0, <-done) // at 1 s; order 1 starts
		require.NoError(t, b.Configure(func(cfg *backend.Config) { cfg.Capacity = 3 }))
		for range 3 {
			require.Less(t, <-done, 4)
		}
		require.Equal(t, 2*time.Second, time.Since(start), "more workers take from the queue at once")
		require.NoError(t, b.Configure(func(cfg *backend.Config) { cfg.Capacity = 1 }))
		for range 3 { // orders 4 to 6 are in service already
			require.Less(t, <-done, 7)
		}
		require.Equal(t, 3*time.Second, time.Since(start))
		require.Equal(t, 7, <-done)
		require.Equal(t, 4*time.Second, time.Since(start), "fewer workers start nothing until they are free")
		require.NoError(t, b.Configure(func(cfg *backend.Config) { cfg.Capacity = 0 }))
		require.ElementsMatch(t, []int{8, 9}, []int{<-done, <-done})
		require.Equal(t, 5*time.Second, time.Since(start))
	})
}

// arriveOneByOne sends orders "0", "1", ... each after the one before has arrived, and returns their numbers as they are answered.
// It only works on a fake clock.
func arriveOneByOne(b *backend.Backend, n int) (answered <-chan int) {
	done := make(chan int, n)
	for i := range n {
		go func() {
			if !postCut(b, fmt.Sprint(i)) {
				done <- i
			}
		}()
		synctest.Wait()
	}
	return done
}

func TestWorkGoesOnWhenTheClientHasLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) { cfg.Latency, cfg.Capacity = time.Second, 1 }))
		ctx, leave := context.WithCancel(t.Context())
		start := time.Now()
		var wg sync.WaitGroup
		for i := range 2 { // one in service, one in the queue
			wg.Go(func() {
				request := httptest.NewRequestWithContext(ctx, http.MethodPost, "/orders", strings.NewReader("{}"))
				request.Header.Set("Idempotency-Key", fmt.Sprint(i))
				b.ServeHTTP(httptest.NewRecorder(), request)
			})
		}
		synctest.Wait()
		leave()
		synctest.Wait()
		require.Equal(t, int64(2), b.Stats().InFlight)
		wg.Wait()
		require.Equal(t, 2*time.Second, time.Since(start))
		require.Equal(t, backend.Stats{Requests: 2, Orders: 2, MaxInFlight: 2}, b.Stats())
	})
}

func TestCancellationHonouredFreesTheWorkerAndTheQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) {
			cfg.Latency, cfg.Capacity, cfg.Queue, cfg.Cancellation = time.Minute, 1, 2, backend.CancellationHonoured
		}))
		ctx, leave := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for i := range 2 { // one in service, one in the queue
			wg.Go(func() {
				defer func() { require.Equal(t, http.ErrAbortHandler, recover(), "there is nobody to answer") }()
				request := httptest.NewRequestWithContext(ctx, http.MethodPost, "/orders", strings.NewReader("{}"))
				request.Header.Set("Idempotency-Key", fmt.Sprint(i))
				b.ServeHTTP(httptest.NewRecorder(), request)
			})
			synctest.Wait()
		}
		wg.Go(func() { post(b, "stays", "A-1") })
		synctest.Wait()
		require.Equal(t, http.StatusServiceUnavailable, post(b, "no room", "A-2").Code)
		start := time.Now()
		leave()
		wg.Wait()
		require.Equal(t, time.Minute, time.Since(start), "who stays has the worker at once")
		require.Equal(t, backend.Stats{Requests: 4, Orders: 1, MaxInFlight: 4, Failed: 3}, b.Stats())
	})
}

func TestExponentialServiceHasTheLatencyAsItsMean(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) { cfg.Latency, cfg.Service = time.Second, backend.ServiceExponential }))
		const n = 4000
		var sum float64
		over := 0
		for i := range n {
			start := time.Now()
			post(b, fmt.Sprint(i), "")
			took := time.Since(start).Seconds()
			sum += took
			if took > 1 {
				over++
			}
		}
		// Ten times the standard deviation on both sides.
		require.InDelta(t, 1, sum/n, 10/math.Sqrt(n))
		require.InDelta(t, 1/math.E, float64(over)/n, 5/math.Sqrt(n))
	})
}

func TestAStallHoldsUpWhoEntersServiceInIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) {
			cfg.Latency, cfg.Capacity, cfg.StallFrom, cfg.StallFor = time.Second, 1, 1500*time.Millisecond, 3*time.Second
		}))
		start := time.Now()
		for _, ends := range []time.Duration{time.Second, 2 * time.Second, 5500 * time.Millisecond, 6500 * time.Millisecond} {
			post(b, ends.String(), "")
			require.Equal(t, ends, time.Since(start))
		}
	})
}

func TestNumbersAreCountedOnceHoweverManyIDs(t *testing.T) {
	b := newBackend(t, instant())
	post(b, "first", "A-1")
	post(b, "second", "A-1")
	post(b, "third", "A-2")
	stats, numbers := b.Counts()
	require.Equal(t, 2, numbers)
	require.Equal(t, int64(3), stats.Orders)
}

func TestTheCountsThatAreToldFitEachOther(t *testing.T) {
	b := newBackend(t, instant())
	var clients sync.WaitGroup
	defer clients.Wait()
	done := make(chan struct{})
	for client := range 4 {
		clients.Go(func() {
			for i := range 2000 {
				id := fmt.Sprintf("%d-%d", client, i)
				post(b, id, id)
			}
		})
	}
	go func() {
		clients.Wait()
		close(done)
	}()
	for over := false; !over; {
		select {
		case <-done:
			over = true // and one last look
		default:
		}
		answer := httptest.NewRecorder()
		b.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/stats", nil))
		var told struct{ Orders, Numbers int }
		require.NoError(t, json.Unmarshal(answer.Body.Bytes(), &told))
		require.Equal(t, told.Orders, told.Numbers, "each order has a number of its own")
	}
}

func TestFullQueue(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) {
			cfg.Latency, cfg.Capacity, cfg.Queue, cfg.RetryAfter, cfg.FailStatus = time.Second, 1, 2, 1500*time.Millisecond, 500
		}))
		done := arriveOneByOne(b, 3)
		start := time.Now()
		full := post(b, "3", "3")
		require.Equal(t, http.StatusServiceUnavailable, full.Code)
		require.Equal(t, "2", full.Header().Get("Retry-After"))
		require.Contains(t, full.Body.String(), "/problems/queue-full")
		require.Zero(t, time.Since(start), "at once")
		require.Equal(t, backend.Stats{Requests: 4, InFlight: 3, MaxInFlight: 4, Failed: 1}, b.Stats())

		require.Equal(t, 0, <-done) // its leaving makes room
		require.Equal(t, http.StatusOK, post(b, "3", "3").Code)
		require.Equal(t, backend.Stats{Requests: 5, Orders: 4, MaxInFlight: 4, Failed: 1}, b.Stats())
	})
}

func TestContention(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const c, n = 0.0019, 40
		b := newBackend(t, instant(func(cfg *backend.Config) { cfg.Latency, cfg.Contention = time.Second, c }))
		start := time.Now()
		done := arriveOneByOne(b, n)
		for i := range n {
			crowd := float64(<-done + 1)
			if i >= 16 {
				require.InDelta(t, i+1, crowd, 0, "the more there are, the longer it takes")
			}
			slowDown := 1 + c*crowd*max(0, crowd-16)
			require.InDelta(t, slowDown, time.Since(start).Seconds(), 1e-6)
		}
	})
}

func TestContentionCountsOnlyWhatIsInService(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) { cfg.Latency, cfg.Contention, cfg.Capacity = time.Second, 1, 16 }))
		start := time.Now()
		done := arriveOneByOne(b, 32)
		for range 32 {
			<-done
		}
		require.Equal(t, 2*time.Second, time.Since(start))
	})
}

func TestContentionBeyondAnyDuration(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) { cfg.Latency, cfg.Contention = time.Hour, 1e300 }))
		done := arriveOneByOne(b, 16)
		cut := make(chan bool)
		go func() { cut <- postCut(b, "17") }()
		for range 16 {
			<-done
		}
		require.Equal(t, int64(1), b.Stats().InFlight)
		b.Close()
		require.True(t, <-cut)
	})
}

func TestFailRate(t *testing.T) {
	const n = 2000
	for name, tc := range map[string]struct {
		rate      float64
		low, high int64
	}{
		"none": {0, 0, 0},
		// Nine standard deviations either way.
		"half": {0.5, 800, 1200},
		"all":  {1, n, n},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBackend(t, instant(func(cfg *backend.Config) { cfg.FailRate = tc.rate }))
			for i := range n {
				post(b, fmt.Sprint(i), "")
			}
			stats := b.Stats()
			require.GreaterOrEqual(t, stats.Failed, tc.low)
			require.LessOrEqual(t, stats.Failed, tc.high)
			require.Equal(t, int64(n), stats.Failed+stats.Orders)
		})
	}
}

func TestFailNextThenSaves(t *testing.T) {
	s := serve(t, instant(func(cfg *backend.Config) { cfg.FailNext = 2 }))
	s.post("a", "A-1", "X-Attempt", "1").requireProblem(t, http.StatusServiceUnavailable, "out-of-order")
	require.Equal(t, 1, s.Config().FailNext)
	s.post("a", "A-1", "X-Attempt", "2").requireProblem(t, http.StatusServiceUnavailable, "out-of-order")
	require.Equal(t, http.StatusOK, s.post("a", "A-1", "X-Attempt", "3").status)

	order := show(t, s.Backend, "A-1")
	require.InDelta(t, 3, order["calls"], 0)
	require.InDelta(t, 3, order["attempt"], 0)
	require.Equal(t, backend.Stats{Requests: 3, Orders: 1, Failed: 2, MaxInFlight: 1}, s.Stats(), "a retry is no repeat")
}

func TestFailureTakesItsServiceTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) { cfg.Latency, cfg.FailNext = time.Second, 1 }))
		start := time.Now()
		require.Equal(t, http.StatusServiceUnavailable, post(b, "a", "A-1").Code)
		require.Equal(t, time.Second, time.Since(start))
	})
}

func TestFailStatusAndRetryAfter(t *testing.T) {
	for name, tc := range map[string]struct {
		status int
		pause  time.Duration
		header string
	}{
		"no Retry-After":               {500, 0, ""},
		"whole seconds":                {429, 7 * time.Second, "7"},
		"rounded up":                   {503, 1001 * time.Millisecond, "2"},
		"less than a second":           {425, time.Millisecond, "1"},
		"redirection":                  {302, 0, ""},
		"longer than any sum of waits": {503, math.MaxInt64, "9223372037"},
	} {
		t.Run(name, func(t *testing.T) {
			s := serve(t, instant(func(cfg *backend.Config) {
				cfg.FailRate, cfg.FailStatus, cfg.RetryAfter = 1, tc.status, tc.pause
			}))
			failed := s.post("a", "A-1")
			failed.requireProblem(t, tc.status, "out-of-order")
			require.Equal(t, tc.header, failed.header.Get("Retry-After"))
		})
	}
}

func TestRejectNumberSuffix(t *testing.T) {
	s := serve(t, instant())
	s.post("a", "A-1-REJECT").requireProblem(t, http.StatusBadRequest, "order-refused")
	require.Equal(t, http.StatusOK, s.post("b", "A-REJECT-1").status)
	require.Equal(t, http.StatusNotFound, s.do(http.MethodGet, "/orders/A-1-REJECT", "").status)
	require.Equal(t, backend.Stats{Requests: 2, Orders: 1, Rejected: 1, MaxInFlight: 1}, s.Stats())

	s.control(`{"rejectNumberSuffix": "-1"}`)
	require.Equal(t, http.StatusBadRequest, s.post("c", "C-1").status)
	require.Equal(t, http.StatusOK, s.post("a", "A-1-REJECT").status, "the same order, corrected on the other side")
	s.control(`{"rejectNumberSuffix": ""}`)
	require.Equal(t, http.StatusOK, s.post("c", "C-1").status)
}

func TestRepeats(t *testing.T) {
	t.Run("after it was saved", func(t *testing.T) {
		s := serve(t, instant())
		first, second := s.post("a", "A-1"), s.post("a", "A-1")
		require.Equal(t, first.body, second.body)
		require.Equal(t, http.StatusOK, second.status)
		require.Equal(t, backend.Stats{Requests: 2, Orders: 1, Repeats: 1, MaxInFlight: 1}, s.Stats())
	})

	t.Run("while it is being served", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBackend(t, instant(func(cfg *backend.Config) { cfg.Latency, cfg.FailNext = time.Second, 2 }))
			var wg sync.WaitGroup
			for range 2 {
				wg.Go(func() { post(b, "a", "A-1") })
			}
			wg.Wait()
			require.Equal(t, backend.Stats{Requests: 2, Repeats: 1, Failed: 2, MaxInFlight: 2}, b.Stats())
			post(b, "a", "A-1")
			require.Equal(t, backend.Stats{Requests: 3, Orders: 1, Repeats: 1, Failed: 2, MaxInFlight: 2}, b.Stats())
		})
	})
}

func TestInFlightNeverCountsAnAnsweredRequest(t *testing.T) {
	const workers, each = 8, 300
	s := serve(t, instant())
	var wg sync.WaitGroup
	for worker := range workers {
		wg.Go(func() {
			for i := range each {
				request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, s.url+"/orders", strings.NewReader("{}"))
				if err != nil {
					t.Error(err)
					return
				}
				request.Header.Set("Idempotency-Key", fmt.Sprintf("%d-%d", worker, i))
				response, err := s.client.Do(request)
				if err != nil {
					t.Error(err)
					return
				}
				_, _ = io.Copy(io.Discard, response.Body) // only so that the connection can be used again
				_ = response.Body.Close()                 // as above
			}
		})
	}
	wg.Wait()
	stats := s.Stats()
	require.Equal(t, int64(workers*each), stats.Orders)
	require.Zero(t, stats.InFlight)
	require.LessOrEqual(t, stats.MaxInFlight, int64(workers))
}

func TestDownCutsConnectionsWithoutAnAnswer(t *testing.T) {
	s := serve(t, instant())
	s.control(`{"down": true}`)
	_, err := s.try(http.MethodPost, "/orders", "{}", "Idempotency-Key", "a")
	require.ErrorIs(t, err, syscall.ECONNRESET)

	s.control(`{"down": false}`)
	require.Equal(t, http.StatusOK, s.post("b", "A-1").status)
	stats := s.Stats()
	require.Equal(t, int64(1), stats.Orders)
	require.Equal(t, stats.Requests-1, stats.Failed, "the client may have tried more than once by itself")
}

func TestDownCutsWhatIsInServiceAndWhatWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) { cfg.Latency, cfg.Capacity = time.Hour, 1 }))
		start := time.Now()
		cut := make(chan bool, 3)
		for i := range 3 {
			go func() { cut <- postCut(b, fmt.Sprint(i)) }()
		}
		synctest.Wait()
		require.NoError(t, b.Configure(func(cfg *backend.Config) { cfg.Down = true }))
		for range 3 {
			require.True(t, <-cut)
		}
		require.Zero(t, time.Since(start), "at once")
		require.Equal(t, backend.Stats{Requests: 3, Failed: 3, MaxInFlight: 3}, b.Stats())

		require.NoError(t, b.Configure(func(cfg *backend.Config) { cfg.Down = false }))
		require.False(t, postCut(b, "0"))
		require.Equal(t, time.Hour, time.Since(start), "no worker was lost")
		require.Equal(t, backend.Stats{Requests: 4, Orders: 1, Failed: 3, MaxInFlight: 3}, b.Stats())
	})
}

func TestDownCutsWhatEndsAtTheSameMoment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) { cfg.Latency = time.Second }))
		cut := make(chan bool)
		go func() { cut <- postCut(b, "a") }()
		synctest.Wait()
		require.NoError(t, b.Configure(func(cfg *backend.Config) {
			cfg.Down = true
			<-time.After(time.Second) // the service ends while the change is being made
		}))
		require.True(t, <-cut)
		require.Equal(t, backend.Stats{Requests: 1, Failed: 1, MaxInFlight: 1}, b.Stats())
	})
}

func TestDownWindow(t *testing.T) {
	window := instant(func(cfg *backend.Config) { cfg.DownFrom, cfg.DownFor = 10*time.Second, 5*time.Second })

	t.Run("cuts new requests while it lasts", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			b := newBackend(t, window)
			var cut []bool
			for i := range 20 {
				cut = append(cut, postCut(b, fmt.Sprint(i)))
				<-time.After(time.Second)
			}
			want := make([]bool, 20)
			copy(want[10:], []bool{true, true, true, true, true})
			require.Equal(t, want, cut)
		})
	})

	t.Run("cuts what is in service when it starts", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			cfg := window
			cfg.Latency = time.Minute
			b := newBackend(t, cfg)
			start := time.Now()
			require.True(t, postCut(b, "a"))
			require.Equal(t, 10*time.Second, time.Since(start))
		})
	})

	t.Run("can be put off", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			cfg := window
			cfg.Latency = 11 * time.Second
			b := newBackend(t, cfg)
			start := time.Now()
			require.NoError(t, b.Configure(func(cfg *backend.Config) { cfg.DownFrom = 20 * time.Second }))
			require.False(t, postCut(b, "a")) // 0 s to 11 s
			require.True(t, postCut(b, "b"))  // 11 s to 20 s
			require.Equal(t, 20*time.Second, time.Since(start))
		})
	})

	t.Run("starts at once without down-from", func(t *testing.T) {
		s := serve(t, instant(func(cfg *backend.Config) { cfg.DownFor = time.Hour }))
		_, err := s.try(http.MethodPost, "/orders", "{}", "Idempotency-Key", "a")
		require.ErrorIs(t, err, syscall.ECONNRESET)
	})
}

func TestClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBackend(t, instant(func(cfg *backend.Config) {
			cfg.Latency, cfg.Capacity, cfg.DownFrom, cfg.DownFor = time.Hour, 1, time.Minute, time.Minute
		}))
		start := time.Now()
		cut := make(chan bool, 2)
		for i := range 2 {
			go func() { cut <- postCut(b, fmt.Sprint(i)) }()
		}
		synctest.Wait()
		b.Close()
		b.Close()
		require.True(t, <-cut)
		require.True(t, <-cut)
		require.True(t, postCut(b, "later"))
		require.Zero(t, time.Since(start), "at once")
		require.Equal(t, backend.Stats{Requests: 3, Failed: 3, MaxInFlight: 2}, b.Stats())
	})
}

func TestConfigureRefusesWhatIsNotValid(t *testing.T) {
	b := newBackend(t, instant())
	err := b.Configure(func(cfg *backend.Config) { cfg.Capacity, cfg.Queue = -1, 5 })
	require.EqualError(t, err, "capacity: must be 0 (no limit) or more, is -1")
	require.Zero(t, b.Config().Queue)
}

func TestNewTellsAllFaultsAtOnce(t *testing.T) {
	_, err := backend.New(backend.Config{
		Latency: -1, Jitter: -1, Capacity: -1, Queue: -1, Contention: math.NaN(), FailRate: math.NaN(), FailNext: -1,
		FailStatus: 200, RetryAfter: -1, StallFrom: -1, StallFor: -1, DownFrom: -1, DownFor: -1,
	})
	require.EqualError(t, err, strings.Join([]string{
		"latency: must be 0 or more, is -1ns",
		"jitter: must be 0 or more, is -1ns",
		"service: must be constant or exponential, is ",
		"cancellation: must be ignored or honoured, is ",
		"capacity: must be 0 (no limit) or more, is -1",
		"queue: must be 0 (no limit) or more, is -1",
		"contention: must be a number, 0 or more, is NaN",
		"fail-rate: must be from 0 to 1, is NaN",
		"fail-next: must be 0 or more, is -1",
		"fail-status: must be from 300 to 599, is 200",
		"retry-after: must be 0 or more, is -1ns",
		"stall-from: must be 0 or more, is -1ns",
		"stall-for: must be 0 or more, is -1ns",
		"down-from: must be 0 or more, is -1ns",
		"down-for: must be 0 or more, is -1ns",
	}, "\n"))

	_, err = backend.New(instant(func(cfg *backend.Config) { cfg.DownFrom, cfg.Contention = time.Second, math.Inf(1) }))
	require.EqualError(t, err, "contention: must be a number, 0 or more, is +Inf\ndown-for: must be more than 0 when down-from is set, is 0s")
}

func TestExponentialServiceAndJitterDoNotGoTogether(t *testing.T) {
	_, err := backend.New(instant(func(cfg *backend.Config) {
		cfg.Service, cfg.Jitter, cfg.StallFrom = backend.ServiceExponential, time.Second, time.Second
	}))
	require.EqualError(t, err, "jitter: must be 0 when service is exponential, is 1s\nstall-for: must be more than 0 when stall-from is set, is 0s")
}

// One order per operation over a kept connection, beside its own client: what a gateway under test has to share a
// machine with. bytes/order is what the ledger keeps of an order that is no longer recent.
func BenchmarkPost(b *testing.B) {
	standIn, err := backend.New(instant())
	require.NoError(b, err)
	defer standIn.Close()
	server := httptest.NewServer(standIn)
	defer server.Close()
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, Timeout: time.Minute}
	body := `{"orderNumber":"A-1","customerId":"C-1","items":[{"sku":"S-1","quantity":1,"unitPrice":1}],"currency":"EUR"}`
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		request, err := http.NewRequestWithContext(b.Context(), http.MethodPost, server.URL+"/orders", strings.NewReader(body))
		require.NoError(b, err)
		request.Header.Set("Idempotency-Key", fmt.Sprintf(`"0199aa00-0000-7000-8000-%012x"`, i))
		request.Header.Set("X-Order-Number", fmt.Sprint("A-", i))
		response, err := client.Do(request)
		require.NoError(b, err)
		_, _ = io.Copy(io.Discard, response.Body) // only so that the connection can be used again
		_ = response.Body.Close()                 // as above
	}
	require.Equal(b, int64(b.N), standIn.Stats().Orders)
}
