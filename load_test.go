package main

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"sluice/e2e/load"
)

func TestLoadPrintsOneObject(t *testing.T) {
	url, stop := startBackend(t, "--latency", "1ms")
	code, stdout, stderr := sluice(t, "load", "--rate", "50", "--duration", "1100ms", "--warmup", "100ms", "--prefix", "X", "--json", url+"/orders")
	require.Zero(t, code, stderr)
	require.Empty(t, stderr)
	var names map[string]json.RawMessage
	require.NoError(t, json.Unmarshal([]byte(stdout), &names))
	// Others rely on these names.
	for _, name := range strings.Fields(`url mode plan arrivals connections deadline_ms retries seed warmup_seconds measured_seconds
		offered sent answered accepted goodput orders attempts statuses errors latency_ms latency_all_ms late trustworthy
		ended_early drain_seconds cpu_seconds series`) {
		require.Contains(t, names, name)
	}
	require.JSONEq(t, `{"offered":50,"good":50,"failed":0,"timed_out":0,"unfinished":0}`, string(names["orders"]))
	for object, members := range map[string]string{
		"latency_ms": "max mean min p50 p90 p95 p99 p999",
		"late":       "count mean_ms worst_ms",
	} {
		var has map[string]any
		require.NoError(t, json.Unmarshal(names[object], &has))
		require.Equal(t, strings.Fields(members), sortedKeys(has))
	}
	var series []map[string]any
	require.NoError(t, json.Unmarshal(names["series"], &series))
	require.GreaterOrEqual(t, len(series), 2)
	require.Equal(t, strings.Fields("accepted errors good in_flight offered p50_ms p99_ms sent t"), sortedKeys(series[0]))
	require.InDelta(t, 50, series[0]["offered"], 0)

	counts, err := stop()
	require.NoError(t, err)
	require.Contains(t, counts, `"requests":55,"orders":55,`, "the warm-up is sent")
}

func sortedKeys(object map[string]any) []string {
	keys := make([]string, 0, len(object))
	for key := range object {
		keys = append(keys, key)
	}
	slices.Sort(keys)
	return keys
}

func TestLoadPrintsASummary(t *testing.T) {
	url := ordersURL(t)
	code, stdout, stderr := sluice(t, "load", "--plan", "burst 20, 20/s:2s", "--arrivals", "poisson", "--deadline", "20s", "--progress", url)
	require.Zero(t, code, stderr)
	require.Contains(t, stdout, "open loop   burst 20, 20/s:2s, poisson arrivals, deadline 20s, to "+url+"\n")
	require.Contains(t, stdout, "answers   200: ")
	require.Contains(t, stderr, "   1 s  offered ")
	require.Contains(t, stderr, "  in flight ")
}

// ordersURL is that of a stand-in which is there as long as the test.
func ordersURL(t *testing.T) string {
	t.Helper()
	url, stop := startBackend(t, "--latency", "0")
	t.Cleanup(func() {
		_, err := stop()
		require.NoError(t, err)
	})
	return url + "/orders"
}

func TestLoadSendsAnOrderOfOnesOwn(t *testing.T) {
	url := ordersURL(t)
	file := filepath.Join(t.TempDir(), "order.json")
	require.NoError(t, os.WriteFile(file, []byte(`{"orderNumber":"{{number}}"}`), 0o600))
	code, stdout, stderr := sluice(t, "load", "--closed", "4", "--orders", "40", "--body", file, "--json", url)
	require.Zero(t, code, stderr)
	var result load.Result
	require.NoError(t, json.Unmarshal([]byte(stdout), &result))
	require.Equal(t, "closed", result.Mode)
	require.Equal(t, map[string]int64{"200": 40}, result.Statuses)
}

func TestLoadTellsAllFaultsOfItsCommandLine(t *testing.T) {
	code, stdout, stderr := sluice(t, "load", "--rate", "x", "--plan", "500/s:30s, foo", "--size", "1z", "--closed", "-1", "--body", "gone.json", "ftp://x")
	require.Equal(t, exitUsage, code)
	require.Empty(t, stdout)
	for _, says := range []string{
		`rate: strconv.ParseFloat: parsing "x": invalid syntax`,
		`plan: phase 2, "foo": is neither a rate`,
		`size: "1z" is not a size such as 16KiB`,
		`closed: must be 0`,
		`body: open gone.json: `,
		`url: must be a URL such as http://localhost:8080/orders, is "ftp://x"`,
	} {
		require.Contains(t, stderr, says)
	}
	code, _, stderr = sluice(t, "load", "--rate", "1", "--duration", "1s", "--header", "key", "http://localhost")
	require.Equal(t, exitUsage, code)
	require.Contains(t, stderr, `header: "key" is not a line such as`)
	code, _, stderr = sluice(t, "load", "--rate", "1", "--duration", "1s")
	require.Equal(t, exitUsage, code)
	require.Contains(t, stderr, "one URL must be given")
}

func TestLoadExitsWith1IfNobodyIsThere(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	url := "http://" + listener.Addr().String() + "/orders"
	require.NoError(t, listener.Close())
	code, stdout, stderr := sluice(t, "load", "--rate", "1", "--duration", "1h", url)
	require.Equal(t, exitFailed, code)
	require.Empty(t, stdout, "it is not tried for an hour")
	require.Contains(t, stderr, "sluice: reach "+url+": ")
}

func TestLoadThatIsInterruptedPrintsItsResult(t *testing.T) {
	url := ordersURL(t)
	ctx, cancel := context.WithCancel(t.Context())
	var stdout bytes.Buffer
	stderr := &firstWrite{seen: cancel}
	began := time.Now()
	require.Zero(t, run(ctx, []string{"load", "--rate", "20", "--duration", "1h", "--progress", "--json", url}, &stdout, stderr))
	require.Less(t, time.Since(began), time.Hour)
	var result load.Result
	require.NoError(t, json.Unmarshal(stdout.Bytes(), &result))
	require.True(t, result.EndedEarly)
	require.Positive(t, result.Orders.Good)
	require.Positive(t, result.Goodput)
}

// firstWrite calls seen when something is written.
type firstWrite struct{ seen func() }

func (w *firstWrite) Write(p []byte) (int, error) {
	w.seen()
	return len(p), nil
}
