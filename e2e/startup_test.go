package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// command runs the binary to its end.
func command(t testing.TB, env []string, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary(t, false), args...)
	cmd.Env = append(os.Environ(), env...)
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	var exit *exec.ExitError
	if err := cmd.Run(); err != nil && !errors.As(err, &exit) {
		require.NoError(t, err, "sluice %v", args)
	}
	require.NoError(t, ctx.Err(), "sluice %v does not end", args)
	return cmd.ProcessState.ExitCode(), out.String(), errs.String()
}

// failsToStart runs a gateway that cannot start for a reason outside of its
// configuration, and returns the one line that it says.
func failsToStart(t testing.TB, s settings) string {
	t.Helper()
	all := settings{"http.addr": "127.0.0.1:0", "http.admin_addr": "127.0.0.1:0", "store.dsn": filepath.Join(t.TempDir(), "sluice.db"), "log.level": "error"}
	for key, value := range s {
		all[key] = value
	}
	code, stdout, stderr := command(t, all.env(), "serve")
	require.Equal(t, 1, code, stderr)
	require.Empty(t, stdout)
	require.Equal(t, 1, strings.Count(stderr, "\n"), "one line, and not:\n%s", stderr)
	line, ok := strings.CutPrefix(strings.TrimSpace(stderr), "sluice: ")
	require.True(t, ok, stderr)
	return line
}

func TestAGatewayThatCannotStartSaysWhyInOneLine(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = taken.Close() }() // it did its work
	addr := taken.Addr().String()
	for _, key := range []string{"http.addr", "http.admin_addr"} {
		t.Run("a port in use for "+key, func(t *testing.T) {
			line := failsToStart(t, settings{key: addr})
			require.Contains(t, line, addr)
			require.Contains(t, line, key)
			require.Contains(t, line, "another process has this port")
		})
	}

	t.Run("a database that another process has", func(t *testing.T) {
		b, dir := backend(t, "--latency", "1ms"), t.TempDir()
		g := serve(t, true, embedded(dir), fast(b))
		file := filepath.Join(dir, "sluice.db")
		line := failsToStart(t, settings{"store.dsn": file})
		require.Contains(t, line, file)
		require.Contains(t, line, "another process has it open")
		require.Contains(t, line, "store.dsn")
		g.await(t, g.accept(t, "A-1").ID, "saved")

		// What a killed process leaves behind keeps nobody out.
		g.kill()
		g = serve(t, true, embedded(dir), fast(b))
		require.Len(t, g.numbered(t, "A-1"), 1)
		require.Zero(t, g.terminate(t))
	})

	t.Run("a file in the place of the directory", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "data")
		require.NoError(t, os.WriteFile(file, nil, 0o600))
		require.Contains(t, failsToStart(t, settings{"store.dsn": filepath.Join(file, "sluice.db")}), file)
	})
	t.Run("a directory in the place of the file", func(t *testing.T) {
		dir := t.TempDir()
		require.Contains(t, failsToStart(t, settings{"store.dsn": dir}), dir)
	})
	t.Run("a directory that cannot be written", func(t *testing.T) {
		if runtime.GOOS == "windows" || os.Geteuid() == 0 {
			t.Skip("root may write everywhere, and Windows has other rights")
		}
		dir := t.TempDir()
		require.NoError(t, os.Chmod(dir, 0o500)) //nolint:gosec // it is a directory
		require.Contains(t, failsToStart(t, settings{"store.dsn": filepath.Join(dir, "sluice.db")}), "permission denied")
	})
}

func TestADamagedDatabaseIsNotStartedWith(t *testing.T) {
	b, dir := backend(t, "--latency", "1ms"), t.TempDir()
	g := serve(t, true, embedded(dir), fast(b))
	for i := range 20 {
		g.await(t, g.accept(t, fmt.Sprintf("A-%d", i)).ID, "saved")
	}
	require.Zero(t, g.terminate(t))
	whole, err := os.ReadFile(filepath.Join(dir, "sluice.db"))
	require.NoError(t, err)

	for name, data := range map[string][]byte{
		"something else":         []byte(strings.Repeat("This is no database. ", 1000)),
		"a header of nonsense":   append([]byte(strings.Repeat("x", 100)), whole[100:]...),
		"a schema of nonsense":   append(append(bytes.Clone(whole[:100]), bytes.Repeat([]byte{0xa5}, 3996)...), whole[4096:]...),
		"cut off after one page": whole[:4096],
		"cut off in a page":      whole[:len(whole)/2+1000],
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "sluice.db")
			require.NoError(t, os.WriteFile(file, data, 0o600))
			line := failsToStart(t, settings{"store.dsn": file})
			require.Contains(t, line, file)
			require.Contains(t, line, "damaged")
			require.Contains(t, line, "restore it from a backup")
			kept, err := os.ReadFile(file)
			require.NoError(t, err)
			require.Equal(t, data, kept, "whoever repairs it finds it as it was")
		})
	}
}

func TestAWrongConfigurationIsRefusedWithEveryFault(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "sluice.yaml")
	require.NoError(t, os.WriteFile(file, []byte("http:\n  adr: :1\nstore:\n  retention: 3\nbackend:\n  url: ftp://x\n  headers: {Content-Length: \"1\"}\n"), 0o600))
	data := filepath.Join(dir, "sluice.db")
	code, stdout, stderr := command(t, []string{
		"SLUICE_STORE_DSN=" + data, "SLUICE_DISPATCH_CONCURRENCY=none", "SLUICE_INTAKE_MAX_BODY=0B", "SLUICE_DISPATCH_CONCURENCY=7", "SLUICE_PUBSUB_BACKEND=carrier-pigeon",
	}, "serve", "--config", file, "--log-level", "loud", "--http-read-timeout", "1s")
	require.Equal(t, 2, code)
	require.Empty(t, stdout)
	for _, says := range []string{
		"http.adr: unknown key, did you mean http.addr?",
		"store.retention: \"3\" is not a duration",
		"backend.url: must begin with http:// or https://",
		"backend.headers.Content-Length: ",
		"dispatch.concurrency: \"none\" is not a whole number",
		"SLUICE_DISPATCH_CONCURENCY: unknown environment variable, did you mean SLUICE_DISPATCH_CONCURRENCY?",
		"intake.max_body: must be at least 1B",
		"log.level: must be debug, info, warn or error, is \"loud\" (flag --log-level)",
		"http.read_timeout: must be at least http.read_header_timeout",
		"pubsub.backend: must be one of amqp, gochannel, sql",
		file + ":2", "(environment variable SLUICE_DISPATCH_CONCURRENCY)",
	} {
		require.Contains(t, stderr, says)
	}
	require.NoFileExists(t, data, "nothing is touched")

	for name, test := range map[string]struct {
		args []string
		says string
	}{
		"an unknown command":      {[]string{"sevre"}, `unknown command "sevre"`},
		"an unknown flag":         {[]string{"serve", "--no-such-flag"}, "unknown flag: --no-such-flag"},
		"an unknown argument":     {[]string{"version", "please"}, `unknown command "please"`},
		"a flag without value":    {[]string{"serve", "--config"}, "needs an argument"},
		"a file that is not":      {[]string{"serve", "--config", filepath.Join(dir, "none.yaml")}, "none.yaml"},
		"a module by itself":      {[]string{"serve", "--modules", "intake", "--pubsub-backend", "gochannel"}, "pubsub.backend: gochannel cannot leave the process"},
		"the other by itself":     {[]string{"serve", "--modules", "dispatch"}, "pubsub.backend: gochannel cannot leave the process"},
		"an unknown module":       {[]string{"serve", "--modules", "intake,dispatch,billing"}, `modules: unknown module "billing"`},
		"a bad knob of a backend": {[]string{"backend", "--fail-rate", "2"}, "fail-rate"},
	} {
		t.Run(name, func(t *testing.T) {
			code, stdout, stderr := command(t, []string{"SLUICE_STORE_DSN=" + data}, test.args...)
			require.Equal(t, 2, code, stderr)
			require.Empty(t, stdout)
			require.Contains(t, stderr, test.says)
			require.NoFileExists(t, data)
		})
	}
}

func TestVersionAndConfigAreTold(t *testing.T) {
	code, stdout, stderr := command(t, nil, "version")
	require.Zero(t, code, stderr)
	require.Regexp(t, `^sluice \S+\n(commit .+\n)?go\S+ \w+/\w+\n$`, stdout)
	require.Empty(t, stderr)

	env := []string{"SLUICE_BACKEND_HEADERS=Authorization:Bearer hunter2,X-Tenant:hunter3", "SLUICE_DISPATCH_CONCURRENCY=7", "SLUICE_LOG_LEVEL=warn"}
	code, first, stderr := command(t, env, "config", "--log-level", "debug")
	require.Zero(t, code, stderr)
	require.Empty(t, stderr)
	require.NotContains(t, first, "hunter")
	require.Contains(t, first, "Authorization: <secret>")
	require.Contains(t, first, "concurrency: 7\n")
	require.Contains(t, first, "level: debug\n", "flags go before the environment")

	file := filepath.Join(t.TempDir(), "sluice.yaml")
	require.NoError(t, os.WriteFile(file, []byte(first), 0o600))
	code, again, stderr := command(t, nil, "config", "--config", file)
	require.Zero(t, code, stderr)
	require.Equal(t, first, again, "what is told can be loaded")

	code, over, stderr := command(t, []string{"SLUICE_DISPATCH_CONCURRENCY=8"}, "config", "--config", file)
	require.Zero(t, code, stderr)
	require.Equal(t, strings.Replace(first, "concurrency: 7\n", "concurrency: 8\n", 1), over, "the environment goes before the file")

	_, hidden, _ := command(t, []string{"SLUICE_BACKEND_URL=http://user:hunter4@example.test/orders"}, "config")
	require.Contains(t, hidden, "example.test")
	require.NotContains(t, hidden, "hunter")
}

func TestInterruptStopsGracefully(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a process cannot be sent an interrupt on Windows")
	}
	b := backend(t, "--latency", "200ms")
	dir := t.TempDir()
	g := serve(t, true, embedded(dir), fast(b))
	o := g.accept(t, "A-1")
	eventually(t, patience, func() bool { return b.stats(t).InFlight == 1 }, "no call")
	require.NoError(t, g.cmd.Process.Signal(os.Interrupt))
	require.Zero(t, g.exit(t))
	require.Contains(t, g.log(), `"msg":"stopped"`)
	g = serve(t, true, embedded(dir), fast(b))
	require.Equal(t, "saved", g.get(t, o.ID).Status)
	require.Equal(t, 1, b.stats(t).Requests)
	require.NoError(t, b.cmd.Process.Signal(os.Interrupt))
	require.Zero(t, b.exit(t))
}

func TestOperatorsSeeHowItGoes(t *testing.T) {
	b := backend(t, "--latency", "30s")
	g := serve(t, true, embedded(t.TempDir()), fast(b, "dispatch.concurrency", "2", "backend.timeout", "1m", "http.shutdown_timeout", "1s"))
	for i := range 5 {
		g.accept(t, fmt.Sprintf("A-%d", i))
	}
	eventually(t, patience, func() bool { return g.status(t).InFlight == 2 }, "no calls")

	require.Equal(t, http.StatusOK, do(t, http.MethodGet, g.admin+"/livez", "", nil).status)
	var ready struct {
		Status string
		Checks map[string]struct {
			Status   string
			Critical bool
		}
	}
	getJSON(t, g.admin+"/readyz", &ready)
	require.Equal(t, "ready", ready.Status)
	require.Equal(t, "ok", ready.Checks["storage"].Status)
	require.True(t, ready.Checks["storage"].Critical)
	require.Equal(t, "ok", ready.Checks["broker"].Status)
	require.False(t, ready.Checks["broker"].Critical, "orders are accepted without the broker")

	var told map[string]any
	a := getJSON(t, g.admin+"/admin/status", &told)
	require.Equal(t, "application/json", a.header.Get("Content-Type"))
	require.Subset(t, told, map[string]any{"backlog": 5.0, "inFlight": 2.0, "limit": 2.0,
		"broker": map[string]any{"name": "gochannel", "state": "ok"}, "dispatch": map[string]any{"state": "running"}})
	require.Greater(t, told["oldestWaitingSeconds"], 0.0)
	require.Contains(t, told["rates"], "accepted")
	require.Contains(t, told["rates"], "saved")

	a = do(t, http.MethodGet, g.admin+"/metrics", "", nil)
	require.Equal(t, http.StatusOK, a.status)
	require.Contains(t, a.header.Get("Content-Type"), "text/plain")
	for name, value := range map[string]string{
		`sluice_backlog`:                              "5",
		`sluice_backlog_oldest_age_seconds`:           `\S+`,
		`sluice_orders,status="accepted"`:             "5",
		`sluice_orders,status="retrying"`:             "0",
		`sluice_orders,status="saved"`:                "0",
		`sluice_orders,status="rejected"`:             "0",
		`sluice_orders,status="dead"`:                 "0",
		`sluice_orders_accepted_total`:                "5",
		`sluice_dispatch_in_flight`:                   "2",
		`sluice_dispatch_concurrency_limit`:           "2",
		`http_server_request_duration_seconds_bucket`: `\d+`,
		`go_goroutine_count`:                          `\d+`,
	} {
		name, label, _ := strings.Cut(name, ",")
		require.Regexp(t, `(?m)^`+name+`(\{[^}]*`+label+`[^}]*\})? `+value+`$`, string(a.body))
	}

	for _, path := range []string{"", "heap?debug=1", "goroutine?debug=1", "cmdline"} {
		require.Equal(t, http.StatusOK, do(t, http.MethodGet, g.admin+"/debug/pprof/"+path, "", nil).status, path)
	}
	do(t, http.MethodGet, g.admin+"/orders", "", nil).problem(t, http.StatusNotFound, "not-found")
}
