package load

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"regexp"
	"time"
)

// Kinds of arrivals.
const (
	Constant = "constant" // evenly spaced
	Poisson  = "poisson"  // independent of each other, as many clients are
)

// clientTimeout is the patience of a client that has no deadline.
const clientTimeout = 30 * time.Second

// Config says what to send, where to, and how long a client waits. Open loop is a Plan, or Rate and Duration; closed loop
// is Closed with Duration, Orders or both.
type Config struct {
	// URL is where orders are POSTed to, http or https.
	URL string
	// Rate is a plan of one phase: so many orders a second, for Duration. Default 0: see Plan.
	Rate float64
	// Duration is how long orders are sent, with Rate or Closed. Default 0: until Orders are sent, or as Plan says.
	Duration time.Duration
	// Plan says when orders arrive, for what Rate cannot say. Default none.
	Plan Plan
	// Arrivals is Constant (default) or Poisson.
	Arrivals string
	// Closed is a number of clients that each send their next order when the last one is done: a closed loop. Default 0.
	Closed int
	// Orders ends a closed loop after so many. Default 0: it ends after Duration.
	Orders int
	// Warmup is how much of the beginning is sent and not counted. Default 0.
	Warmup time.Duration
	// Deadline is how long a client waits for the answer to an attempt, the first one counted from the intended time of the
	// order. Then it leaves: the request is cancelled and its connection closed. Default 0: 30s, which is no wish but a limit.
	Deadline time.Duration
	// Retries is how many further attempts a client makes after a timeout, a connection that failed, 429 or 5xx, with the
	// same order. Default 0.
	Retries int
	// RetryPause is the pause before the first further attempt; each later one is twice as long. A pause is drawn evenly
	// from half to one and a half times that. Default 0: at once. Retry-After is not obeyed: this is the impatient client.
	RetryPause time.Duration
	// RetryPauseMax ends the doubling: no pause is drawn around more than that. Default 0: it goes on.
	RetryPauseMax time.Duration
	// Header is sent with every request, beside Content-Type: application/json, which it can replace. Default none.
	Header http.Header
	// Connections bounds the open connections. Orders for which none is free wait, which counts as being late.
	// Default 0: as many as it takes.
	Connections int
	// Prefix begins every order number; a hyphen and a number from 1 follow. Default: drawn for every run.
	Prefix string
	// Size pads the body of an order to so many bytes. Default 0: as short as it can be, some 130 bytes.
	Size int
	// Body is sent instead of the built-in order, with {{number}} replaced by the order number. Default none.
	Body []byte
	// Seed makes Poisson arrivals and pauses repeatable. Default 0: drawn for every run.
	Seed uint64
}

// DefaultConfig has all the defaults. What to send, and where to, is still to be said.
func DefaultConfig() Config { return Config{Arrivals: Constant} }

// prefixes leave room for the number: the default schema allows 64 such characters in all.
var prefixes = regexp.MustCompile(`^[A-Za-z0-9._-]{0,40}$`)

// Validate returns all faults at once, joined, each starting with the name of its flag.
func (c Config) Validate() error {
	var faults []error
	check := func(ok bool, flag, want string, is any) {
		if !ok {
			faults = append(faults, fmt.Errorf("%s: must be %s, is %v", flag, want, is))
		}
	}
	target, err := url.Parse(c.URL)
	check(err == nil && (target.Scheme == "http" || target.Scheme == "https") && target.Host != "", "url",
		"a URL such as http://localhost:8080/orders", fmt.Sprintf("%q", c.URL))
	check(validRate(c.Rate), "rate", fmt.Sprintf("from 0 to %d", maxRate), c.Rate)
	check(c.Duration >= 0 && c.Duration <= maxDuration, "duration", fmt.Sprintf("from 0 to %v", maxDuration), c.Duration)
	check(c.Arrivals == Constant || c.Arrivals == Poisson, "arrivals", Constant+" or "+Poisson, fmt.Sprintf("%q", c.Arrivals))
	check(c.Closed >= 0, "closed", "0 (open loop) or more", c.Closed)
	check(c.Orders >= 0, "orders", "0 (no limit) or more", c.Orders)
	check(c.Warmup >= 0, "warmup", "0 or more", c.Warmup)
	check(c.Deadline >= 0, "deadline", "0 (none) or more", c.Deadline)
	check(c.Retries >= 0, "retries", "0 or more", c.Retries)
	check(c.RetryPause >= 0, "retry-pause", "0 or more", c.RetryPause)
	check(c.RetryPauseMax >= 0, "retry-pause-max", "0 (none) or more", c.RetryPauseMax)
	check(c.Connections >= 0, "connections", "0 (no limit) or more", c.Connections)
	check(prefixes.MatchString(c.Prefix), "prefix", "at most 40 of A-Z a-z 0-9 . _ -", fmt.Sprintf("%q", c.Prefix))
	check(c.Size >= 0 && c.Size <= 1<<30, "size", "from 0 to 1GiB", c.Size)
	check(c.Size == 0 || c.Body == nil, "size", "left out with a body of one's own", c.Size)
	if c.Header.Get("Idempotency-Key") != "" {
		faults = append(faults, errors.New("header: Idempotency-Key would be the same for all orders"))
	}
	if c.Body != nil && !bytes.Contains(c.Body, []byte(numberMark)) {
		faults = append(faults, errors.New("body: has no "+numberMark+", so all orders would be the same one"))
	}
	return errors.Join(append(faults, c.validateLoop()...)...)
}

// validateLoop finds what is contradictory or missing in what says how orders arrive.
func (c Config) validateLoop() []error {
	var faults []error
	fault := func(is bool, text string) {
		if is {
			faults = append(faults, errors.New(text))
		}
	}
	open := c.Rate > 0 || c.Plan != nil
	switch {
	case !open && c.Closed <= 0:
		fault(true, "rate, plan or closed: one of them must say what to send")
	case open && c.Closed > 0:
		fault(true, "closed: cannot be combined with a rate or a plan, which are for the open loop")
	case c.Rate > 0 && c.Plan != nil:
		fault(true, "plan: cannot be combined with a rate")
	case c.Closed > 0:
		fault(c.Duration == 0 && c.Orders == 0, "closed: needs a duration, a number of orders, or both")
		fault(c.Warmup > 0 && c.Duration > 0 && c.Warmup >= c.Duration, "warmup: must be shorter than the duration")
	case c.Plan != nil:
		fault(c.Duration != 0, "duration: cannot be combined with a plan, which has its own")
		fault(c.Warmup > 0 && c.Warmup >= c.Plan.Duration(), "warmup: must be shorter than the plan")
		if err := c.Plan.validate(); err != nil {
			faults = append(faults, fmt.Errorf("plan: %w", err))
		}
	default:
		fault(c.Duration == 0, "duration: must be given with a rate")
		fault(c.Warmup > 0 && c.Duration > 0 && c.Warmup >= c.Duration, "warmup: must be shorter than the duration")
	}
	fault(c.Closed <= 0 && c.Orders > 0, "orders: is for the closed loop; use a plan to say when how many arrive")
	return faults
}

// plan is what the open loop goes by.
func (c Config) plan() Plan {
	if c.Plan != nil {
		return c.Plan
	}
	return Plan{{From: c.Rate, To: c.Rate, Duration: c.Duration}}
}

// patience is how long a client waits for the answer to one attempt.
func (c Config) patience() time.Duration {
	if c.Deadline > 0 {
		return c.Deadline
	}
	return clientTimeout
}
