package e2e

import (
	"bufio"
	"encoding/csv"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// The plumbing of the experiment: real processes, real files, and all durations so short that the numbers mean nothing.
func TestTheExperimentMeasuresAndWritesWhatItPromises(t *testing.T) {
	out := t.TempDir()
	cmd := exec.CommandContext(t.Context(), binary(t, false), "experiment", "stall", "original", "--quick", "--force", "--time-scale", "0.1", "--out", out)
	text, err := cmd.CombinedOutput()
	// With such numbers the expected shape can be missing, which is exit code 1; anything else is not to happen.
	if err != nil {
		require.Equal(t, 1, cmd.ProcessState.ExitCode(), string(text))
		require.Contains(t, string(text), "the expected shape is not there")
	}
	require.Contains(t, string(text), "quick plan, 16 points")
	require.Contains(t, string(text), "multiplied by 0.1")

	var names []string
	entries, err := os.ReadDir(out)
	require.NoError(t, err)
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	for _, name := range []string{"original.csv", "stall.csv", "results-original-stall.md", "report-original-stall.html", "stall-goodput-light.png", "stall-goodput-dark.png",
		"original-throughput-light.png", "original-ideal-dark.png"} {
		require.Contains(t, names, name)
	}
	require.False(t, slices.ContainsFunc(names, func(name string) bool { return strings.HasPrefix(name, ".") }), "the processes' data is gone: %v", names)

	file, err := os.Open(filepath.Join(out, "original.csv"))
	require.NoError(t, err)
	defer func() { _ = file.Close() }() // it is only read
	lines, err := csv.NewReader(file).ReadAll()
	require.NoError(t, err)
	require.Len(t, lines, 1+13)
	perMinute, lost := slices.Index(lines[0], "orders_per_minute"), slices.Index(lines[0], "failed")
	for _, line := range lines[1:] {
		require.NotEmpty(t, line[perMinute], line)
		require.Equal(t, "0", line[lost], line)
	}
}

func TestTheExperimentTakesItsProcessesAlong(t *testing.T) {
	out := t.TempDir()
	cmd := exec.Command(binary(t, false), "experiment", "overload", "--quick", "--force", "--out", out)
	progress, err := cmd.StderrPipe()
	require.NoError(t, err)
	require.NoError(t, cmd.Start())
	ended := false
	defer func() {
		if !ended {
			_ = cmd.Process.Kill() // it may have ended
			_ = cmd.Wait()
		}
	}()
	var said []string
	lines := bufio.NewScanner(progress)
	for lines.Scan() {
		if said = append(said, lines.Text()); strings.HasPrefix(lines.Text(), "[1/") {
			break
		}
	}
	// The data of a gateway: it runs.
	eventually(t, 30*time.Second, func() bool {
		databases, err := filepath.Glob(filepath.Join(out, ".running-*", "*", "sluice.db"))
		require.NoError(t, err)
		return len(databases) == 1
	}, "no gateway has started: %v", said)
	require.NoError(t, cmd.Process.Signal(syscall.SIGTERM))
	for lines.Scan() {
		said = append(said, lines.Text())
	}
	// The end of its standard error is the end of all who write to it, and of it.
	err, ended = cmd.Wait(), true
	require.Error(t, err)
	require.Equal(t, 1, cmd.ProcessState.ExitCode())
	require.Contains(t, strings.Join(said, "\n"), "stopped before the end; nothing was written")
	left, err := os.ReadDir(out)
	require.NoError(t, err)
	require.Empty(t, left)
}
