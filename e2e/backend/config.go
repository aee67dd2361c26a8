package backend

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"strconv"
	"time"
)

// Config holds the knobs of the stand-in. Every one of them can be changed while it runs, with Configure or with
// PUT /control; a change counts for requests that arrive (fates) or enter service (times) after it.
type Config struct {
	// Latency is how long a worker is busy with one request; 0 answers at once. Default 50ms.
	Latency time.Duration `json:"-"`
	// Jitter spreads Latency evenly over Latency ± Jitter; what would come out below zero is zero. Default 0.
	Jitter time.Duration `json:"-"`
	// Service is how the service time is spread: ServiceConstant (Latency ± Jitter) or ServiceExponential (Latency on
	// average, no Jitter). Default ServiceConstant.
	Service string `json:"service"`
	// Cancellation is what happens to a request whose client has left: with CancellationIgnored the work is done all the
	// same, as in most services, where it is queued already; with CancellationHonoured it leaves its worker or the queue
	// at once, and counts as failed. Default CancellationIgnored.
	Cancellation string `json:"cancellation"`
	// Capacity is the number of workers; requests beyond it wait in a queue, first come, first served. Default 0: no limit.
	Capacity int `json:"capacity"`
	// Queue is the most requests that wait for a worker; beyond it the answer is 503 at once. Default 0: no limit.
	Queue int `json:"queue"`
	// Contention is how the service time grows with the number n of requests in service: it is multiplied by
	// 1 + Contention·n·max(0, n−16), with n taken when the request enters service, itself included. Default 0: not at all.
	Contention float64 `json:"contention"`
	// FailRate is the share of requests, 0 to 1, that fail after their service time. Default 0.
	FailRate float64 `json:"failRate"`
	// FailNext is how many of the next requests fail after their service time, whatever FailRate says; each such request
	// takes one off. Requests that are cut or turned away at a full queue do not count. Default 0.
	FailNext int `json:"failNext"`
	// FailStatus is the HTTP status of a failure, 300 to 599. Default 503.
	FailStatus int `json:"failStatus"`
	// RetryAfter is sent with failures and at a full queue, in whole seconds, rounded up. Default 0: not sent.
	RetryAfter time.Duration `json:"-"`
	// RejectNumberSuffix is the end of the order numbers that get 400 and a problem document. Default -REJECT; "" rejects none.
	RejectNumberSuffix string `json:"rejectNumberSuffix"`
	// StallFrom and StallFor are a time in which nothing is finished, counted from New: who enters service in it is served
	// when it is over, and who is in service already ends as planned. Default 0 and 0: none.
	StallFrom time.Duration `json:"-"`
	StallFor  time.Duration `json:"-"`
	// DownFrom and DownFor are an outage, counted from New: it starts after DownFrom and lasts DownFor.
	// When it starts, all requests in service or waiting are cut without an answer; while it lasts, every new one is.
	// Default 0 and 0: none.
	DownFrom time.Duration `json:"-"`
	DownFor  time.Duration `json:"-"`
	// Down is an outage by hand, from the moment it is set until it is taken back. Default false.
	Down bool `json:"down"`
}

// The values of Config.Service and of Config.Cancellation.
const (
	ServiceConstant      = "constant"
	ServiceExponential   = "exponential"
	CancellationIgnored  = "ignored"
	CancellationHonoured = "honoured"
)

// DefaultConfig is a healthy backend that takes 50 ms for an order.
func DefaultConfig() Config {
	return Config{Latency: 50 * time.Millisecond, Service: ServiceConstant, Cancellation: CancellationIgnored, FailStatus: http.StatusServiceUnavailable, RejectNumberSuffix: "-REJECT"}
}

// Validate returns all faults at once, joined, each starting with the name of its flag.
func (c Config) Validate() error {
	var faults []error
	check := func(ok bool, flag, want string, is any) {
		if !ok {
			faults = append(faults, fmt.Errorf("%s: must be %s, is %v", flag, want, is))
		}
	}
	check(c.Latency >= 0, "latency", "0 or more", c.Latency)
	check(c.Jitter >= 0, "jitter", "0 or more", c.Jitter)
	check(c.Service == ServiceConstant || c.Service == ServiceExponential, "service", "constant or exponential", c.Service)
	check(c.Jitter <= 0 || c.Service != ServiceExponential, "jitter", "0 when service is exponential", c.Jitter)
	check(c.Cancellation == CancellationIgnored || c.Cancellation == CancellationHonoured, "cancellation", "ignored or honoured", c.Cancellation)
	check(c.Capacity >= 0, "capacity", "0 (no limit) or more", c.Capacity)
	check(c.Queue >= 0, "queue", "0 (no limit) or more", c.Queue)
	check(c.Contention >= 0 && !math.IsInf(c.Contention, 1), "contention", "a number, 0 or more", c.Contention)
	check(c.FailRate >= 0 && c.FailRate <= 1, "fail-rate", "from 0 to 1", c.FailRate)
	check(c.FailNext >= 0, "fail-next", "0 or more", c.FailNext)
	check(c.FailStatus >= 300 && c.FailStatus <= 599, "fail-status", "from 300 to 599", c.FailStatus)
	check(c.RetryAfter >= 0, "retry-after", "0 or more", c.RetryAfter)
	check(c.StallFrom >= 0, "stall-from", "0 or more", c.StallFrom)
	check(c.StallFor >= 0, "stall-for", "0 or more", c.StallFor)
	check(c.StallFrom <= 0 || c.StallFor != 0, "stall-for", "more than 0 when stall-from is set", c.StallFor)
	check(c.DownFrom >= 0, "down-from", "0 or more", c.DownFrom)
	check(c.DownFor >= 0, "down-for", "0 or more", c.DownFor)
	check(c.DownFrom <= 0 || c.DownFor != 0, "down-for", "more than 0 when down-from is set", c.DownFor)
	return errors.Join(faults...)
}

// ParsePause reads a duration ("1500ms") or a number of whole seconds ("2"), as Retry-After is usually thought of.
func ParsePause(text string) (time.Duration, error) {
	if seconds, err := strconv.ParseInt(text, 10, 32); err == nil {
		return time.Duration(seconds) * time.Second, nil
	}
	pause, err := time.ParseDuration(text)
	if err != nil {
		return 0, fmt.Errorf("%q is neither a duration such as 1500ms nor a number of seconds", text)
	}
	return pause, nil
}

// down tells whether there is an outage, age after the start.
func (c Config) down(age time.Duration) bool {
	return c.Down || age >= c.DownFrom && age-c.DownFrom < c.DownFor
}

// stalled returns how much of the stall is left, age after the start.
func (c Config) stalled(age time.Duration) time.Duration {
	if age < c.StallFrom || age-c.StallFrom >= c.StallFor {
		return 0
	}
	return c.StallFor - (age - c.StallFrom)
}

// knobs is the view of c that JSON sees. It points into c, so that decoding leaves what is not named as it was.
func (c *Config) knobs() any {
	type plain Config
	return &struct {
		Latency *duration `json:"latency"`
		Jitter  *duration `json:"jitter"`
		*plain
		RetryAfter *pause    `json:"retryAfter"`
		StallFrom  *duration `json:"stallFrom"`
		StallFor   *duration `json:"stallFor"`
		DownFrom   *duration `json:"downFrom"`
		DownFor    *duration `json:"downFor"`
	}{
		(*duration)(&c.Latency), (*duration)(&c.Jitter), (*plain)(c),
		(*pause)(&c.RetryAfter), (*duration)(&c.StallFrom), (*duration)(&c.StallFor), (*duration)(&c.DownFrom), (*duration)(&c.DownFor),
	}
}

// change sets the knobs that document names. Unknown names and anything after the document are errors.
func (c *Config) change(document []byte) error {
	decoder := json.NewDecoder(bytes.NewReader(document))
	decoder.DisallowUnknownFields()
	if err := decoder.Decode(c.knobs()); err != nil {
		return fmt.Errorf("read the knobs: %w", err)
	}
	if _, err := decoder.Token(); !errors.Is(err, io.EOF) {
		return errors.New("read the knobs: more than one JSON document")
	}
	return nil
}

// duration is a time.Duration that JSON shows as text: "50ms".
type duration time.Duration

func (d duration) MarshalJSON() ([]byte, error) {
	return json.Marshal(time.Duration(d).String())
}

func (d *duration) UnmarshalJSON(value []byte) error {
	parsed, err := time.ParseDuration(unquote(value))
	if err != nil {
		return fmt.Errorf("%s is not a duration such as \"50ms\"", value)
	}
	*d = duration(parsed)
	return nil
}

// pause is a duration that may also be given as a number of seconds.
type pause time.Duration

func (p pause) MarshalJSON() ([]byte, error) {
	return duration(p).MarshalJSON()
}

func (p *pause) UnmarshalJSON(value []byte) error {
	parsed, err := ParsePause(unquote(value))
	if err != nil {
		return err
	}
	*p = pause(parsed)
	return nil
}

// unquote returns the text of a JSON string, and of any other value its JSON: a number is parsed the same way as its text.
func unquote(value []byte) string {
	var text string
	if err := json.Unmarshal(value, &text); err != nil {
		return string(value)
	}
	return text
}
