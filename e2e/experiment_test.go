package e2e

import (
	"bufio"
	"bytes"
	"encoding/csv"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
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
	for name, tc := range map[string]struct {
		signal syscall.Signal
		says   string
	}{
		"when it is told to stop": {syscall.SIGTERM, "stopped before the end; nothing was written"},
		"when it is killed":       {syscall.SIGKILL, ""},
	} {
		t.Run(name, func(t *testing.T) {
			out := t.TempDir()
			said, children := endExperiment(t, out, tc.signal)
			require.Contains(t, said, tc.says)
			// Who is killed has no time to wait for them.
			eventually(t, 30*time.Second, func() bool { return !slices.ContainsFunc(children, alive) }, "processes are left of %v", children)
			if tc.signal == syscall.SIGKILL {
				return
			}
			left, err := os.ReadDir(out)
			require.NoError(t, err)
			require.Empty(t, left)
		})
	}
}

// endExperiment starts an experiment, signals it when a gateway runs, and waits for its end. It returns what the experiment
// said, and the processes that it had then.
func endExperiment(t *testing.T, out string, signal syscall.Signal) (text string, children []int) {
	t.Helper()
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
	children = childrenOf(t, cmd.Process.Pid)
	require.GreaterOrEqual(t, len(children), 2, "the backend and the gateway")
	require.NoError(t, cmd.Process.Signal(signal))
	for lines.Scan() {
		said = append(said, lines.Text())
	}
	err, ended = cmd.Wait(), true
	require.Error(t, err)
	if signal == syscall.SIGTERM {
		require.Equal(t, 1, cmd.ProcessState.ExitCode())
	}
	return strings.Join(said, "\n"), children
}

// childrenOf finds the processes that a process has started.
func childrenOf(t *testing.T, pid int) []int {
	t.Helper()
	entries, err := os.ReadDir("/proc")
	if err != nil {
		t.Skip("what processes there are only Linux tells in /proc")
	}
	var children []int
	for _, entry := range entries {
		child, err := strconv.Atoi(entry.Name())
		if err != nil {
			continue
		}
		if _, parent := processState(child); parent == pid {
			children = append(children, child)
		}
	}
	return children
}

// alive is false as well of a process that has ended and is still to be waited for, which may be nobody's business.
func alive(pid int) bool {
	state, _ := processState(pid)
	return state != "" && state != "Z" && state != "X"
}

// processState reads the state and the parent of a process; they are empty if it is gone.
func processState(pid int) (state string, parent int) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", 0
	}
	// The name before them is in brackets, and can have anything in it.
	fields := strings.Fields(string(text[bytes.LastIndexByte(text, ')')+1:]))
	parent, _ = strconv.Atoi(fields[1]) // the kernel writes a number
	return fields[0], parent
}
