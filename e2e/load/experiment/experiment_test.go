package experiment

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"image/png"
	"io"
	"math"
	"net/http"
	"net/http/httptest"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"sluice/e2e/load"
	"sluice/e2e/services"
)

var update = flag.Bool("update", false, "write the golden files")

// TestMain is also a sluice whose commands do as the test wants: the experiment knows nothing of it but its command line,
// its log and its exit code.
func TestMain(m *testing.M) {
	if behaviour := os.Getenv("EXPERIMENT_TEST_CHILD"); behaviour != "" {
		child(behaviour, os.Args[1])
		return
	}
	goleak.VerifyTestMain(m)
}

// child plays `sluice backend` and `sluice serve`; the latter dies, or never is ready.
func child(behaviour, command string) {
	if command == "backend" {
		server := httptest.NewServer(http.NotFoundHandler())
		fmt.Fprintf(os.Stderr, "time=now level=INFO msg=\"backend is listening\" addr=%s\n", strings.TrimPrefix(server.URL, "http://"))
	} else {
		if err := os.WriteFile(os.Getenv("SLUICE_STORE_DSN"), []byte("data"), 0o600); err != nil {
			panic(err)
		}
		fmt.Fprintln(os.Stderr, "level=INFO msg=starting")
		if behaviour == "dies" {
			fmt.Fprintln(os.Stderr, "level=ERROR msg=\"the disk is on fire\"")
			os.Exit(3)
		}
	}
	stopped := make(chan os.Signal, 1)
	signal.Notify(stopped, syscall.SIGTERM)
	<-stopped
}

func childBench(t *testing.T, behaviour string) *bench {
	t.Helper()
	binary, err := os.Executable()
	require.NoError(t, err)
	return &bench{binary: binary, environ: append(os.Environ(), "EXPERIMENT_TEST_CHILD="+behaviour), dir: t.TempDir(), broker: BrokerGoChannel}
}

func quickPlan(change ...func(*Config)) plan {
	cfg := DefaultConfig()
	cfg.Quick = true
	for _, c := range change {
		c(&cfg)
	}
	return newPlan(cfg, machine{Workers: fullWorkers})
}

func TestAChildThatDiesIsAnErrorWithItsLastLinesAndNothingIsLeft(t *testing.T) {
	b := childBench(t, "dies")
	_, err := b.measure(t.Context(), overloadPoints(quickPlan())[0], 1)
	require.ErrorContains(t, err, "sluice serve has ended (exit status 3)")
	require.ErrorContains(t, err, "the disk is on fire")
	left, err := os.ReadDir(b.dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

func TestAnExperimentThatIsStoppedLeavesNothing(t *testing.T) {
	b := childBench(t, "waits")
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		_, err := b.measure(ctx, overloadPoints(quickPlan())[0], 1)
		done <- err
	}()
	require.Eventually(t, func() bool {
		databases, err := filepath.Glob(filepath.Join(b.dir, "*", "sluice.db"))
		require.NoError(t, err)
		return len(databases) == 1
	}, 30*time.Second, 5*time.Millisecond, "the gateway has not started")
	cancel()
	require.Error(t, <-done)
	left, err := os.ReadDir(b.dir)
	require.NoError(t, err)
	require.Empty(t, left)
}

// watched is a trial whose gateway answers the first samples, then misses some, and answers again.
func watched(t *testing.T, from, misses int) *trial {
	t.Helper()
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/stats" {
			asked++
		}
		if r.URL.Path == "/metrics" && asked > from && asked <= from+misses {
			http.Error(w, "too busy", http.StatusServiceUnavailable)
			return
		}
		_, _ = w.Write([]byte("{}"))
	}))
	t.Cleanup(server.Close)
	lives := &process{done: make(chan struct{})}
	return &trial{client: server.Client(), standInURL: server.URL, admin: server.URL, standIn: lives, gateway: lives}
}

func TestAPointBearsSamplesThatAreMissed(t *testing.T) {
	trial := watched(t, 1, mostMissed)
	for range mostMissed + 2 {
		require.NoError(t, trial.look(t.Context()))
	}
	require.Len(t, trial.samples, 2)
	require.Contains(t, trial.row(load.Result{}, 1).note, "samples missed, which are interpolated: 5")

	trial = watched(t, 1, mostMissed+1)
	var err error
	for looks := 0; err == nil && looks < mostMissed+2; looks++ {
		err = trial.look(t.Context())
	}
	require.ErrorContains(t, err, "answered 503: too busy", "a gateway that answers no more")

	require.ErrorContains(t, watched(t, 0, 1).look(t.Context()), "answered 503: too busy", "nothing to count from")
}

func TestPartsThatAreCompleteOutliveTheErrorOfALaterOne(t *testing.T) {
	dir := t.TempDir()
	result := fixed()
	result.Out, result.Failed, result.plan.Parts = dir, errors.New("stall async 320/s: sluice serve has ended"), []string{"overload", "stall"}
	require.NoError(t, result.publish(io.Discard))
	for _, name := range []string{"results-overload.md", "report-overload.html"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		require.Contains(t, string(got), "Incomplete: 1 of 2 parts, since stall async 320/s: sluice serve has ended")
	}
}

func TestAProcessIsGoneWhenStopReturns(t *testing.T) {
	b := childBench(t, "waits")
	p, err := b.startStandIn(t.Context(), nil)
	require.NoError(t, err)
	values, err := p.attributes(t.Context(), standInReady, "addr")
	require.NoError(t, err)
	require.Regexp(t, `^127\.0\.0\.1:\d+$`, values[0])
	p.stop()
	require.NotNil(t, p.cmd.ProcessState)
	p.stop() // does nothing
}

func TestTheGatewaysOwnSettingsAreNotThoseOfTheEnvironment(t *testing.T) {
	require.Equal(t, []string{"PATH=/bin", "HOME=/"},
		foreign([]string{"PATH=/bin", "SLUICE_DISPATCH_CONCURRENCY=1", "OTEL_TRACES_EXPORTER=otlp", "GOGC=1", "GOMEMLIMIT=1", "GOMAXPROCS=1", "HOME=/"}))
}

func TestABrokerThatIsNowhereIsNamed(t *testing.T) {
	_, err := newQueues(BrokerSQL, nil)
	require.EqualError(t, err, "backend sql: set SLUICE_PUBSUB_SQL_DSN to a PostgreSQL database in which the experiment may make and drop tables")
	q, err := newQueues(BrokerSQL, []string{"SLUICE_STORE_DSN=postgres://store/"})
	require.NoError(t, err)
	require.Equal(t, "postgres://store/", q.settings["pubsub.sql.dsn"])
	other, err := newQueues(BrokerSQL, []string{"SLUICE_STORE_DSN=postgres://store/"})
	require.NoError(t, err)
	require.NotEqual(t, q.settings["pubsub.sql.prefix"], other.settings["pubsub.sql.prefix"])
	require.Regexp(t, `^[a-z0-9_]+$`, q.settings["pubsub.sql.prefix"])
}

func TestTheBrokersServerIsNamedWithItsVersion(t *testing.T) {
	server, err := brokerServer(t.Context(), BrokerGoChannel, nil)
	require.NoError(t, err)
	require.Equal(t, "gochannel", server)
	t.Run("amqp", func(t *testing.T) {
		url, _ := services.AMQP(t)
		server, err := brokerServer(t.Context(), BrokerAMQP, []string{envAMQPURL + "=" + url})
		require.NoError(t, err)
		require.Regexp(t, `^amqp \(RabbitMQ \d+\.[\d.]+\)$`, server)
	})
	t.Run("sql", func(t *testing.T) {
		server, err := brokerServer(t.Context(), BrokerSQL, []string{envSQLDSN + "=" + services.Postgres(t)})
		require.NoError(t, err)
		require.Regexp(t, `^sql \(PostgreSQL \d+\.\d+.*\)$`, server)
	})
}

func TestConfigTellsAllFaultsAtOnce(t *testing.T) {
	require.NoError(t, DefaultConfig().Validate())
	err := Config{Parts: []string{"everything", "overload"}, Backend: "kafka", Arrivals: "never", Service: "slow", Cancellation: "maybe", TimeScale: 2}.Validate()
	require.EqualError(t, err, strings.Join([]string{
		`part: must be one of overload, original, stall, memory, is "everything"`,
		`backend: must be one of gochannel, amqp, sql, is "kafka"`,
		`arrivals: must be one of constant, poisson, is "never"`,
		`service: must be one of constant, exponential, is "slow"`,
		`cancellation: must be one of ignored, honoured, is "maybe"`,
		`runs: must be 1 or more, is 0`,
		`out: must name a directory`,
		`time-scale: must be more than 0 and at most 1, is 2`,
	}, "\n"))
}

func TestFlagsOfAPartThatIsNotRunAreFaults(t *testing.T) {
	cfg := DefaultConfig()
	cfg.Parts, cfg.Arrivals, cfg.Service, cfg.Cancellation = []string{"stall", "memory"}, ArrivalsPoisson, ServiceExponential, CancellationHonoured
	require.EqualError(t, cfg.Validate(), strings.Join([]string{
		"arrivals: changes part overload only, which is not among the parts",
		"service: changes part overload only, which is not among the parts",
		"cancellation: changes part overload only, which is not among the parts",
	}, "\n"))
	cfg.Parts = append(cfg.Parts, "overload")
	require.NoError(t, cfg.Validate())
	cfg.Parts = nil
	require.NoError(t, cfg.Validate(), "no parts are all")
}

func TestTheTextOfPartOverloadIsAboutWhatIsMeasured(t *testing.T) {
	text := func(p plan) string { return strings.Join(append(overload().caveats(p), overload().about(p)), "\n") }
	quick := text(quickPlan())
	require.Contains(t, quick, "The backend does not know that")
	require.NotContains(t, quick, "see the variants", "there are none")
	require.Contains(t, text(quickPlan(func(c *Config) { c.Quick = false })), "see the variants")
	changed := text(quickPlan(func(c *Config) {
		c.Arrivals, c.Service, c.Cancellation = ArrivalsPoisson, ServiceExponential, CancellationHonoured
	}))
	require.NotContains(t, changed, "does not know")
	for _, what := range []string{"The backend is told", "at random (Poisson)", "(exponential)"} {
		require.Contains(t, changed, what)
		require.NotContains(t, quick, what)
	}
}

func TestHowMuchIsNoCollapseIsTheSameByFlagAndAsAVariant(t *testing.T) {
	expected := func(verdicts []verdict, name string) string {
		for _, v := range verdicts {
			if v.Name == name {
				return v.Expected
			}
		}
		return "not checked: " + name
	}
	variants := judgeOverload(quickPlan(func(c *Config) { c.Quick = false }), nil)
	for variant, change := range map[string]func(*Config){
		"cancellation honoured":         func(c *Config) { c.Cancellation = CancellationHonoured },
		"random, cancellation honoured": func(c *Config) { c.Cancellation, c.Service = CancellationHonoured, ServiceExponential },
	} {
		byFlag := judgeOverload(quickPlan(change), nil)
		require.Equal(t, expected(variants, "synchronous at twice the capacity: "+variant),
			expected(byFlag, "synchronous goodput at twice the capacity, cancellation honoured"), variant)
	}
}

func TestParametersOfPointsThatAreToldTheSameAreOneLine(t *testing.T) {
	p := newPlan(DefaultConfig(), machine{Workers: fullWorkers, Taking: 2000})
	lines := parameters(overloadPoints(p)).Rows
	require.Equal(t, []string{"async", "200/s, 380/s, 500/s, 800/s, 1200/s", "--latency 50ms --capacity 20 --service constant --cancellation ignored",
		"dispatch.concurrency=25", "leave after 1s, constant arrivals", "2s + 6s"}, lines[slices.IndexFunc(lines, func(line []string) bool { return line[0] == modeAsync })])
	lines = parameters(memoryPoints(p)).Rows
	require.Equal(t, "GOMAXPROCS=1 GOMEMLIMIT=64MiB dispatch.concurrency=64 pubsub.gochannel.window=128", lines[0][3])
	lines = parameters(originalPoints(p)).Rows
	require.Equal(t, "leave after 10m0s, try again up to 100000 times, first after about 50ms, later 400ms", lines[len(lines)-1][4])
	lines = parameters(stallPoints(p)).Rows
	require.Equal(t, []string{"leave after 1s, try again up to 3 times, first after about 300ms, constant arrivals", "2s + 38s, stall of 3s after 7s"}, lines[0][4:])
	lines = parameters(originalPoints(p)).Rows
	require.Equal(t, []string{"N = 10, 50, 100, 200, 500, 1000", "N = 2000, 3000"}, []string{lines[0][1], lines[1][1]})
	require.Equal(t, []string{"all at once, until all are saved", "1000 at once, until all are saved"}, []string{lines[0][5], lines[1][5]})
}

func TestTheQuickPlanTakesLessThanThreeMinutes(t *testing.T) {
	p := quickPlan()
	var sum time.Duration
	for _, part := range p.parts() {
		for _, point := range part.points(p) {
			sum += point.expected()
		}
	}
	require.Less(t, sum, 160*time.Second, "with the calibration and a point measured twice")
	require.Greater(t, sum, time.Minute)
}

func TestSynchronousPointsWarmUpUntilTheQueueIsFull(t *testing.T) {
	for _, quick := range []bool{false, true} {
		p := quickPlan(func(c *Config) { c.Quick = quick })
		for _, point := range overloadPoints(p) {
			if r := point.rate / p.capacity(); point.mode == modeSync && r > 1 {
				require.GreaterOrEqual(t, point.warmup.Seconds(), point.deadline.Seconds()*r/(r-1), point)
			}
		}
	}
}

func TestTheLoadOfPartMemoryFollowsWhatTheGatewayTakes(t *testing.T) {
	for taking, rate := range map[float64]float64{0: 400, 100: 400, 1000: 500, 1430: 750, 1e6: 2500} {
		plan := newPlan(DefaultConfig(), machine{Taking: taking})
		for _, p := range memoryPoints(plan) {
			require.InDelta(t, rate, p.rate, 0, "%v", taking)
		}
	}
	require.Equal(t, "64 MiB", plan{memoryRate: 1000}.memoryLimit())
	require.Equal(t, "32 MiB", plan{memoryRate: 400}.memoryLimit())
}

func TestABusyMachineIsRefusedWithItsReasons(t *testing.T) {
	idle := machine{Taken: 0.02, Stolen: 0, Lag: time.Millisecond, Answers: 15000}
	idle.judge()
	require.Empty(t, idle.Busy)
	require.Equal(t, fullWorkers, idle.Workers)

	unknown := machine{Taken: math.NaN(), Stolen: math.NaN(), Lag: time.Millisecond, Answers: 15000}
	unknown.judge()
	require.Empty(t, unknown.Busy, "where the system does not tell, the timers and the answers do")

	slow := machine{Answers: 3600}
	slow.judge()
	require.Empty(t, slow.Busy)
	require.Equal(t, fullWorkers/2, slow.Workers, "half as fast, half the load")

	busy := machine{Taken: 0.5, Stolen: 0.1, Lag: 30 * time.Millisecond, Answers: 1000}
	busy.judge()
	require.Equal(t, []string{
		"other processes take 50 % of the processors (at most 20 %)",
		"the hypervisor keeps back 10 % of the processors (at most 5 %)",
		"timers are 30ms late (at most 20ms)",
		"an idle backend answers 1000 times a second (at least 1500)",
	}, busy.Busy)
	require.Equal(t, leastWorker, busy.Workers)

	progress := &progress{out: new(bytes.Buffer)}
	require.ErrorIs(t, busy.admit(Config{}, progress), ErrBusy)
	require.ErrorContains(t, busy.admit(Config{}, progress), "timers are 30ms late (at most 20ms)")
	require.NoError(t, busy.admit(Config{Force: true}, progress))
	result := result{Machine: busy, Config: Config{Force: true, TimeScale: 1}}
	require.Contains(t, result.remarks()[0], "Measured by force on a machine that was too busy: other processes take 50 %")
}

func TestProcessorTimes(t *testing.T) {
	times, ok := parseProcessorTimes("cpu  10 1 5 100 20 2 2 7 0 0")
	require.True(t, ok)
	require.Equal(t, processorTimes{all: 147, idle: 120, stolen: 7}, times)
	for _, line := range []string{"", "cpu 1 2", "intr 1 2 3 4 5 6 7 8 9", "cpu a b c d e f g h"} {
		_, ok := parseProcessorTimes(line)
		require.False(t, ok, line)
	}
}

func TestMetricsAreAddedUpByName(t *testing.T) {
	m := parseMetrics([]byte("# HELP go_memory_used_bytes x\n" +
		"go_memory_used_bytes{go_memory_type=\"a b\"} 3\ngo_memory_used_bytes{go_memory_type=\"other\"} 4e2\ngo_goroutine_count 12 1395066363000\n"))
	require.InDelta(t, 403, m.sum("go_memory_used_bytes"), 0)
	require.InDelta(t, 12, m.sum("go_goroutine_count"), 0)
	require.True(t, math.IsNaN(m.sum("gone")))
}

func TestSamplesGrowEvenlyInBetween(t *testing.T) {
	trial := trial{samples: []sample{{at: time.Second, saved: 10}, {at: 3 * time.Second, saved: 30}}}
	for at, want := range map[time.Duration]float64{0: 10, time.Second: 10, 1500 * time.Millisecond: 15, 3 * time.Second: 30, time.Minute: 30} {
		require.InDelta(t, want, trial.at(at).saved, 1e-9, at)
	}
}

// recorded are measurements of part overload, as they are on a quiet machine. Each change makes another gateway of it.
func recorded(change ...func(mode string, load float64, r *row)) []row {
	var rows []row
	add := func(mode string, load, accepted, goodput, saved, backlog, p99 float64) {
		r := first(nil, nil)
		r.part, r.mode, r.run = "overload", mode, 1
		r.capacity, r.load, r.offered, r.accepted, r.goodput, r.saved, r.backlog, r.p99 = 400, load, load, accepted, goodput, saved, backlog, p99
		r.answerP99 = max(p99, 1000*(1-goodput/load))
		for _, c := range change {
			c(mode, load, &r)
		}
		rows = append(rows, r)
	}
	for _, load := range []float64{200, 380} {
		add(modeSync, load, load, load, load, 10, 52)
		add(modeSyncLimit, load, load, load, load, 10, 52)
		add(modeAsync, load, load, load, load, 10, 1.6)
	}
	for _, load := range []float64{500, 800, 1200} {
		add(modeSync, load, 0, 0, 400, 500, math.NaN())
		add(modeSyncLimit, load, 392, 392, 392, 40, 103)
		add(modeAsync, load, load, load, 392, 8*(load-392), 1.9)
	}
	return rows
}

// unexpected are the names of the checks that failed.
func unexpected(verdicts []verdict) []string {
	var names []string
	for _, v := range verdicts {
		if !v.OK {
			names = append(names, v.Name)
		}
	}
	return names
}

func TestOverloadVerdicts(t *testing.T) {
	p := quickPlan()
	require.Empty(t, unexpected(judgeOverload(p, recorded())))
	for name, tc := range map[string]struct {
		change func(mode string, load float64, r *row)
		fails  string
	}{
		"a synchronous gateway that does not collapse": {func(mode string, load float64, r *row) {
			if mode == modeSync && load == 800 {
				r.goodput = 390
			}
		}, "synchronous goodput at twice the capacity"},
		"a backend that is not busy": {func(mode string, _ float64, r *row) {
			if mode == modeSync {
				r.saved = min(r.saved, 200)
			}
		}, "saved at the same time, for nobody"},
		"202s that are late": {func(mode string, load float64, r *row) {
			if mode == modeAsync && load == 200 {
				r.p99 = 400
			}
		}, "99th percentile of their 202, at every load"},
		"orders that are refused": {func(mode string, load float64, r *row) {
			if mode == modeAsync && load == 1200 {
				r.accepted = 1100
			}
		}, "asynchronous orders accepted, at every load"},
		"an asynchronous curve that falls": {func(mode string, load float64, r *row) {
			if mode == modeAsync && load == 1200 {
				r.saved = 365
			}
		}, "and flat: least below most, above the capacity"},
		"a backlog that vanishes": {func(mode string, _ float64, r *row) { r.backlog = 0 }, "while the backlog grows: seconds of excess in it"},
		"a limit that does not help": {func(mode string, _ float64, r *row) {
			if mode == modeSyncLimit {
				r.goodput = 100
			}
		}, "synchronous goodput at twice the capacity with a limit"},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, []string{tc.fails}, unexpected(judgeOverload(p, recorded(tc.change))))
		})
	}
	t.Run("nothing measured", func(t *testing.T) {
		require.Len(t, unexpected(judgeOverload(p, nil)), 9, "a number that is not there fails its check")
	})
	t.Run("cancellation honoured", func(t *testing.T) {
		honoured := quickPlan(func(c *Config) { c.Cancellation = CancellationHonoured })
		require.Equal(t, []string{"synchronous goodput at twice the capacity, cancellation honoured"}, unexpected(judgeOverload(honoured, recorded())))
	})
	t.Run("the full experiment wants its variants", func(t *testing.T) {
		require.Len(t, unexpected(judgeOverload(quickPlan(func(c *Config) { c.Quick = false }), recorded())), 3)
	})
}

func TestOriginalVerdicts(t *testing.T) {
	measure := func(ours func(orders int, sync, async float64) (float64, float64), idealSync float64) []row {
		var rows []row
		add := func(mode, variant string, orders int, perMinute float64) {
			r := first(nil, nil)
			r.part, r.mode, r.variant, r.orders, r.perMinute, r.load = "original", mode, variant, orders, perMinute, 0
			rows = append(rows, r)
		}
		for _, line := range originalTable {
			sync, async := ours(line.orders, line.sync, line.async)
			add(modeSync, "", line.orders, sync)
			add(modeAsync, "", line.orders, async)
			add(modeSyncLimit, "", line.orders, 0.7*async)
		}
		for _, n := range []int{10, 3000} {
			add(modeSync, variantIdeal, n, idealSync*float64(n)/3000+10000)
			add(modeAsync, variantIdeal, n, 18500)
		}
		return rows
	}
	require.Empty(t, unexpected(judgeOriginal(plan{}, measure(func(_ int, sync, async float64) (float64, float64) { return 1.1 * sync, 1.05 * async }, 320000))))
	require.Equal(t, []string{"farthest from the original's table, from 100 orders on"},
		unexpected(judgeOriginal(plan{}, measure(func(_ int, sync, async float64) (float64, float64) { return 1.3 * sync, async }, 320000))))
	require.Equal(t, []string{"with an ideal backend, synchronous: most orders over fewest", "with an ideal backend, synchronous over asynchronous"},
		unexpected(judgeOriginal(plan{}, measure(func(_ int, sync, async float64) (float64, float64) { return sync, async }, 0))))
	require.Len(t, unexpected(judgeOriginal(plan{}, nil)), 6, "only the distance from the table is nothing where nothing is")
}

func TestStallVerdicts(t *testing.T) {
	measure := func(change func(mode string, r *row)) []row {
		var rows []row
		for _, mode := range []string{modeSync, modeAsync, modeSyncLimit} {
			r := first(nil, nil)
			r.part, r.mode, r.load, r.before, r.after, r.copies, r.lost = "stall", mode, 320, 320, 320, 1, 0
			if mode == modeSync {
				r.after, r.copies = 0, 3.97
			}
			change(mode, &r)
			rows = append(rows, r)
		}
		return rows
	}
	require.Empty(t, unexpected(judgeStall(plan{}, measure(func(string, *row) {}))))
	require.Equal(t, []string{"synchronous goodput long after the stall", "times that the backend saved each synchronous order since the stall"},
		unexpected(judgeStall(plan{}, measure(func(mode string, r *row) { r.after, r.copies = 320, 1 }))), "a gateway that recovers")
	require.Equal(t, []string{"times that the backend saved each asynchronous order", "asynchronous orders lost"},
		unexpected(judgeStall(plan{}, measure(func(mode string, r *row) {
			if mode == modeAsync {
				r.copies, r.lost = 1.01, 1
			}
		}))))
	require.Len(t, unexpected(judgeStall(plan{}, nil)), 7)
}

func TestMemoryVerdicts(t *testing.T) {
	measure := func(tight float64, collector float64) []row {
		add := func(mode, variant string, goodput, collector float64) row {
			r := first(nil, nil)
			r.part, r.mode, r.variant, r.load, r.goodput, r.collector = "memory", mode, variant, 1000, goodput, collector
			return r
		}
		return []row{add(modeSync, variantLimited, tight, collector), add(modeSync, "", 1000, 0.06), add(modeAsync, variantLimited, 1000, 0.05)}
	}
	quick, full := plan{Config: Config{Quick: true}}, plan{}
	require.Empty(t, unexpected(judgeMemory(quick, measure(500, 0.6))))
	require.Equal(t, []string{"synchronous goodput with little memory"}, unexpected(judgeMemory(quick, measure(1000, 0.6))))
	require.Equal(t, []string{"the collector's share of a core there"}, unexpected(judgeMemory(quick, measure(500, 0.2))))
	require.Len(t, unexpected(judgeMemory(quick, nil)), 6)
	const limit = "synchronous goodput with little memory and a limit"
	require.Equal(t, []string{limit}, unexpected(judgeMemory(full, measure(500, 0.6))), "the full experiment wants it")
	limited := first(nil, nil)
	limited.mode, limited.variant, limited.goodput = modeSyncLimit, variantLimited, 60
	require.Empty(t, unexpected(judgeMemory(full, append(measure(500, 0.6), limited))))
	limited.goodput = 40
	require.Equal(t, []string{limit}, unexpected(judgeMemory(full, append(measure(500, 0.6), limited))))
}

func TestRunsOfAPointBecomeTheirMedian(t *testing.T) {
	var rows []row
	for run, goodput := range []float64{300, 100, 200, math.NaN()} {
		r := first(nil, nil)
		r.mode, r.run, r.load, r.goodput = modeSync, run+1, 500, goodput
		rows = append(rows, r)
	}
	rows[1].note = "disturbed"
	middle := medians(rows)
	require.Len(t, middle, 1)
	require.InDelta(t, 200, middle[0].goodput, 0)
	require.Equal(t, "run 2: disturbed", middle[0].note)
	require.True(t, math.IsNaN(middle[0].saved))
	result := partResult{rows: rows, medians: middle}
	require.Equal(t, []xy{{x: 500, y: 200, low: 100, high: 300, noted: true}},
		result.curve(modeSync, "", func(r *row) *float64 { return &r.load }, func(r *row) *float64 { return &r.goodput }))
}

// disturbed is part overload with a note on the limited point at twice the capacity, which was measured twice.
func disturbed() result {
	result := fixed()
	p := &result.Parts[0]
	p.rows = recorded(func(mode string, load float64, r *row) {
		r.tries = 1
		if mode == modeSyncLimit && load == 800 {
			r.note, r.tries = "3.5 % of the orders were begun late", 2
		}
	})
	p.medians = medians(p.rows)
	p.verdicts = judgeOverload(result.plan, p.medians)
	return result
}

func TestWhatRestsOnAPointWithANoteIsMarkedEverywhere(t *testing.T) {
	result := disturbed()
	page, err := result.html(nil)
	require.NoError(t, err)
	var stdout bytes.Buffer
	require.NoError(t, result.conclude(&stdout), "it is no failure")
	const (
		told     = "392/s † (rests on sync-limit 800/s)"
		footnote = "† sync-limit 800/s: 3.5 % of the orders were begun late"
	)
	markdown := string(result.markdown())
	require.Contains(t, markdown, "| ok | synchronous goodput at twice the capacity with a limit | "+told+" | at least 320/s")
	require.Contains(t, markdown, "| sync-limit † | 800 |")
	require.Contains(t, markdown, footnote)
	require.Contains(t, string(page), told)
	require.Contains(t, string(page), footnote)
	require.Contains(t, stdout.String(), "ok  synchronous goodput at twice the capacity with a limit: "+told+" (expected: at least 320/s")
	require.Equal(t, 1, strings.Count(stdout.String(), "rests on"), "other checks have other points")
	for _, remark := range []string{"Measurements with a note, which says why not to trust them in full: 1 of 15.", "Measured a second time, since they had a note the first time: 1 of 15."} {
		require.Contains(t, stdout.String(), remark)
		require.Contains(t, markdown, remark)
		require.Contains(t, string(page), remark)
	}
}

func TestAPointWithANoteIsDrawnHollow(t *testing.T) {
	undisturbed, result := fixed(), disturbed()
	for i, c := range overloadCharts(result.plan, result.Parts[0]) {
		picture, err := c.render(themes[0])
		require.NoError(t, err)
		same, err := overloadCharts(undisturbed.plan, undisturbed.Parts[0])[i].render(themes[0])
		require.NoError(t, err)
		require.Equal(t, c.name == "overload-backlog", bytes.Equal(picture, same), c.name)
		entries := len(c.legend(themes[0])) - len(c.lines)
		require.Equal(t, c.name == "overload-backlog", entries == 0, "the legend says what it means: %s", c.name)
	}
}

func TestMarksThatAReaderWouldHaveChosen(t *testing.T) {
	labels := func(k ticks, low, high float64) string {
		var labels []string
		for _, mark := range k.Ticks(low, high) {
			labels = append(labels, mark.Label)
		}
		return strings.Join(labels, " ")
	}
	require.Equal(t, "0 200 400 600 800 1,000 1,200", labels(ticks{}, 0, 1200))
	require.Equal(t, "0 0.1 0.2 0.3 0.4 0.5 0.6", labels(ticks{}, 0, 0.63))
	require.Equal(t, "0 50,000 100,000 150,000 200,000 250,000 300,000", labels(ticks{}, 0, 336000))
	require.Equal(t, "1 10 100 1,000", labels(ticks{log: true}, 1, 1000))
	require.Equal(t, "10 3,000", labels(ticks{at: []float64{10, 3000}}, 10, 3000))
}

// fixed is a result whose every byte is known.
func fixed() result {
	cfg := DefaultConfig()
	cfg.Quick, cfg.Parts = true, []string{"overload"}
	m := machine{System: "plan9/mips", Processor: "A processor", Kernel: "1.2", Go: "go1.26", Cores: 2, MemoryMiB: 2048, Load: "0.01 0.02 0.03",
		Taken: 0.01, Stolen: 0, Lag: time.Millisecond, Answers: 15000, Workers: fullWorkers}
	p := newPlan(cfg, m)
	rows := recorded()
	done := partResult{part: overload(), rows: rows, medians: medians(rows), series: []instant{
		{part: "overload", mode: modeAsync, run: 1, load: 800, t: 1, offered: 800, accepted: 800, goodput: 800, saved: 390, backlog: 410, p50: 1.1, p99: math.NaN()},
		{part: "overload", mode: modeAsync, run: 1, load: 800, t: 2, offered: 800, accepted: 800, goodput: 800, saved: 392, backlog: 818, p50: 1.1, p99: 1.9},
	}}
	done.verdicts = judgeOverload(p, done.medians)
	return result{Config: cfg, plan: p, Machine: m, Version: "1.0", Command: "sluice experiment overload --quick", Broker: BrokerGoChannel,
		Started: time.Date(2026, 11, 22, 10, 0, 0, 0, time.UTC), Took: 50 * time.Second, Parts: []partResult{done}}
}

func TestTheFilesOfAResult(t *testing.T) {
	dir := t.TempDir()
	result := fixed()
	require.NoError(t, result.write(dir))

	for _, name := range []string{"overload.csv", "overload_series.csv", "results-overload.md"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		golden := filepath.Join("testdata", name)
		if *update {
			require.NoError(t, os.WriteFile(golden, got, 0o644))
		}
		want, err := os.ReadFile(golden)
		require.NoError(t, err)
		require.Equal(t, string(want), string(got), name)
	}

	plots, err := filepath.Glob(filepath.Join(dir, "*.png"))
	require.NoError(t, err)
	require.Len(t, plots, 6, "three plots in two themes")
	for _, name := range plots {
		file, err := os.ReadFile(name)
		require.NoError(t, err)
		picture, err := png.Decode(bytes.NewReader(file))
		require.NoError(t, err)
		require.Greater(t, picture.Bounds().Dx(), 900)
	}
}

func TestAReportOfAllPartsIsNotReplacedByOneOfSome(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"report.html", "results.md"} {
		require.NoError(t, os.WriteFile(filepath.Join(dir, name), []byte("of all parts"), 0o600))
	}
	result := fixed()
	result.Parts = append(result.Parts, partResult{part: stall()})
	require.NoError(t, result.write(dir))
	for name, want := range map[string]string{"report.html": "of all parts", "results.md": "of all parts",
		"report-overload-stall.html": "<!DOCTYPE html>", "results-overload-stall.md": "`report-overload-stall.html`"} {
		got, err := os.ReadFile(filepath.Join(dir, name))
		require.NoError(t, err)
		require.Contains(t, string(got), want, name)
	}
	var stdout bytes.Buffer
	require.NoError(t, result.conclude(&stdout))
	require.Contains(t, stdout.String(), "report-overload-stall.html")

	result.Parts = nil
	for _, part := range parts() {
		result.Parts = append(result.Parts, partResult{part: part})
	}
	require.NoError(t, result.write(dir))
	got, err := os.ReadFile(filepath.Join(dir, "report.html"))
	require.NoError(t, err)
	require.Contains(t, string(got), "<!DOCTYPE html>", "a report of all parts replaces one of all parts")
}

func TestTheReportHasEveryPlotAndAsksForNothingFromOutside(t *testing.T) {
	dir := t.TempDir()
	result := fixed()
	require.NoError(t, result.write(dir))
	page, err := os.ReadFile(filepath.Join(dir, "report-overload.html"))
	require.NoError(t, err)
	text := string(page)
	require.Equal(t, 6, strings.Count(text, "data:image/png;base64,"))
	text = regexp.MustCompile(`base64,[^"]+`).ReplaceAllString(text, "")
	require.NotRegexp(t, `(?i)//[a-z]`, text)
	require.NotRegexp(t, `<(script|link|iframe)`, text)
	for _, part := range result.Parts {
		for _, v := range part.verdicts {
			require.Contains(t, text, v.Name)
		}
		require.Contains(t, text, part.caveats(result.plan)[0])
	}
	for _, fact := range []string{"A processor, 2 cores", "2026-11-22 10:00 UTC", "sluice experiment overload --quick"} {
		require.Contains(t, text, fact)
	}
}

func TestEveryPartDrawsWhatWasTooShortToMeasure(t *testing.T) {
	p := quickPlan()
	for _, part := range p.parts() {
		result := partResult{part: part}
		require.NotEmpty(t, part.caveats(p))
		for _, c := range part.charts(p, result) {
			_, err := c.render(themes[0])
			require.NoError(t, err, c.name)
		}
		require.NotEmpty(t, part.tables(p, nil))
	}
}

func TestTheVerdictsArePrintedAndOneThatIsNotSoIsAnError(t *testing.T) {
	var stdout bytes.Buffer
	result := fixed()
	require.NoError(t, result.conclude(&stdout))
	require.Contains(t, stdout.String(), "  ok  synchronous goodput at twice the capacity: 0/s (expected: at most 40/s, 10 % of the capacity)\n")
	result.Parts[0].verdicts[0].OK = false
	err := result.conclude(&stdout)
	require.ErrorIs(t, err, ErrShape)
	require.ErrorContains(t, err, "1 of 9 checks failed")
}
