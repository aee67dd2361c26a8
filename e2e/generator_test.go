package e2e

import (
	"encoding/json"
	"os/exec"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// generated is what these tests look at in what `sluice load --json` prints.
type generated struct {
	Orders struct {
		Offered int64 `json:"offered"`
		Good    int64 `json:"good"`
	} `json:"orders"`
	Statuses map[string]int64 `json:"statuses"`
}

// generate runs `sluice load` to its end.
func generate(t testing.TB, args ...string) generated {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), binary(t, true), append([]string{"load", "--json"}, args...)...)
	cmd.Stderr = t.Output()
	out, err := cmd.Output()
	require.NoError(t, err)
	var result generated
	require.NoError(t, json.Unmarshal(out, &result), "%s", out)
	return result
}

func TestTheLoadGeneratorSendsOrdersThatAreAccepted(t *testing.T) {
	b := backend(t, "--latency", "0")
	g := serve(t, true, embedded(t.TempDir()), settings{"backend.url": b.ordersURL()})

	open := generate(t, "--rate", "100", "--duration", "1s", "--retries", "2", g.url+"/orders")
	require.EqualValues(t, 100, open.Orders.Good)
	require.Equal(t, map[string]int64{"202": 100}, open.Statuses)
	padded := generate(t, "--closed", "4", "--orders", "20", "--size", "16KiB", g.url+"/orders")
	require.Equal(t, map[string]int64{"202": 20}, padded.Statuses)
	direct := generate(t, "--plan", "burst 10", g.url+"/orders/sync")
	require.Equal(t, map[string]int64{"200": 10}, direct.Statuses)

	g.drained(t, time.Minute)
	require.Equal(t, 130, b.stats(t).Orders, "every order has a number of its own")
}
