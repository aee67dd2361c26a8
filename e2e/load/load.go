// Package load generates load: it sends orders as planned, and tells what became of them.
//
// In the open loop orders arrive whatever becomes of those before them, as clients do that know nothing of each other.
// Latency is counted from the moment for which an order was planned, so a server that stalls is charged with everybody
// whom it kept waiting, and so is a generator that falls behind, which says so (Late, Trustworthy). Nothing is corrected
// afterwards. In the closed loop a fixed number of clients each wait for one answer before they send the next order;
// this shows what a server can do, and hides how long it makes people wait.
//
// It knows the gateway only by HTTP, keeps no orders, and judges no answer but by its status. `sluice load` and the
// experiment use it.
package load

import (
	"context"
	"math"
	"math/rand/v2"
	"net"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// DialFunc opens a connection, like net.Dialer.DialContext.
type DialFunc func(ctx context.Context, network, address string) (net.Conn, error)

// Deps is what a run can be given. All of it may be left out.
type Deps struct {
	// Dial replaces the network. Default: a net.Dialer.
	Dial DialFunc
	// Progress is called about once a second, never concurrently, and not after Run has returned.
	Progress func(Progress)
}

// Run sends what cfg says and blocks until the last answer has come or its client has left. If ctx ends before that, nothing
// more is sent, what is in flight is cut and counted as unfinished, and the result is that of a shorter run: this is no
// error. The error names every fault of cfg.
func Run(ctx context.Context, cfg Config, deps Deps) (Result, error) {
	if err := cfg.Validate(); err != nil {
		return Result{}, err
	}
	if cfg.Seed == 0 {
		cfg.Seed = rand.Uint64()
	}
	if cfg.Prefix == "" {
		cfg.Prefix = "L" + strconv.FormatUint(rand.Uint64(), 36)
	}
	if deps.Dial == nil {
		deps.Dial = new(net.Dialer).DialContext
	}
	client, err := newClient(cfg, deps.Dial)
	if err != nil {
		return Result{}, err
	}
	defer client.transport.CloseIdleConnections()

	cpu := cpuTime()
	g := &generator{cfg: cfg, client: client, bodies: newTemplate(cfg), recorder: newRecorder(),
		pauses: rand.New(rand.NewPCG(cfg.Seed, 1))}
	stopProgress := g.tell(deps.Progress)
	g.run(ctx)
	stopProgress()
	return g.recorder.conclude(cfg, cpuTime()-cpu), nil
}

// generator is one run.
type generator struct {
	cfg      Config
	client   *client
	bodies   template
	recorder *recorder
	sequence atomic.Int64
	clients  sync.WaitGroup

	mu     sync.Mutex
	pauses *rand.Rand // guarded by mu
}

// run returns when all is over.
func (g *generator) run(ctx context.Context) {
	undisturbed := context.AfterFunc(ctx, g.recorder.stop)
	if g.cfg.Closed > 0 {
		g.closedLoop(ctx)
	} else {
		g.openLoop(ctx)
	}
	g.clients.Wait()
	undisturbed()
	if ctx.Err() != nil {
		// What runs after the end of ctx may not have begun when we see that end, and is held off by now.
		g.recorder.stop()
	}
}

// openLoop starts a client at every arrival of the plan. It has one timer, and starts all that are due whenever it rings:
// when there is much to do it rings rarely, and starts many.
func (g *generator) openLoop(ctx context.Context) {
	arrivals := newSchedule(g.cfg.plan(), g.cfg.Arrivals, rand.New(rand.NewPCG(g.cfg.Seed, 0)))
	timer := time.NewTimer(0)
	defer timer.Stop()
	for next, ok := arrivals.next(); ok && ctx.Err() == nil; {
		if wait := next.at - g.recorder.now(); wait > 0 {
			timer.Reset(wait)
			select {
			case <-timer.C:
			case <-ctx.Done():
			}
			continue
		}
		o := g.arrive(next)
		g.clients.Go(func() { g.follow(ctx, o) })
		next, ok = arrivals.next()
	}
}

// closedLoop has a fixed number of clients that each send one order after the other.
func (g *generator) closedLoop(ctx context.Context) {
	over := func() bool {
		return ctx.Err() != nil || g.cfg.Duration > 0 && g.recorder.now() >= g.cfg.Duration
	}
	var left atomic.Int64
	left.Store(int64(g.cfg.Orders))
	for range g.cfg.Closed {
		g.clients.Go(func() {
			for !over() && (g.cfg.Orders == 0 || left.Add(-1) >= 0) {
				g.follow(ctx, g.arrive(arrival{at: g.recorder.now()}))
			}
		})
	}
}

// order is one order on its way.
type order struct {
	arrival
	number  int64
	counted bool          // it is not of the warm-up
	ready   time.Duration // when its client was there, and only lacked a connection
}

func (g *generator) arrive(a arrival) *order {
	o := &order{arrival: a, number: g.sequence.Add(1), counted: a.at >= g.cfg.Warmup}
	g.recorder.arrived(o)
	return o
}

// follow is what a client does with its order: attempts, until one is answered or the client gives up.
func (g *generator) follow(ctx context.Context, o *order) {
	o.ready = g.recorder.now()
	body := g.bodies.order(o.number)
	leave := o.at + g.cfg.patience()
	for attempt := 0; ; attempt++ {
		a := g.attempt(ctx, o, body, attempt, leave)
		if attempt == g.cfg.Retries || !a.worthRetrying() || !g.pause(ctx, attempt) {
			g.recorder.ended(o, a)
			return
		}
		leave = g.recorder.now() + g.cfg.patience()
	}
}

// attempt is what became of one attempt: a status, or a failure to get one.
type attempt struct {
	status  int
	failure string
	err     error // of the failure
	inTime  bool  // the answer came before the client would have left
}

func (a attempt) accepted() bool { return a.status >= 200 && a.status < 300 }

func (a attempt) good() bool { return a.accepted() && a.inTime }

func (a attempt) timedOut() bool {
	return a.failure == failTimeout || a.failure == failUnsent || a.accepted() && !a.inTime
}

// reached tells whether there was a connection.
func (a attempt) reached() bool {
	switch a.failure {
	case failRefused, failDial, failLocal, failUnsent:
		return false
	default:
		return true
	}
}

// worthRetrying tells whether a client sends the order again, which it does not if it was refused for a reason.
func (a attempt) worthRetrying() bool {
	return a.failure != "" && a.failure != failInterrupted || a.status == 429 || a.status >= 500
}

// attempt makes one attempt, which ends at leave (since the start) at the latest.
func (g *generator) attempt(ctx context.Context, o *order, body []byte, number int, leave time.Duration) attempt {
	deadline := g.recorder.start.Add(leave)
	ctx, cancel := context.WithDeadlineCause(ctx, deadline, errLeft)
	defer cancel()
	var a attempt
	if a.err = g.client.acquire(ctx, deadline); a.err != nil {
		if a.failure = failure(ctx, a.err); a.failure == failTimeout {
			a.failure = failUnsent
		}
		if number == 0 {
			g.recorder.begun(o)
		}
		g.recorder.answered(o, a)
		return a
	}
	defer g.client.release()
	if number == 0 {
		g.recorder.begun(o)
	}
	g.recorder.sent(o)
	if a.status, a.err = g.client.post(ctx, body); a.err != nil {
		a.failure = failure(ctx, a.err)
	}
	a.inTime = g.recorder.answered(o, a) <= leave
	return a
}

// pause waits before the attempt after the nth, counted from 0. It returns false if ctx ended.
func (g *generator) pause(ctx context.Context, n int) bool {
	if g.cfg.RetryPause == 0 {
		return ctx.Err() == nil
	}
	g.mu.Lock()
	jitter := 0.5 + g.pauses.Float64()
	g.mu.Unlock()
	longest := maxDuration // or it would overflow
	if g.cfg.RetryPauseMax > 0 {
		longest = min(longest, g.cfg.RetryPauseMax)
	}
	pause := min(math.Ldexp(float64(g.cfg.RetryPause), n), float64(longest)) * jitter
	timer := time.NewTimer(time.Duration(pause))
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// tell calls progress once a second. stop waits for the last call.
func (g *generator) tell(progress func(Progress)) (stop func()) {
	if progress == nil {
		return func() {}
	}
	quit := make(chan struct{})
	var done sync.WaitGroup
	done.Go(func() {
		ticker := time.NewTicker(time.Second)
		defer ticker.Stop()
		for {
			select {
			case <-ticker.C:
				progress(g.recorder.progress())
			case <-quit:
				return
			}
		}
	})
	return func() {
		close(quit)
		done.Wait()
	}
}
