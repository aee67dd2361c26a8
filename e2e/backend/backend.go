// Package backend is a stand-in for the Backend API, to which Sluice saves its orders: a slow, crowded or failing service
// at the turn of a knob, which counts what it was sent.
//
// It is built to be believed and to be cheap. Overload looks as it does with real services: workers with a queue in front,
// work that goes on although the caller has left, service times that grow with the crowd, connections that are cut.
// It serves well over 10,000 orders a second beside the gateway under test, and an order costs it less than 200 bytes:
// only the last 1,000 orders keep their headers and body, and of bodies no more than 4 MiB.
//
// It is no queue, checks no order, and forgets everything when it stops. `sluice backend`, `sluice dev`, the experiment
// and the tests use it, as a process of its own or inside another one as an http.Handler.
package backend

import (
	"context"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"
)

// Stats counts what the stand-in was sent. Once nothing is in flight, Requests is the sum of Rejected, Failed and the
// requests that were answered as saved.
type Stats struct {
	// Requests is how many POSTs arrived.
	Requests int64 `json:"requests"`
	// Orders is how many different orders were saved.
	Orders int64 `json:"orders"`
	// Repeats is how many requests came for an order that was saved already, or was being served at that moment.
	// Trying again after a failure is no repeat.
	Repeats int64 `json:"repeats"`
	// InFlight is how many requests have arrived and are not answered yet, the waiting ones included. A request whose
	// client has left stays in flight until it is worked off.
	InFlight int64 `json:"inFlight"`
	// MaxInFlight is the most that InFlight ever was.
	MaxInFlight int64 `json:"maxInFlight"`
	// Rejected is how many requests were answered with 400 (or 413).
	Rejected int64 `json:"rejected"`
	// Failed is how many requests failed, found the queue full, were cut, or were given up with their client.
	Failed int64 `json:"failed"`
}

// Backend is the stand-in, an http.Handler. It is safe for concurrent use.
type Backend struct {
	mux     *http.ServeMux
	started time.Time

	mu        sync.Mutex
	cfg       Config
	stats     Stats
	ledger    ledger
	inService int           // requests that hold a worker
	queue     []*call       // requests that wait for a worker, the oldest first
	outage    chan struct{} // closed and replaced whenever everything present is cut
	alarm     *time.Timer   // rings when DownFrom is over; nil if nothing is to come
	closed    bool
}

// New returns a stand-in, started now: DownFrom counts from here. The error names every fault of cfg.
func New(cfg Config) (*Backend, error) {
	if err := cfg.Validate(); err != nil {
		return nil, err
	}
	b := &Backend{started: time.Now(), cfg: cfg, ledger: newLedger(), outage: make(chan struct{})}
	b.mux = b.routes()
	b.mu.Lock()
	defer b.mu.Unlock()
	b.setAlarm()
	return b, nil
}

// ServeHTTP answers the Backend API, GET /orders/{orderNumber}, GET /stats, and GET and PUT /control.
func (b *Backend) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	b.mux.ServeHTTP(w, r)
}

// Stats returns the counts at this moment, which fit each other. A request is counted out before its answer is sent:
// who has the answer sees it in the counts.
func (b *Backend) Stats() Stats {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.stats
}

// Counts returns the Stats and, at the same moment, how many different order numbers were saved. A client that tries an
// order again in vain, and again, can have it saved several times under several ids, which Stats takes for several orders:
// the number is what it has in common.
func (b *Backend) Counts() (stats Stats, numbers int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.stats, len(b.ledger.numbers)
}

// Config returns the knobs as they are now.
func (b *Backend) Config() Config {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.cfg
}

// Configure changes knobs while requests are served. change must not call the Backend. If the result is not valid,
// nothing changes and the error names every fault.
func (b *Backend) Configure(change func(*Config)) error {
	_, err := b.configure(func(cfg *Config) error {
		change(cfg)
		return nil
	})
	return err
}

// Close cuts all requests in service or waiting, and every later one. It does not wait for their handlers, which belong
// to the server. It may be called more than once; the counts stay readable.
func (b *Backend) Close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.closed = true
	b.cutAll()
	b.setAlarm()
}

func (b *Backend) configure(change func(*Config) error) (Config, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	next := b.cfg
	if err := change(&next); err != nil {
		return b.cfg, err
	}
	if err := next.Validate(); err != nil {
		return b.cfg, err
	}
	b.cfg = next
	if b.down() {
		b.cutAll()
	}
	b.startWaiting()
	b.setAlarm()
	return next, nil
}

// outcome is what became of a request.
type outcome int

const (
	saved outcome = iota
	rejected
	failed
	turnedAway // the queue was full
	cutOff     // no answer, the connection is closed
	givenUp    // the client has left
)

// call is one POST on its way through the stand-in.
type call struct {
	order

	// Set on admission.
	fate       outcome         // what will become of it after its service
	failStatus int             // of a failure
	retryAfter time.Duration   // of a failure
	outage     chan struct{}   // closed when it is cut
	left       <-chan struct{} // closed when the client has left; nil if that does not matter
	turn       chan struct{}   // closed when it has a worker; nil if it had one at once

	// Set when it has a worker.
	working bool
	service time.Duration
}

// arrive counts a request in, before its body is read.
func (b *Backend) arrive() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.stats.Requests++
	b.stats.InFlight++
	b.stats.MaxInFlight = max(b.stats.MaxInFlight, b.stats.InFlight)
}

// turnBack counts a request out that never got to the workers.
func (b *Backend) turnBack(why outcome) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.countOut(why)
}

// serve does the work of a request and returns what became of it. It blocks for the time in the queue and in service.
// That ctx ends counts only if cancellation is honoured: a real service mostly does not know that its client has left,
// and does the work for nothing.
func (b *Backend) serve(ctx context.Context, c *call) outcome {
	if refusal, ok := b.admit(ctx, c); !ok {
		return b.leave(c, refusal)
	}
	if c.turn != nil {
		select {
		case <-c.turn:
		case <-c.outage:
			return b.leave(c, cutOff)
		case <-c.left:
			return b.leave(c, givenUp)
		}
	}
	if c.service > 0 {
		timer := time.NewTimer(c.service)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-c.outage:
			return b.leave(c, cutOff)
		case <-c.left:
			return b.leave(c, givenUp)
		}
	}
	return b.leave(c, c.fate)
}

// admit gives a request a worker or a place in the queue, or says why not.
func (b *Backend) admit(ctx context.Context, c *call) (refusal outcome, ok bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.ledger.enter(c.order) {
		b.stats.Repeats++
	}
	c.outage, c.failStatus, c.retryAfter = b.outage, b.cfg.FailStatus, b.cfg.RetryAfter
	if b.cfg.Cancellation == CancellationHonoured {
		c.left = ctx.Done()
	}
	if b.down() {
		return cutOff, false
	}
	idle := b.idleWorker()
	if !idle && b.cfg.Queue > 0 && len(b.queue) >= b.cfg.Queue {
		return turnedAway, false
	}
	c.fate = b.drawFate(c.number)
	if idle {
		b.start(c)
		return 0, true
	}
	c.turn = make(chan struct{})
	b.queue = append(b.queue, c)
	return 0, true
}

// leave frees the worker of a request and counts it out, all before the answer is sent: a caller that sends its next
// request on receiving the answer must never look like one more in flight.
func (b *Backend) leave(c *call, what outcome) outcome {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c.outage != b.outage {
		what = cutOff // it was cut while its service ended
	}
	if b.ledger.leave(c.order, what == saved, time.Now()) {
		b.stats.Orders++
	}
	b.countOut(what)
	if c.working {
		b.inService--
		b.startWaiting()
	} else if i := slices.Index(b.queue, c); what == givenUp && i >= 0 {
		b.queue = slices.Delete(b.queue, i, i+1)
	}
	return what
}

// The methods below want b.mu held.

func (b *Backend) countOut(what outcome) {
	b.stats.InFlight--
	switch what {
	case saved:
	case rejected:
		b.stats.Rejected++
	case failed, turnedAway, cutOff, givenUp:
		b.stats.Failed++
	}
}

func (b *Backend) drawFate(number string) outcome {
	switch suffix := b.cfg.RejectNumberSuffix; {
	case b.cfg.FailNext > 0:
		b.cfg.FailNext--
		return failed
	case b.cfg.FailRate > 0 && rand.Float64() < b.cfg.FailRate:
		return failed
	case suffix != "" && strings.HasSuffix(number, suffix):
		return rejected
	default:
		return saved
	}
}

func (b *Backend) idleWorker() bool {
	return b.cfg.Capacity == 0 || b.inService < b.cfg.Capacity
}

func (b *Backend) start(c *call) {
	b.inService++
	c.working = true
	c.service = b.serviceTime()
}

func (b *Backend) startWaiting() {
	for len(b.queue) > 0 && b.idleWorker() {
		c := b.queue[0]
		b.queue[0] = nil // or the array would keep the request alive
		b.queue = b.queue[1:]
		b.start(c)
		close(c.turn)
	}
}

func (b *Backend) serviceTime() time.Duration {
	service := float64(b.cfg.Latency)
	if b.cfg.Service == ServiceExponential {
		service *= rand.ExpFloat64()
	}
	if b.cfg.Jitter > 0 {
		service += (2*rand.Float64() - 1) * float64(b.cfg.Jitter)
	}
	n := float64(b.inService)
	service *= 1 + b.cfg.Contention*n*max(0, n-16)
	service += float64(b.cfg.stalled(time.Since(b.started)))
	// Half of what a Duration holds, because a float64 cannot hold all of it exactly.
	return time.Duration(min(max(0, service), math.MaxInt64/2))
}

func (b *Backend) down() bool {
	return b.closed || b.cfg.down(time.Since(b.started))
}

func (b *Backend) cutAll() {
	close(b.outage)
	b.outage = make(chan struct{})
	b.queue = nil
}

// setAlarm arranges that the outage of DownFrom cuts what is in service when it starts.
func (b *Backend) setAlarm() {
	if b.alarm != nil {
		b.alarm.Stop()
		b.alarm = nil
	}
	ahead := b.cfg.DownFrom - time.Since(b.started)
	if b.closed || b.cfg.DownFor == 0 || ahead <= 0 {
		return
	}
	b.alarm = time.AfterFunc(ahead, func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.down() { // and not put off at the last moment
			b.cutAll()
		}
	})
}
