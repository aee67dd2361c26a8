package main

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"sluice/config"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func sluice(t *testing.T, args ...string) (code int, stdout, stderr string) {
	t.Helper()
	var out, errs bytes.Buffer
	code = run(t.Context(), args, &out, &errs)
	return code, out.String(), errs.String()
}

func TestWithoutArgumentsTheCommandsAreListed(t *testing.T) {
	code, stdout, stderr := sluice(t)
	require.Zero(t, code)
	require.Empty(t, stderr)
	for _, command := range []string{"serve", "dev", "backend", "load", "ready", "key", "config", "version"} {
		require.Equal(t, 1, strings.Count(stdout, "\n  "+command+" "), "%s in:\n%s", command, stdout)
	}
}

func TestAWrongCommandLineExitsWith2(t *testing.T) {
	for _, test := range []struct {
		args []string
		says string
	}{
		{[]string{"sevre"}, `unknown command "sevre"`},
		{[]string{"version", "now"}, `unknown command "now"`},
		{[]string{"config", "--no-such-flag"}, "unknown flag: --no-such-flag"},
		{[]string{"backend", "--capacity", "-1"}, "capacity: must be 0"},
	} {
		t.Run(strings.Join(test.args, " "), func(t *testing.T) {
			code, stdout, stderr := sluice(t, test.args...)
			require.Equal(t, exitUsage, code)
			require.Empty(t, stdout)
			require.Contains(t, stderr, test.says)
			require.Contains(t, stderr, "--help")
		})
	}
}

func TestAWrongConfigurationExitsWith2AndAllItsFaults(t *testing.T) {
	t.Setenv("SLUICE_DISPATCH_CONCURRENCY", "0")
	t.Setenv("SLUICE_NONSENSE", "1")
	for _, command := range []string{"config", "serve", "dev"} {
		t.Run(command, func(t *testing.T) {
			code, stdout, stderr := sluice(t, command, "--http-read-timeout", "5")
			require.Equal(t, exitUsage, code)
			require.Empty(t, stdout)
			require.Equal(t, "sluice: configuration:\n"+
				"SLUICE_NONSENSE: unknown environment variable\n"+
				"http.read_timeout: \"5\" is not a duration such as 250ms, 30s or 5m (flag --http-read-timeout)\n"+
				"dispatch.concurrency: must be at least 1, is 0 (environment variable SLUICE_DISPATCH_CONCURRENCY)\n", stderr)
		})
	}
}

func TestAModuleAloneWithABrokerThatCannotLeaveTheProcessExitsWith2(t *testing.T) {
	code, _, stderr := sluice(t, "serve", "--modules", "dispatch", "--http-addr", "127.0.0.1:0", "--http-admin-addr", "127.0.0.1:0", "--store-driver", "memory")
	require.Equal(t, exitUsage, code)
	require.Contains(t, stderr, "pubsub.backend: gochannel cannot leave the process")
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("no space\nleft") }

func TestAFailureExitsWith1AndOneLine(t *testing.T) {
	var stderr bytes.Buffer
	require.Equal(t, exitFailed, run(t.Context(), []string{"version"}, brokenWriter{}, &stderr))
	require.Equal(t, "sluice: print version: no space; left\n", stderr.String())
}

func TestConfigPrintsWhatIsInForce(t *testing.T) {
	t.Setenv("SLUICE_BACKEND_HEADERS", "Authorization:Bearer hunter2")
	code, stdout, stderr := sluice(t, "config", "--log-level", "debug")
	require.Zero(t, code)
	require.Empty(t, stderr)
	require.Contains(t, stdout, "level: debug\n")
	require.Contains(t, stdout, "Authorization: <secret>\n")
}

func TestConfigKeysListsEveryKey(t *testing.T) {
	code, stdout, stderr := sluice(t, "config", "--keys")
	require.Zero(t, code)
	require.Empty(t, stderr)
	for _, key := range config.Keys() {
		require.Contains(t, stdout, key.Name+" ")
		require.Contains(t, stdout, " "+key.Env+" ")
	}
}

func TestKeyMakesAKeyThatItsEntryKnows(t *testing.T) {
	code, stdout, stderr := sluice(t, "key", "shop")
	require.Zero(t, code)
	require.Empty(t, stderr)
	match := regexp.MustCompile(`^key:   ([0-9a-f]{64})\nentry: (shop:[0-9a-f]{64})\n$`).FindStringSubmatch(stdout)
	require.NotNil(t, match, stdout)
	require.Equal(t, fmt.Sprintf("shop:%x", sha256.Sum256([]byte(match[1]))), match[2])

	t.Setenv("SLUICE_HTTP_API_KEYS", match[2])
	code, stdout, stderr = sluice(t, "config")
	require.Zero(t, code, stderr)
	require.Contains(t, stdout, "- shop:<secret>\n")

	code, stdout, stderr = sluice(t, "key", "my shop")
	require.Equal(t, exitFailed, code)
	require.Empty(t, stdout)
	require.Contains(t, stderr, "the name must be")
}

func TestVersionTellsWhatWasBuilt(t *testing.T) {
	code, stdout, stderr := sluice(t, "version")
	require.Zero(t, code)
	require.Empty(t, stderr)
	require.True(t, strings.HasPrefix(stdout, "sluice "+buildVersion()+"\n"), stdout)
	require.Contains(t, stdout, runtime.Version()+" "+runtime.GOOS+"/"+runtime.GOARCH+"\n")
}

func TestSignals(t *testing.T) {
	if runtime.GOOS == "windows" {
		t.Skip("a process cannot send itself a signal on Windows")
	}
	self, err := os.FindProcess(os.Getpid())
	require.NoError(t, err)

	for _, test := range []struct {
		name   string
		signal os.Signal
		code   int
	}{
		{"SIGINT", os.Interrupt, 130},
		{"SIGTERM", syscall.SIGTERM, 143},
	} {
		t.Run(test.name, func(t *testing.T) {
			exits := make(chan int, 1)
			ctx, stop := untilSignal(t.Context(), func(code int) { exits <- code })
			defer stop()
			require.NoError(t, ctx.Err())

			require.NoError(t, self.Signal(test.signal))
			receive(t, ctx.Done())
			require.Empty(t, exits, "the first signal stops gracefully")

			require.NoError(t, self.Signal(test.signal))
			require.Equal(t, test.code, receive(t, exits))
		})
	}
}

func TestWithoutASignalNothingIsLeftBehind(t *testing.T) {
	ctx, stop := untilSignal(t.Context(), func(int) {})
	stop()
	receive(t, ctx.Done())
}

func receive[T any](t *testing.T, from <-chan T) T {
	t.Helper()
	select {
	case got := <-from:
		return got
	case <-time.After(10 * time.Second):
		require.Fail(t, "nothing came in 10 s")
		panic("not reached")
	}
}
