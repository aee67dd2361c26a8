// Package experiment is `sluice experiment`: why there is a queue, measured. It runs the real gateway, the stand-in
// backend and the load generator as processes of their own, anew for every measured point, and writes down what came of
// it: long CSV files, tables, plots and one HTML page that needs nothing else.
//
// Each part is data: its points, its tables, its plots, and the shape that it expects, as named checks. What the numbers
// do not show stands beside them. Nothing here is tuned towards a result: who changes the gateway runs it again, and a
// shape that is not there is an error.
//
// It is no benchmark of the gateway (`make bench` is), and it measures one machine that everything shares.
package experiment

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// The values of Config.Backend, Config.Arrivals, Config.Service and Config.Cancellation.
const (
	BrokerGoChannel = "gochannel"
	BrokerAMQP      = "amqp"
	BrokerSQL       = "sql"

	ArrivalsConstant = "constant"
	ArrivalsPoisson  = "poisson"

	ServiceConstant    = "constant"
	ServiceExponential = "exponential"

	CancellationIgnored  = "ignored"
	CancellationHonoured = "honoured"
)

// Config says what to measure.
type Config struct {
	// Parts are the names of the parts to run, in any order. Default none, which means all.
	Parts []string
	// Quick measures fewer points for a shorter time; the checks are the same. Default false.
	Quick bool
	// Backend is the gateway's message broker: gochannel, amqp or sql. Default gochannel.
	Backend string
	// Runs is how often each point is measured; tables and checks have the median. Default 1.
	Runs int
	// Out is the directory for the results; it is made if it does not exist. The processes keep their data below it for
	// as long as they run, so it should be on a real disk. Default data/experiment.
	Out string
	// Force measures on a machine that is too busy, and marks the results. Default false.
	Force bool
	// Arrivals, Service and Cancellation change part overload: constant or poisson arrivals, constant or exponential
	// service times, and whether the backend gives up work whose client has left (ignored or honoured).
	Arrivals, Service, Cancellation string
	// TimeScale multiplies all durations. It is for tests of the plumbing: with anything but 1 the numbers mean nothing.
	TimeScale float64
}

// DefaultConfig measures everything once.
func DefaultConfig() Config {
	return Config{Backend: BrokerGoChannel, Runs: 1, Out: filepath.Join("data", "experiment"), Arrivals: ArrivalsConstant,
		Service: ServiceConstant, Cancellation: CancellationIgnored, TimeScale: 1}
}

// Validate returns all faults at once, each beginning with the name of its flag.
func (c Config) Validate() error {
	var faults []error
	oneOf := func(flag, is string, names ...string) {
		if !slices.Contains(names, is) {
			faults = append(faults, fmt.Errorf("%s: must be one of %s, is %q", flag, strings.Join(names, ", "), is))
		}
	}
	for _, name := range c.Parts {
		oneOf("part", name, PartNames()...)
	}
	oneOf("backend", c.Backend, BrokerGoChannel, BrokerAMQP, BrokerSQL)
	oneOf("arrivals", c.Arrivals, ArrivalsConstant, ArrivalsPoisson)
	oneOf("service", c.Service, ServiceConstant, ServiceExponential)
	oneOf("cancellation", c.Cancellation, CancellationIgnored, CancellationHonoured)
	if !c.has("overload") {
		onlyOverload := func(flag, is, otherwise string) {
			if is != otherwise {
				faults = append(faults, fmt.Errorf("%s: changes part overload only, which is not among the parts", flag))
			}
		}
		onlyOverload("arrivals", c.Arrivals, ArrivalsConstant)
		onlyOverload("service", c.Service, ServiceConstant)
		onlyOverload("cancellation", c.Cancellation, CancellationIgnored)
	}
	if c.Runs < 1 {
		faults = append(faults, fmt.Errorf("runs: must be 1 or more, is %d", c.Runs))
	}
	if c.Out == "" {
		faults = append(faults, errors.New("out: must name a directory"))
	}
	if c.TimeScale <= 0 || c.TimeScale > 1 {
		faults = append(faults, fmt.Errorf("time-scale: must be more than 0 and at most 1, is %v", c.TimeScale))
	}
	return errors.Join(faults...)
}

// Deps are what the experiment is run with.
type Deps struct {
	Binary  string   // path of sluice, whose commands serve, backend and load are run
	Version string   // of sluice, for the report
	Environ []string // of the processes; settings of Sluice in it are left out, except where the broker is
	Command string   // the command line, for the report
	Stdout  io.Writer
	Stderr  io.Writer // progress
}

// ErrShape is the error of an experiment whose results do not have the expected shape. They are written all the same.
var ErrShape = errors.New("the expected shape is not there")

// ErrBusy is the error of an experiment on a machine that is too busy to measure.
var ErrBusy = errors.New("this machine is too busy to measure")

// Run measures, writes the results to cfg.Out, and prints the verdicts. It blocks for minutes; when ctx ends, it ends the
// processes that it started, removes their data, writes nothing and returns the cause. After any other error the parts that
// are complete are written, with a remark.
func Run(ctx context.Context, cfg Config, deps Deps) (err error) {
	if err := cfg.Validate(); err != nil {
		return err
	}
	if err := os.MkdirAll(cfg.Out, 0o755); err != nil {
		return fmt.Errorf("make the directory of the results: %w", err)
	}
	dir, err := os.MkdirTemp(cfg.Out, ".running-")
	if err != nil {
		return fmt.Errorf("make a directory for the processes: %w", err)
	}
	// Deferred, and not done at the end: it happens after a panic as well.
	defer func() {
		if removed := os.RemoveAll(dir); removed != nil {
			err = errors.Join(err, fmt.Errorf("remove what the processes left: %w", removed))
		}
	}()

	b := &bench{binary: deps.Binary, environ: deps.Environ, dir: dir, broker: cfg.Backend, again: cfg.Runs * mostAgain}
	progress, started := &progress{out: deps.Stderr}, time.Now()
	server, err := brokerServer(ctx, cfg.Backend, deps.Environ)
	if err != nil {
		return err
	}
	machine, err := calibrate(ctx, b, cfg, progress)
	if err != nil {
		return err
	}
	plan := newPlan(cfg, machine)
	result := result{Config: cfg, Machine: machine, Version: deps.Version, Command: deps.Command, Broker: server, Started: started, plan: plan}
	result.Failed = result.measure(ctx, b, progress)
	if result.Failed != nil && (ctx.Err() != nil || len(result.Parts) == 0) {
		return result.Failed
	}
	return errors.Join(result.Failed, result.publish(deps.Stdout))
}

// publish writes the files and prints the verdicts.
func (r *result) publish(stdout io.Writer) error {
	if err := r.write(r.Out); err != nil {
		return err
	}
	return r.conclude(stdout)
}

// plan is what the points of all parts depend on.
type plan struct {
	Config
	workers    int     // of the backend that has a capacity
	memoryRate float64 // orders a second of part memory
}

// newPlan scales the experiment to the machine.
func newPlan(cfg Config, m machine) plan {
	return plan{Config: cfg, workers: m.Workers, memoryRate: memoryLoad(m.Taking)}
}

// latency is the service time of the backend in all parts but memory.
const latency = 50 * time.Millisecond

// capacity is the orders per second that the backend of parts overload and stall can save.
func (p plan) capacity() float64 { return float64(p.workers) / latency.Seconds() }

// has reports whether a part is to be measured.
func (c Config) has(part string) bool { return len(c.Parts) == 0 || slices.Contains(c.Parts, part) }

// seconds is a duration on the scale of the plan.
func (p plan) seconds(n float64) time.Duration {
	return time.Duration(n * p.TimeScale * float64(time.Second)).Round(time.Millisecond)
}

// either is a duration in seconds for the quick experiment, or the one for the full.
func (p plan) either(quick, full float64) time.Duration {
	if p.Quick {
		return p.seconds(quick)
	}
	return p.seconds(full)
}

// parts are the chosen ones, in the order of the story.
func (p plan) parts() []part {
	var chosen []part
	for _, candidate := range parts() {
		if p.has(candidate.name) {
			chosen = append(chosen, candidate)
		}
	}
	return chosen
}

// part is one question to the gateway.
type part struct {
	name, title string
	about       func(p plan) string                // what is done, why, and what is expected, in sentences; what came of it the numbers say
	caveats     func(p plan) []string              // what it does not show
	points      func(p plan) []point               // what to measure
	judge       func(p plan, rows []row) []verdict // the shape that is expected; rows are medians
	tables      func(p plan, rows []row) []table   // rows are medians
	charts      func(p plan, r partResult) []chart // to draw
}

func parts() []part { return []part{overload(), original(), stall(), memory()} }

// PartNames are the names of all parts.
func PartNames() []string {
	var names []string
	for _, p := range parts() {
		names = append(names, p.name)
	}
	return names
}

// verdict is one expected shape, and whether it was there.
type verdict struct {
	Name     string
	Expected string
	Measured string
	OK       bool
	Doubts   []string // the points with a note that it rests on
}

// Told is what was measured, with a mark if it rests on points that have a note.
func (v verdict) Told() string {
	if len(v.Doubts) == 0 {
		return v.Measured
	}
	return v.Measured + noted + " (rests on " + strings.Join(v.Doubts, ", ") + ")"
}

// result is everything that was measured.
type result struct {
	Config
	plan    plan
	Machine machine
	Version string
	Command string
	Broker  string // with the version of its server
	Started time.Time
	Took    time.Duration
	Parts   []partResult
	Failed  error // why there are fewer parts than were asked for
}

// partResult is what was measured in one part.
type partResult struct {
	part
	rows     []row // one for each point and run
	series   []instant
	medians  []row // one for each point
	verdicts []verdict
}

// measure runs all points of all parts. After an error r has the parts that are complete.
func (r *result) measure(ctx context.Context, b *bench, progress *progress) error {
	defer func() { r.Took = time.Since(r.Started) }()
	chosen := r.plan.parts()
	points := make([][]point, len(chosen))
	for i, p := range chosen {
		points[i] = p.points(r.plan)
		for range r.Runs {
			progress.expect(p.name, points[i])
		}
	}
	progress.announce(r.Quick, r.Runs)
	for i, p := range chosen {
		done := partResult{part: p}
		for run := range r.Runs {
			for _, point := range points[i] {
				progress.begin(point)
				m, err := b.measureSoundly(ctx, point, run+1)
				if err != nil {
					return fmt.Errorf("%s: %w", point, err)
				}
				progress.end(m.row)
				done.rows = append(done.rows, m.row)
				done.series = append(done.series, m.series...)
			}
		}
		done.medians = medians(done.rows)
		done.verdicts = p.judge(r.plan, done.medians)
		r.Parts = append(r.Parts, done)
	}
	return nil
}

// conclude prints the verdicts. Its error is ErrShape if one of them is not as expected.
func (r *result) conclude(stdout io.Writer) error {
	var text strings.Builder
	bad, all := 0, 0
	for _, p := range r.Parts {
		text.WriteString("\n" + p.title + "\n")
		for _, v := range p.verdicts {
			mark := "ok "
			if all++; !v.OK {
				mark = "NOT"
				bad++
			}
			text.WriteString("  " + mark + " " + v.Name + ": " + v.Told() + " (expected: " + v.Expected + ")\n")
		}
	}
	for _, remark := range r.remarks() {
		text.WriteString("\n" + remark + "\n")
	}
	text.WriteString("\nThe report is " + filepath.Join(r.Out, r.reportFile()) + "; tables, CSV files and plots are beside it.\n")
	if _, err := io.WriteString(stdout, text.String()); err != nil {
		return fmt.Errorf("print the verdicts: %w", err)
	}
	if bad > 0 {
		return fmt.Errorf("%w: %d of %d checks failed", ErrShape, bad, all)
	}
	return nil
}

// remarks are the reasons not to believe the numbers.
func (r *result) remarks() []string {
	var remarks []string
	if r.Failed != nil {
		remarks = append(remarks, fmt.Sprintf("Incomplete: %d of %d parts, since %s.", len(r.Parts), len(r.plan.parts()), cell(r.Failed.Error())))
	}
	for _, reason := range r.Machine.Busy {
		remarks = append(remarks, "Measured by force on a machine that was too busy: "+reason+".")
	}
	if r.TimeScale != 1 {
		remarks = append(remarks, fmt.Sprintf("All durations were multiplied by %v to test the plumbing; the numbers mean nothing.", r.TimeScale))
	}
	if r.Machine.Workers < fullWorkers {
		remarks = append(remarks, fmt.Sprintf("The machine is slow: overload and stall have a backend of %d workers instead of %d, and less load in proportion.",
			r.Machine.Workers, fullWorkers))
	}
	all, noted, twice := 0, 0, 0
	for _, p := range r.Parts {
		for _, row := range p.rows {
			if all++; row.note != "" {
				noted++
			}
			if row.tries > 1 {
				twice++
			}
		}
	}
	if noted > 0 {
		remarks = append(remarks, fmt.Sprintf("Measurements with a note, which says why not to trust them in full: %d of %d. They are marked with † in tables and checks, hollow in the plots over "+
			"the load, and have their note below the tables and in the CSV files.", noted, all))
	}
	if twice > 0 {
		remarks = append(remarks, fmt.Sprintf("Measured a second time, since they had a note the first time: %d of %d. The better one counts (column tries).", twice, all))
	}
	return remarks
}

// progress tells on one line for each point how far things are.
type progress struct {
	out    io.Writer
	parts  []string
	took   map[string]time.Duration
	left   time.Duration
	points int
	done   int
}

func (p *progress) expect(part string, points []point) {
	if p.took == nil {
		p.took = map[string]time.Duration{}
	}
	if !slices.Contains(p.parts, part) {
		p.parts = append(p.parts, part)
	}
	for _, point := range points {
		p.took[part] += point.expected()
		p.left += point.expected()
	}
	p.points += len(points)
}

// say tells something to whoever watches, who may have gone.
func (p *progress) say(format string, args ...any) { _, _ = fmt.Fprintf(p.out, format, args...) }

func (p *progress) announce(quick bool, runs int) {
	var sums []string
	for _, part := range p.parts {
		sums = append(sums, fmt.Sprintf("%s %s", part, p.took[part].Round(time.Second)))
	}
	kind := "full"
	if quick {
		kind = "quick"
	}
	p.say("%s plan, %d points, runs: %d, about %s (%s)\n", kind, p.points, runs, p.left.Round(time.Second), strings.Join(sums, ", "))
}

func (p *progress) begin(point point) {
	p.done++
	p.say("[%d/%d, %s left] %s\n", p.done, p.points, p.left.Round(time.Second), point)
	p.left -= point.expected()
}

func (p *progress) end(r row) {
	if r.orders > 0 {
		p.say("    %.0f orders a minute%s\n", r.perMinute, remark(r.note))
		return
	}
	p.say("    in time %s/s, saved %s/s, accepted %s of %s/s, p99 %s ms%s\n",
		figure(r.goodput), figure(r.saved), figure(r.accepted), figure(r.offered), figure(r.p99), remark(r.note))
}

func remark(note string) string {
	if note == "" {
		return ""
	}
	return " (" + note + ")"
}
