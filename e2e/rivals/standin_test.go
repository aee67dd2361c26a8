package rivals

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// idleConnections is how many connections to the stand-in are kept: one for each
// call at once, where a rival bounds them.
const idleConnections = 512

func TestMain(m *testing.M) {
	code := m.Run()
	if dir := binary.dir; dir != "" {
		_ = os.RemoveAll(dir) // a temporary directory
	}
	os.Exit(code)
}

// binary is the stand-in, built once for all benchmarks.
var binary struct {
	once sync.Once
	dir  string
	path string
	err  error
}

func buildBinary() {
	if binary.dir, binary.err = os.MkdirTemp("", "sluice-rivals-"); binary.err != nil {
		return
	}
	binary.path = filepath.Join(binary.dir, "sluice")
	if runtime.GOOS == "windows" {
		binary.path += ".exe"
	}
	cmd := exec.Command("go", "build", "-o", binary.path, "sluice")
	cmd.Dir = filepath.Join("..", "..") // the module around this one
	if out, err := cmd.CombinedOutput(); err != nil {
		binary.err = fmt.Errorf("build the stand-in: %w\n%s", err, out)
	}
}

// standIn is a running `sluice backend`.
type standIn struct {
	url    string
	client *http.Client
	stop   func()
}

// stats is GET /stats of the stand-in.
type stats struct {
	Orders      int `json:"orders"`
	Repeats     int `json:"repeats"`
	MaxInFlight int `json:"maxInFlight"`
	Rejected    int `json:"rejected"`
	Failed      int `json:"failed"`
}

// startStandIn starts a backend that takes that long for an order, any number of
// them at once, on a free port. Stop ends it; the end of the benchmark does too.
func startStandIn(tb testing.TB, latency time.Duration) *standIn {
	tb.Helper()
	binary.once.Do(buildBinary)
	require.NoError(tb, binary.err)
	cmd := exec.Command(binary.path, "backend", "--addr", "127.0.0.1:0", "--latency", latency.String())
	logs, err := cmd.StderrPipe()
	require.NoError(tb, err)
	require.NoError(tb, cmd.Start())
	client := &http.Client{
		Timeout:   stuckFor,
		Transport: &http.Transport{MaxIdleConns: idleConnections, MaxIdleConnsPerHost: idleConnections},
	}
	stop := sync.OnceFunc(func() {
		client.CloseIdleConnections()
		_ = cmd.Process.Kill() // it may have ended
		_ = cmd.Wait()         // it was killed
	})
	tb.Cleanup(stop)
	return &standIn{url: "http://" + address(tb, logs), client: client, stop: stop}
}

// address reads the address from the log, and sees to it that the rest of the
// log does not fill the pipe.
func address(tb testing.TB, logs io.Reader) string {
	tb.Helper()
	found := make(chan string, 1)
	go func() {
		defer close(found)
		for scanner := bufio.NewScanner(logs); scanner.Scan(); {
			if _, addr, ok := strings.Cut(scanner.Text(), "addr="); ok {
				found <- strings.Trim(addr, `"`)
				break
			}
		}
		_, _ = io.Copy(io.Discard, logs) // ends with the process
	}()
	select {
	case addr := <-found:
		require.NotEmpty(tb, addr, "the stand-in ended")
		return addr
	case <-time.After(stuckFor):
		require.FailNow(tb, "the stand-in does not start")
		return ""
	}
}

// save posts the order, as dispatch does.
func (s *standIn) save(ctx context.Context, o order) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.url+"/orders", bytes.NewReader(o.body))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	req.Header.Set("Idempotency-Key", `"`+o.id+`"`)
	res, err := s.client.Do(req)
	if err != nil {
		return fmt.Errorf("save order %s: %w", o.id, err)
	}
	defer res.Body.Close()
	if _, err := io.Copy(io.Discard, res.Body); err != nil {
		return fmt.Errorf("save order %s: read the answer: %w", o.id, err)
	}
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("save order %s: backend answered %d", o.id, res.StatusCode)
	}
	return nil
}

func (s *standIn) stats(tb testing.TB) stats {
	tb.Helper()
	req, err := http.NewRequestWithContext(tb.Context(), http.MethodGet, s.url+"/stats", http.NoBody)
	require.NoError(tb, err)
	res, err := s.client.Do(req)
	require.NoError(tb, err)
	defer res.Body.Close()
	var got stats
	require.NoError(tb, json.NewDecoder(res.Body).Decode(&got))
	return got
}

// reach waits until that many orders are saved, or the time is up. It returns
// how many there are, and when that was.
func (s *standIn) reach(tb testing.TB, orders int, within time.Duration) (int, time.Time) {
	tb.Helper()
	deadline := time.Now().Add(within)
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		got, now := s.stats(tb).Orders, time.Now()
		if got >= orders || now.After(deadline) {
			return got, now
		}
		<-tick.C
	}
}
