package load_test

import (
	"bufio"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sluice/e2e/load"
)

// asServer is set for the process that is the server of the benchmarks: the CPU time of the generator is its own.
const asServer = "LOAD_TEST_AS_SERVER"

// serveKnown is that server. It prints its address, and ends with its standard input.
func serveKnown() error {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	fmt.Println(listener.Addr())
	mux := http.NewServeMux()
	mux.HandleFunc("GET /served", servedShares)
	mux.HandleFunc("/", knownLatency)
	server := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() { _ = server.Serve(listener) }() // the process ends, not the server
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

var firstRequest = sync.OnceValue(time.Now)

// knownLatency takes as long as the path says: /constant/50ms, /exponential/50ms (the mean), or /stall/1s, which takes 10 ms
// and stops for as long as it says, 4 s after the first request.
func knownLatency(_ http.ResponseWriter, r *http.Request) {
	age := time.Since(firstRequest())
	_, kind, _ := strings.Cut(r.URL.Path, "/")
	kind, value, _ := strings.Cut(kind, "/")
	d, err := time.ParseDuration(value)
	if err != nil {
		panic(err)
	}
	switch kind {
	case "exponential":
		d = time.Duration(rand.ExpFloat64() * float64(d))
	case "stall":
		over := 4*time.Second + d
		if d = 10 * time.Millisecond; age >= 4*time.Second && age < over {
			d += over - age
		}
	}
	began := time.Now()
	<-time.After(d)
	served.Lock()
	defer served.Unlock()
	served.took = append(served.took, time.Since(began))
}

// served is how long requests took by the server's own clock: its timers are not exact either.
var served struct {
	sync.Mutex
	took []time.Duration
}

// servedShares answers with the quantiles of that, in milliseconds.
func servedShares(w http.ResponseWriter, _ *http.Request) {
	served.Lock()
	defer served.Unlock()
	slices.Sort(served.took)
	for _, share := range shares {
		_, _ = fmt.Fprintln(w, served.took[int(share*float64(len(served.took)-1))].Seconds()*1000)
	}
}

var shares = []float64{0.5, 0.9, 0.95, 0.99, 0.999}

// startKnown starts it and returns its URL.
func startKnown(b *testing.B) string {
	b.Helper()
	cmd := exec.CommandContext(b.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), asServer+"=1")
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	require.NoError(b, err)
	stdout, err := cmd.StdoutPipe()
	require.NoError(b, err)
	require.NoError(b, cmd.Start())
	b.Cleanup(func() {
		_ = stdin.Close() // which ends it
		_ = cmd.Wait()    // whatever it says, it was only the server
	})
	address, err := bufio.NewReader(stdout).ReadString('\n')
	require.NoError(b, err)
	return "http://" + strings.TrimSpace(address)
}

// ownShares asks the server what it has measured itself.
func ownShares(b *testing.B, server string) []float64 {
	b.Helper()
	response, err := (&http.Client{Timeout: time.Minute}).Get(server + "/served")
	require.NoError(b, err)
	defer response.Body.Close()
	own := make([]float64, len(shares))
	for i := range own {
		_, err := fmt.Fscanln(response.Body, &own[i])
		require.NoError(b, err)
	}
	return own
}

// BenchmarkKnown measures servers of known behaviour over a real network interface and logs how far the result is from
// what they measured themselves, and from theory, with the CPU time that an order costs the generator: go test -run '^$' -bench Known -benchtime 1x ./e2e/load.
// The fake clock's tests ask for 2 %; what a real machine adds, on a quiet one, is what is to be seen here.
func BenchmarkKnown(b *testing.B) {
	exponential := func(share float64) float64 { return -50 * math.Log(1-share) }
	// An eighth of the orders comes while the server stands still, and waits evenly from 10 ms to 1,010 ms.
	stalled := func(share float64) float64 { return 10 + max(0, 1-8*(1-share))*1000 }
	for _, bench := range []struct {
		path     string
		plan     string
		arrivals string
		ms       func(share float64) float64
	}{
		{"/constant/50ms", "500/s:10s", load.Constant, func(float64) float64 { return 50 }},
		{"/constant/50ms", "5000/s:10s", load.Constant, func(float64) float64 { return 50 }},
		{"/exponential/50ms", "1000/s:10s", load.Poisson, exponential},
		{"/stall/1s", "1000/s:8s", load.Constant, stalled},
	} {
		b.Run(strings.Trim(strings.ReplaceAll(bench.path, "/", "-"), "-")+"_"+strings.ReplaceAll(bench.plan, "/s:", "-a-second-"), func(b *testing.B) {
			server := startKnown(b)
			for range b.N {
				cfg := load.DefaultConfig()
				cfg.URL, cfg.Plan, cfg.Arrivals = server+bench.path, plan(b, bench.plan), bench.arrivals
				r, err := load.Run(b.Context(), cfg, load.Deps{})
				require.NoError(b, err)
				require.NotNil(b, r.LatencyMS, r.Errors)
				middle, worst := 0.0, 0.0
				own := ownShares(b, server)
				for i, ms := range []float64{r.LatencyMS.P50, r.LatencyMS.P90, r.LatencyMS.P95, r.LatencyMS.P99, r.LatencyMS.P999} {
					off := 100 * (ms/own[i] - 1)
					b.Logf("p%-5s %8.2f ms; by the server's clock %8.2f ms: %+.1f %%; in theory %8.2f ms: %+.1f %%", strconv.FormatFloat(100*shares[i], 'f', -1, 64),
						ms, own[i], off, bench.ms(shares[i]), 100*(ms/bench.ms(shares[i])-1))
					worst = max(worst, math.Abs(off))
					if i == 0 {
						middle = off
					}
				}
				b.Logf("late: %+v; trustworthy: %v %s", r.Late, r.Trustworthy, r.Why)
				b.ReportMetric(middle, "%off-median")
				b.ReportMetric(worst, "%off-worst")
				b.ReportMetric(r.CPUSeconds*1e6/float64(r.Attempts), "us-cpu/order")
				b.ReportMetric(r.CPUSeconds/(r.MeasuredSeconds+r.DrainSeconds), "cores")
				b.ReportMetric(r.Late.MeanMS, "ms-late")
			}
		})
	}
}
