package e2e

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	code := m.Run()
	http.DefaultClient.CloseIdleConnections()
	client.CloseIdleConnections()
	if binaries.dir != "" {
		_ = os.RemoveAll(binaries.dir) // a temporary directory
	}
	// Some tests live with requests that fail; no test lives with these.
	if faults := contract.faults(); len(faults) > 0 {
		fmt.Fprintf(os.Stderr, "answers that modules/intake/openapi.yaml does not know:\n%s\n", strings.Join(faults, "\n"))
		code = 1
	}
	if code == 0 {
		if err := goleak.Find(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			code = 1
		}
	}
	os.Exit(code)
}

// binaries are built once for all tests.
var binaries struct {
	mu    sync.Mutex
	dir   string
	built map[bool]string
}

// binary returns the path of the gateway, built from this tree; with the race
// detector where a test is about behaviour, without where it is about numbers.
func binary(t testing.TB, race bool) string {
	t.Helper()
	binaries.mu.Lock()
	defer binaries.mu.Unlock()
	if path, ok := binaries.built[race]; ok {
		return path
	}
	if binaries.dir == "" {
		dir, err := os.MkdirTemp("", "sluice-e2e-") //nolint:usetesting // outlives this test: all tests share the binaries
		require.NoError(t, err)
		binaries.dir, binaries.built = dir, map[bool]string{}
	}
	path := filepath.Join(binaries.dir, fmt.Sprintf("sluice-race-%v", race))
	if runtime.GOOS == "windows" {
		path += ".exe"
	}
	args := []string{"build", "-o", path}
	if race {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, "sluice")...)
	out, err := cmd.CombinedOutput()
	require.NoError(t, err, "build the gateway: %s", out)
	binaries.built[race] = path
	return path
}

// process is a running gateway or stand-in backend.
type process struct {
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended
	err  error         // of Wait, after done

	mu    sync.Mutex
	lines []string      // of its log
	heard chan struct{} // closed and replaced at every line
}

// launch starts the binary. Its log is shown if the test fails.
func launch(t testing.TB, path string, env []string, args ...string) *process {
	t.Helper()
	p := &process{cmd: exec.Command(path, args...), done: make(chan struct{}), heard: make(chan struct{})}
	// The race detector would have a process linger for a second at its end.
	p.cmd.Env = append(append(os.Environ(), "GORACE=atexit_sleep_ms=0"), env...)
	logs, err := p.cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, p.cmd.Start())
	go func() {
		scanner := bufio.NewScanner(logs)
		scanner.Buffer(nil, 1<<20)
		for scanner.Scan() {
			p.mu.Lock()
			p.lines = append(p.lines, scanner.Text())
			close(p.heard)
			p.heard = make(chan struct{})
			p.mu.Unlock()
		}
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			log := p.log()
			if n := len(log); n > 8000 {
				log = log[:4000] + "\n…\n" + log[n-4000:]
			}
			t.Logf("log of %s %s:\n%s", filepath.Base(path), args[0], log)
		}
	})
	return p
}

func (p *process) log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.lines, "\n")
}

// field waits for a JSON log line with the message and returns one of its
// attributes.
func (p *process) field(t testing.TB, message, name string) string {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for seen := 0; ; {
		p.mu.Lock()
		lines, heard := p.lines, p.heard
		p.mu.Unlock()
		for ; seen < len(lines); seen++ {
			var line map[string]any
			if json.Unmarshal([]byte(lines[seen]), &line) == nil && line["msg"] == message {
				value := fmt.Sprint(line[name])
				contract.forget(value) // a port that a gateway had may be anybody's now
				return value
			}
		}
		select {
		case <-heard:
		case <-p.done:
			require.FailNow(t, "the process ended", "while waiting for %q: %v\n%s", message, p.err, p.log())
		case <-deadline:
			require.FailNow(t, "no such log line", "%q\n%s", message, p.log())
		}
	}
}

// kill ends the process as kill -9 does, and waits for its end.
func (p *process) kill() {
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.done
}

// terminate asks the process to stop, waits, and returns its exit code.
func (p *process) terminate(t testing.TB) int {
	t.Helper()
	require.NoError(t, p.cmd.Process.Signal(syscall.SIGTERM))
	return p.exit(t)
}

// exit waits for the process's end and returns its exit code.
func (p *process) exit(t testing.TB) int {
	t.Helper()
	select {
	case <-p.done:
	case <-time.After(60 * time.Second):
		require.FailNow(t, "the process does not end", p.log())
	}
	return p.cmd.ProcessState.ExitCode()
}

// gateway is a running `sluice serve`.
type gateway struct {
	*process
	url, admin string
}

// settings are the environment of a gateway, by configuration key.
type settings map[string]string

func (s settings) env() []string {
	var env []string
	for key, value := range s {
		env = append(env, "SLUICE_"+strings.ToUpper(strings.ReplaceAll(key, ".", "_"))+"="+value)
	}
	return env
}

// serve starts a gateway on free ports and waits until it does its work. More
// settings win over those of the home and of the tests; names that begin with
// OTEL_ are passed on as they are.
func serve(t testing.TB, race bool, h home, more settings) *gateway {
	t.Helper()
	p := launchServe(t, race, h, more)
	public, admin := p.field(t, "ready", "addr"), p.field(t, "ready", "admin_addr")
	contract.watch(public, admin)
	return &gateway{process: p, url: "http://" + public, admin: "http://" + admin}
}

// launchServe is serve without waiting, and with more arguments.
func launchServe(t testing.TB, race bool, h home, more settings, args ...string) *process {
	t.Helper()
	all := settings{"http.addr": "127.0.0.1:0", "http.admin_addr": "127.0.0.1:0", "log.format": "json"}
	maps.Copy(all, h.settings)
	maps.Copy(all, more)
	var env []string
	maps.DeleteFunc(all, func(key, value string) bool {
		if !strings.HasPrefix(key, "OTEL_") {
			return false
		}
		env = append(env, key+"="+value)
		return true
	})
	return launch(t, binary(t, race), append(env, all.env()...), append([]string{"serve"}, args...)...)
}

// standIn is a running `sluice backend`.
type standIn struct {
	*process
	url string
}

// backendStats is GET /stats of the stand-in.
type backendStats struct {
	Requests    int `json:"requests"`
	Orders      int `json:"orders"`
	Repeats     int `json:"repeats"`
	InFlight    int `json:"inFlight"`
	MaxInFlight int `json:"maxInFlight"`
	Rejected    int `json:"rejected"`
	Failed      int `json:"failed"`
}

// backend starts a stand-in on a free port.
func backend(t testing.TB, args ...string) *standIn {
	t.Helper()
	return backendAt(t, "127.0.0.1:0", args...)
}

// backendAt starts a stand-in on that address.
func backendAt(t testing.TB, addr string, args ...string) *standIn {
	t.Helper()
	p := launch(t, binary(t, false), nil, append([]string{"backend", "--addr", addr}, args...)...)
	listens := p.text(t, "addr=")
	contract.forget(listens) // which a gateway may have had
	return &standIn{process: p, url: "http://" + listens}
}

// text waits for a log line in text format with the given attribute, and
// returns its value.
func (p *process) text(t testing.TB, prefix string) string {
	t.Helper()
	deadline := time.After(30 * time.Second)
	for {
		p.mu.Lock()
		lines, heard := p.lines, p.heard
		p.mu.Unlock()
		for _, line := range lines {
			for _, word := range strings.Fields(line) {
				if value, ok := strings.CutPrefix(word, prefix); ok {
					return strings.Trim(value, `"`)
				}
			}
		}
		select {
		case <-heard:
		case <-p.done:
			require.FailNow(t, "the process ended", p.log())
		case <-deadline:
			require.FailNow(t, "no such log line", p.log())
		}
	}
}

func (b *standIn) ordersURL() string { return b.url + "/orders" }

func (b *standIn) stats(t testing.TB) backendStats {
	t.Helper()
	var s backendStats
	getJSON(t, b.url+"/stats", &s)
	return s
}

// control changes knobs of the stand-in while it runs.
func (b *standIn) control(t testing.TB, knobs string) {
	t.Helper()
	res := do(t, http.MethodPut, b.url+"/control", knobs, nil)
	require.Equal(t, http.StatusOK, res.status, string(res.body))
}

// client keeps as many connections as the busiest test needs.
var client = &http.Client{
	Timeout:       60 * time.Second,
	Transport:     checked{&http.Transport{MaxIdleConns: 512, MaxIdleConnsPerHost: 512}},
	CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
}

// answer is a whole HTTP answer.
type answer struct {
	status int
	header http.Header
	body   []byte
}

// order is the order resource of the contract.
type order struct {
	ID            string          `json:"id"`
	OrderNumber   *string         `json:"orderNumber"`
	Status        string          `json:"status"`
	Attempts      int             `json:"attempts"`
	AcceptedAt    time.Time       `json:"acceptedAt"`
	UpdatedAt     time.Time       `json:"updatedAt"`
	FinishedAt    *time.Time      `json:"finishedAt"`
	NextAttemptAt *time.Time      `json:"nextAttemptAt"`
	QueuePosition *int64          `json:"queuePosition"`
	Completion    *time.Time      `json:"estimatedCompletion"`
	TraceID       string          `json:"traceId"`
	Backend       *backendAnswer  `json:"backend"`
	Problem       json.RawMessage `json:"problem"`
	Links         struct {
		Self string `json:"self"`
	} `json:"links"`
}

type backendAnswer struct {
	Status int             `json:"status"`
	Body   json.RawMessage `json:"body"`
}

// problem is RFC 9457 with the members of the contract.
type problem struct {
	Type     string `json:"type"`
	Title    string `json:"title"`
	Status   int    `json:"status"`
	Detail   string `json:"detail"`
	Instance string `json:"instance"`
	Order    string `json:"order"`
	Errors   []struct {
		Pointer string `json:"pointer"`
		Detail  string `json:"detail"`
	} `json:"errors"`
	Backend json.RawMessage `json:"backend"`
}

// try sends a request and reads the whole answer.
func try(ctx context.Context, method, url, body string, header map[string]string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, method, url, strings.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	for name, value := range header {
		req.Header.Set(name, value)
	}
	res, err := client.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	data, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, data}, err
}

func do(t testing.TB, method, url, body string, header map[string]string) answer {
	t.Helper()
	a, err := try(context.Background(), method, url, body, header)
	require.NoError(t, err)
	return a
}

func getJSON(t testing.TB, url string, into any) answer {
	t.Helper()
	a := do(t, http.MethodGet, url, "", nil)
	require.Equal(t, http.StatusOK, a.status, string(a.body))
	require.NoError(t, json.Unmarshal(a.body, into), string(a.body))
	return a
}

func (a answer) order(t testing.TB) order {
	t.Helper()
	var o order
	require.NoError(t, json.Unmarshal(a.body, &o), string(a.body))
	return o
}

// problem checks what every problem document must have, and returns it.
func (a answer) problem(t testing.TB, status int, name string) problem {
	t.Helper()
	require.Equal(t, status, a.status, string(a.body))
	require.Equal(t, "application/problem+json", a.header.Get("Content-Type"))
	var p problem
	require.NoError(t, json.Unmarshal(a.body, &p), string(a.body))
	require.Equal(t, "/problems/"+name, p.Type)
	require.Equal(t, status, p.Status)
	require.NotEmpty(t, p.Title)
	return p
}

// body returns a valid order.
func body(number string) string {
	return fmt.Sprintf(`{"orderNumber":%q,"customerId":"c-1","currency":"EUR","items":[{"sku":"tea","quantity":2,"unitPrice":4.5}]}`, number)
}

// jsonHeader returns the headers of an order, with more name, value pairs.
func jsonHeader(more ...string) map[string]string {
	h := map[string]string{"Content-Type": "application/json"}
	for i := 0; i+1 < len(more); i += 2 {
		h[more[i]] = more[i+1]
	}
	return h
}

// post submits an order.
func (g *gateway) post(t testing.TB, order string, header ...string) answer {
	t.Helper()
	return do(t, http.MethodPost, g.url+"/orders", order, jsonHeader(header...))
}

// accept submits an order that must be accepted, and returns it.
func (g *gateway) accept(t testing.TB, number string, header ...string) order {
	t.Helper()
	a := g.post(t, body(number), header...)
	require.Equal(t, http.StatusAccepted, a.status, string(a.body))
	o := a.order(t)
	require.Equal(t, "/orders/"+o.ID, a.header.Get("Location"))
	return o
}

// get reads an order.
func (g *gateway) get(t testing.TB, id string) order {
	t.Helper()
	var o order
	getJSON(t, g.url+"/orders/"+id, &o)
	return o
}

// await holds on until the order has one of the states, at most a minute.
func (g *gateway) await(t testing.TB, id string, states ...string) order {
	t.Helper()
	var o order
	eventually(t, time.Minute, func() bool {
		o = g.get(t, id)
		for _, state := range states {
			if o.Status == state {
				return true
			}
		}
		return false
	}, "order %s is not %v", id, states)
	return o
}

// status is GET /admin/status.
type status struct {
	Backlog              int     `json:"backlog"`
	OldestWaitingSeconds float64 `json:"oldestWaitingSeconds"`
	InFlight             int     `json:"inFlight"`
	Limit                int     `json:"limit"`
	Rates                struct {
		Accepted float64 `json:"accepted"`
		Saved    float64 `json:"saved"`
	} `json:"rates"`
	Broker struct {
		Name  string `json:"name"`
		State string `json:"state"`
	} `json:"broker"`
	Dispatch struct {
		State string `json:"state"`
	} `json:"dispatch"`
}

func (g *gateway) status(t testing.TB) status {
	t.Helper()
	var s status
	getJSON(t, g.admin+"/admin/status", &s)
	return s
}

// drained waits until no order is waiting.
func (g *gateway) drained(t testing.TB, within time.Duration) {
	t.Helper()
	eventually(t, within, func() bool { return g.status(t).Backlog == 0 }, "the backlog is not empty")
}

// eventually asks again and again, without a pause that a test would have to
// be patient for, and fails after the given time.
func eventually(t testing.TB, within time.Duration, condition func() bool, message string, args ...any) {
	t.Helper()
	deadline := time.NewTimer(within)
	defer deadline.Stop()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if condition() {
			return
		}
		select {
		case <-tick.C:
		case <-deadline.C:
			require.FailNow(t, "not within "+within.String(), fmt.Sprintf(message, args...))
		}
	}
}

// flood submits n orders from the given number of connections, and returns the
// ids of those that got a 202, by order number, and the errors of the others.
func (g *gateway) flood(ctx context.Context, connections, n int, number func(int) string) (map[string]string, error) {
	var (
		mu    sync.Mutex
		ids   = make(map[string]string, n)
		wg    sync.WaitGroup
		next  = make(chan int)
		fails []error
	)
	for range connections {
		wg.Go(func() {
			for i := range next {
				a, err := try(ctx, http.MethodPost, g.url+"/orders", body(number(i)), jsonHeader())
				var o order
				if err == nil && a.status != http.StatusAccepted {
					err = fmt.Errorf("order %s: status %d: %s", number(i), a.status, a.body)
				}
				if err == nil {
					err = json.Unmarshal(a.body, &o)
				}
				mu.Lock()
				if err != nil {
					fails = append(fails, err)
				} else {
					ids[number(i)] = o.ID
				}
				mu.Unlock()
			}
		})
	}
	for i := range n {
		select {
		case next <- i:
		case <-ctx.Done():
		}
	}
	close(next)
	wg.Wait()
	return ids, errors.Join(fails...)
}

// residentMemory returns the resident set of a process in bytes (Linux).
func residentMemory(t testing.TB, p *process) int64 {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	require.NoError(t, err)
	for line := range bytes.Lines(data) {
		var kib int64
		if _, err := fmt.Sscanf(string(line), "VmRSS: %d kB", &kib); err == nil {
			return kib << 10
		}
	}
	require.FailNow(t, "no VmRSS")
	return 0
}
