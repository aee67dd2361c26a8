package load_test

import (
	"encoding/json"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"sluice/e2e/load"
)

func TestAConfigurationTellsAllItsFaults(t *testing.T) {
	err := load.Config{
		URL: "localhost:8080/orders", Rate: -1, Duration: -time.Second, Arrivals: "now", Closed: -1, Orders: -1, Warmup: -1, Deadline: -1,
		Retries: -1, RetryPause: -1, RetryPauseMax: -1, Connections: -1, Prefix: "a b", Size: -1, Body: []byte("{}"),
		Header: http.Header{"Idempotency-Key": {"k"}},
	}.Validate()
	require.EqualError(t, err, strings.Join([]string{
		`url: must be a URL such as http://localhost:8080/orders, is "localhost:8080/orders"`,
		`rate: must be from 0 to 1000000, is -1`,
		`duration: must be from 0 to 24h0m0s, is -1s`,
		`arrivals: must be constant or poisson, is "now"`,
		`closed: must be 0 (open loop) or more, is -1`,
		`orders: must be 0 (no limit) or more, is -1`,
		`warmup: must be 0 or more, is -1ns`,
		`deadline: must be 0 (none) or more, is -1ns`,
		`retries: must be 0 or more, is -1`,
		`retry-pause: must be 0 or more, is -1ns`,
		`retry-pause-max: must be 0 (none) or more, is -1ns`,
		`connections: must be 0 (no limit) or more, is -1`,
		`prefix: must be at most 40 of A-Z a-z 0-9 . _ -, is "a b"`,
		`size: must be from 0 to 1GiB, is -1`,
		`size: must be left out with a body of one's own, is -1`,
		`header: Idempotency-Key would be the same for all orders`,
		`body: has no {{number}}, so all orders would be the same one`,
		`rate, plan or closed: one of them must say what to send`,
	}, "\n"))
}

func TestWhatContradictsItselfIsAFault(t *testing.T) {
	for says, change := range map[string]func(*load.Config){
		"rate, plan or closed: one of them":          func(*load.Config) {},
		"duration: must be given with a rate":        func(c *load.Config) { c.Rate = 1 },
		"plan: cannot be combined with a rate":       func(c *load.Config) { c.Rate, c.Plan = 1, plan(t, "1/s:1s") },
		"closed: cannot be combined with a rate or":  func(c *load.Config) { c.Rate, c.Closed, c.Duration = 1, 1, time.Second },
		"closed: needs a duration, a number of":      func(c *load.Config) { c.Closed = 1 },
		"duration: cannot be combined with a plan":   func(c *load.Config) { c.Plan, c.Duration = plan(t, "1/s:1s"), time.Second },
		"orders: is for the closed loop":             func(c *load.Config) { c.Plan, c.Orders = plan(t, "1/s:1s"), 5 },
		"warmup: must be shorter than the plan":      func(c *load.Config) { c.Plan, c.Warmup = plan(t, "1/s:1s"), time.Second },
		"warmup: must be shorter than the duration":  func(c *load.Config) { c.Rate, c.Duration, c.Warmup = 1, time.Second, time.Second },
		"plan: has no orders":                        func(c *load.Config) { c.Plan = load.Plan{} },
		"is \"http://\"":                             func(c *load.Config) { c.URL = "http://" },
		"rate: must be from 0 to 1000000, is 2e+06":  func(c *load.Config) { c.Rate, c.Duration = 2e6, time.Second },
		"size: must be left out with a body of one'": func(c *load.Config) { c.Body, c.Size = []byte("{{number}}"), 1000 },
	} {
		_, err := load.Run(t.Context(), config(change), load.Deps{})
		require.ErrorContains(t, err, says)
	}
}

func TestOrdersHaveNumbersAndSizes(t *testing.T) {
	send := func(t *testing.T, change func(*load.Config)) map[string]int {
		var bodies map[string]int
		synctest.Test(t, func(t *testing.T) {
			k := newKnown(t, takes(time.Millisecond))
			r := run(t, k, config(func(c *load.Config) {
				c.Rate, c.Duration = 100, time.Second
				change(c)
			}))
			require.EqualValues(t, 100, r.Orders.Good)
			bodies = k.bodies
		})
		require.Len(t, bodies, 100)
		return bodies
	}
	t.Run("built in", func(t *testing.T) {
		bodies := send(t, func(c *load.Config) { c.Prefix = "A.b_c-9" })
		for body := range bodies {
			var order struct{ OrderNumber, CustomerID, Currency string }
			require.NoError(t, json.Unmarshal([]byte(body), &order))
			require.Regexp(t, `^A\.b_c-9-\d+$`, order.OrderNumber)
			require.Less(t, len(body), 160)
		}
	})
	t.Run("another prefix in every run", func(t *testing.T) {
		one, other := send(t, func(*load.Config) {}), send(t, func(*load.Config) {})
		for body := range one {
			require.NotContains(t, other, body)
		}
	})
	t.Run("padded", func(t *testing.T) {
		for body := range send(t, func(c *load.Config) { c.Size = 16 << 10 }) {
			require.Len(t, body, 16<<10)
			require.True(t, json.Valid([]byte(body)))
		}
	})
	t.Run("with headers", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			k := newKnown(t, func(_ *known, w http.ResponseWriter, r *http.Request) {
				if r.Header.Get("Authorization") != "Bearer key" || r.Header.Get("Content-Type") != "application/json" {
					w.WriteHeader(http.StatusUnauthorized)
				}
			})
			r := run(t, k, config(func(c *load.Config) {
				c.Rate, c.Duration, c.Header = 10, time.Second, http.Header{"Authorization": {"Bearer key"}}
			}))
			require.EqualValues(t, 10, r.Orders.Good)
		})
	})
	t.Run("of one's own", func(t *testing.T) {
		bodies := send(t, func(c *load.Config) { c.Prefix, c.Body = "T", []byte(`{"n":"{{number}}","again":"{{number}}"}`) })
		require.Contains(t, bodies, `{"n":"T-1","again":"T-1"}`)
	})
}
