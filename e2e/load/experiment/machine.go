package experiment

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// machine is what the experiment ran on, and how fit it was for that.
type machine struct {
	System, Processor, Kernel, Go string
	Cores                         int
	MemoryMiB                     int // 0 if the system does not tell
	Load                          string

	// What was found before the first point: how much of the processors others took, and what the hypervisor kept back
	// (NaN where the system does not tell), how much later than asked for a timer rang (99th percentile), and how many
	// answers a second an idle stand-in gives.
	Taken, Stolen float64
	Lag           time.Duration
	Answers       float64

	Workers int      // of the backend in parts overload and stall
	Taking  float64  // orders a second that the gateway of part memory takes; 0 if that is not measured
	Busy    []string // why the results are not to be trusted; empty on a machine that is fit
}

// When a machine is too busy. The limits are far from what an idle one shows (1 %, 0, 1 ms and 15,000), and far from
// where the results begin to change.
const (
	mostTaken    = 0.20
	mostStolen   = 0.05
	mostLag      = 20 * time.Millisecond
	fewestAnswer = 1500
)

// fullWorkers are the workers of the backend on a machine that answers at least fullAnswers requests a second: the most
// load of the experiment is then a sixth of that, of which each order takes three to four.
const (
	fullWorkers = 20
	fullAnswers = 7200
	leastWorker = 5
)

// mostLooks is how often the machine is looked at until it is quiet.
const mostLooks = 10

// probeTime is how long each of the two probes takes.
const probeTime = time.Second

// calibrate looks at the machine, and refuses one that is too busy unless it is forced.
func calibrate(ctx context.Context, b *bench, cfg Config, progress *progress) (machine, error) {
	m := describeMachine()
	// What has just ended, such as a build, may still be felt for some seconds.
	for range mostLooks {
		m.look(ctx)
		if len(m.unrest()) == 0 || ctx.Err() != nil {
			break
		}
	}
	if err := m.probe(ctx, b); err != nil {
		return m, err
	}
	m.judge()
	if err := errors.Join(m.admit(cfg, progress), ctx.Err()); err != nil || !cfg.has("memory") {
		return m, err
	}
	var err error
	if m.Taking, err = probeMemory(ctx, b); err == nil {
		progress.say("a gateway with one processor takes %.0f orders of 16 KiB a second\n", m.Taking)
	}
	return m, err
}

// admit tells what was found, and refuses a busy machine unless it is forced.
func (m *machine) admit(cfg Config, progress *progress) error {
	progress.say("%s, %d cores; others take %s of them, timers are %s late, an idle backend answers %.0f times a second\n",
		m.Processor, m.Cores, percent(m.Taken), m.Lag.Round(10*time.Microsecond), m.Answers)
	if len(m.Busy) > 0 && !cfg.Force {
		return fmt.Errorf("%w: %s; wait until it is quiet, or measure with --force, which marks the results", ErrBusy, strings.Join(m.Busy, "; "))
	}
	return nil
}

// unrest is what else goes on.
func (m *machine) unrest() []string {
	var found []string
	fault := func(is bool, format string, args ...any) {
		if is {
			found = append(found, fmt.Sprintf(format, args...))
		}
	}
	fault(m.Taken > mostTaken, "other processes take %.0f %% of the processors (at most %.0f %%)", 100*m.Taken, 100*mostTaken)
	fault(m.Stolen > mostStolen, "the hypervisor keeps back %.0f %% of the processors (at most %.0f %%)", 100*m.Stolen, 100*mostStolen)
	fault(m.Lag > mostLag, "timers are %s late (at most %s)", m.Lag.Round(time.Millisecond), mostLag)
	return found
}

// judge says what is wrong with the machine, and how large a backend it can bear.
func (m *machine) judge() {
	m.Busy = m.unrest()
	if m.Answers < fewestAnswer {
		m.Busy = append(m.Busy, fmt.Sprintf("an idle backend answers %.0f times a second (at least %d)", m.Answers, fewestAnswer))
	}
	m.Workers = min(fullWorkers, max(leastWorker, int(fullWorkers*m.Answers/fullAnswers)))
}

// look waits and sees what others do meanwhile.
func (m *machine) look(ctx context.Context) {
	before, ok := readProcessorTimes()
	m.Lag = timerLag(ctx, probeTime)
	after, stillOK := readProcessorTimes()
	m.Taken, m.Stolen = math.NaN(), math.NaN()
	if all := after.all - before.all; ok && stillOK && all > 0 {
		m.Taken, m.Stolen = 1-(after.idle-before.idle)/all, (after.stolen-before.stolen)/all
	}
}

// timerLag is how much later than after a millisecond a timer rings: the 99th percentile.
func timerLag(ctx context.Context, length time.Duration) time.Duration {
	const wait = time.Millisecond
	timer := time.NewTimer(wait)
	defer timer.Stop()
	var lags []time.Duration
	for began, asked := time.Now(), time.Now(); time.Since(began) < length; {
		select {
		case <-timer.C:
		case <-ctx.Done():
			return 0
		}
		now := time.Now()
		lags = append(lags, now.Sub(asked)-wait)
		asked = now
		timer.Reset(wait)
	}
	slices.Sort(lags)
	return lags[len(lags)*99/100]
}

// probe asks a stand-in that has nothing else to do, as fast as it answers.
func (m *machine) probe(ctx context.Context, b *bench) error {
	standIn, err := b.startStandIn(ctx, []string{"--latency", "0s"})
	if err != nil {
		return err
	}
	defer standIn.stop()
	values, err := standIn.attributes(ctx, standInReady, "addr")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, probeTime)
	defer cancel()
	transport := &http.Transport{MaxIdleConnsPerHost: 64}
	defer transport.CloseIdleConnections()
	var answers atomic.Int64
	var clients sync.WaitGroup
	errs := make([]error, 32)
	began := time.Now()
	for i := range errs {
		clients.Go(func() { errs[i] = ask(ctx, transport, "http://"+values[0]+"/orders", strconv.Itoa(i), &answers) })
	}
	clients.Wait()
	m.Answers = float64(answers.Load()) / time.Since(began).Seconds()
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("ask an idle backend: %w", err)
	}
	return nil
}

// ask sends orders one after the other until ctx ends.
func ask(ctx context.Context, transport http.RoundTripper, url, name string, answers *atomic.Int64) error {
	for i := 0; ctx.Err() == nil; i++ {
		body := []byte(`{"orderNumber":"` + name + "-" + strconv.Itoa(i) + `"}`)
		request, err := http.NewRequestWithContext(ctx, http.MethodPost, url, bytes.NewReader(body))
		if err != nil {
			return err
		}
		response, err := transport.RoundTrip(request)
		if ctx.Err() != nil {
			if err == nil {
				response.Body.Close()
			}
			return nil
		}
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, response.Body)
		response.Body.Close()
		if err == nil {
			answers.Add(1)
		}
	}
	return nil
}

func describeMachine() machine {
	m := machine{System: runtime.GOOS + "/" + runtime.GOARCH, Processor: runtime.GOARCH, Go: runtime.Version(), Cores: runtime.GOMAXPROCS(0)}
	if info, err := os.ReadFile("/proc/cpuinfo"); err == nil {
		m.Processor = value(string(info), "model name", m.Processor)
	}
	if info, err := os.ReadFile("/proc/meminfo"); err == nil {
		kib, _, _ := strings.Cut(value(string(info), "MemTotal", "0"), " ")
		n, _ := strconv.Atoi(kib) // 0 if it is not a number
		m.MemoryMiB = n / 1024
	}
	if text, err := os.ReadFile("/proc/sys/kernel/osrelease"); err == nil {
		m.Kernel = strings.TrimSpace(string(text))
	}
	if text, err := os.ReadFile("/proc/loadavg"); err == nil {
		m.Load = strings.Join(strings.Fields(string(text))[:3], " ")
	}
	return m
}

// value returns what stands behind a name and a colon in the first line that begins so.
func value(text, name, otherwise string) string {
	for line := range strings.Lines(text) {
		if before, after, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(before) == name {
			return strings.TrimSpace(after)
		}
	}
	return otherwise
}

// processorTimes are those of all processors together, in ticks since the start of the system.
type processorTimes struct{ all, idle, stolen float64 }

// readProcessorTimes works on Linux only, and returns false elsewhere.
func readProcessorTimes() (processorTimes, bool) {
	text, err := os.ReadFile("/proc/stat")
	if err != nil {
		return processorTimes{}, false
	}
	first, _, _ := strings.Cut(string(text), "\n")
	return parseProcessorTimes(first)
}

// parseProcessorTimes reads the line "cpu user nice system idle iowait irq softirq steal …" of proc(5).
func parseProcessorTimes(line string) (processorTimes, bool) {
	fields := strings.Fields(line)
	if len(fields) < 9 || fields[0] != "cpu" {
		return processorTimes{}, false
	}
	var times processorTimes
	for i, field := range fields[1:9] {
		ticks, err := strconv.ParseFloat(field, 64)
		if err != nil {
			return processorTimes{}, false
		}
		times.all += ticks
		switch i {
		case 3, 4: // idle, and waiting for a disk
			times.idle += ticks
		case 7:
			times.stolen = ticks
		}
	}
	return times, true
}
