package main

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// startBackend runs `sluice backend` on a free port. stop stops it and returns what it printed and its error.
func startBackend(t *testing.T, args ...string) (url string, stop func() (stdout string, err error)) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	stderr, log := io.Pipe()
	var stdout bytes.Buffer
	cmd := backendCommand()
	cmd.SetOut(&stdout)
	cmd.SetErr(log)
	cmd.SetArgs(append([]string{"--addr", "127.0.0.1:0"}, args...))
	ended := make(chan error, 1)
	go func() {
		err := cmd.ExecuteContext(ctx)
		_ = log.Close() // never fails
		ended <- err
	}()

	line, err := bufio.NewReader(stderr).ReadString('\n')
	require.NoError(t, err)
	address := regexp.MustCompile(`level=INFO msg="backend is listening" addr=(\S+)\n`).FindStringSubmatch(line)
	require.NotNil(t, address, line)
	go func() { _, _ = io.Copy(io.Discard, stderr) }() // ends when the command does
	return "http://" + address[1], func() (string, error) {
		cancel()
		err := <-ended
		return stdout.String(), err
	}
}

func TestBackendServesUntilItIsStopped(t *testing.T) {
	url, stop := startBackend(t, "--latency", "1ms", "--retry-after", "2", "--reject-number-suffix", "-NO")
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	for _, number := range []string{"A-1", "A-2-NO"} {
		request, err := http.NewRequestWithContext(t.Context(), http.MethodPost, url+"/orders", strings.NewReader("{}"))
		require.NoError(t, err)
		request.Header.Set("X-Order-Number", number)
		response, err := client.Do(request)
		require.NoError(t, err)
		require.NoError(t, response.Body.Close())
	}
	stdout, err := stop()
	require.NoError(t, err)
	require.Equal(t, `{"requests":2,"orders":1,"repeats":0,"inFlight":0,"maxInFlight":1,"rejected":1,"failed":0}`+"\n", stdout)
}

func TestBackendFinishesWhatItHasBegun(t *testing.T) {
	url, stop := startBackend(t, "--latency", "200ms")
	address := strings.TrimPrefix(url, "http://")
	conn, err := (&net.Dialer{}).DialContext(t.Context(), "tcp", address)
	require.NoError(t, err)
	defer func() { _ = conn.Close() }() // what matters was read
	_, err = io.WriteString(conn, "POST /orders HTTP/1.1\r\nHost: x\r\nX-Order-Number: A-1\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
	require.NoError(t, err)
	answers := bufio.NewReader(conn)
	line, err := answers.ReadString('\n') // sent once the request is being read, that is, has arrived
	require.NoError(t, err)
	require.Contains(t, line, "100 Continue")
	_, err = io.WriteString(conn, "{}")
	require.NoError(t, err)

	stdout, err := stop()
	require.NoError(t, err)
	require.Contains(t, stdout, `"requests":1,"orders":1,`)
	rest, err := io.ReadAll(answers)
	require.NoError(t, err)
	require.Contains(t, string(rest), "200 OK")
}

func TestBackendTellsAllFaultsOfItsCommandLine(t *testing.T) {
	cmd := backendCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs([]string{"--latency", "slow", "--capacity", "-1", "--retry-after", "soon", "--fail-rate", "2", "now"})
	err := cmd.ExecuteContext(t.Context())
	require.EqualError(t, err, strings.Join([]string{
		`latency: time: invalid duration "slow"`,
		`retry-after: "soon" is neither a duration such as 1500ms nor a number of seconds`,
		`unknown command "now" for "backend"`,
		`capacity: must be 0 (no limit) or more, is -1`,
		`fail-rate: must be from 0 to 1, is 2`,
	}, "\n"))
}

func TestBackendNamesAnAddressThatIsTaken(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer func() { _ = taken.Close() }() // nobody connected
	cmd := backendCommand()
	cmd.SilenceErrors, cmd.SilenceUsage = true, true
	cmd.SetArgs([]string{"--addr", taken.Addr().String()})
	require.ErrorContains(t, cmd.ExecuteContext(t.Context()), "listen on "+taken.Addr().String()+": ")
}
