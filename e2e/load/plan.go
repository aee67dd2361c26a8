package load

import (
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"strconv"
	"strings"
	"time"
)

// Bounds of a plan. Beyond them a plan is taken for a slip of the pen.
const (
	maxRate     = 1_000_000 // a second
	maxBurst    = 1_000_000
	maxDuration = 24 * time.Hour
)

// Plan says when orders arrive, whatever becomes of them: one phase after the other.
type Plan []Phase

// Phase is a part of a plan: a rate that is held or that changes evenly from From to To, in orders a second, for Duration;
// or, if Burst is not 0, that many orders at one instant.
type Phase struct {
	From, To float64
	Duration time.Duration
	Burst    int
}

// ParsePlan reads a plan: phases with commas between them, each one of
//
//	500/s:30s            500 orders a second for 30 s; steps are several of these
//	100/s-1000/s:60s     from 100 a second to 1000 a second, growing evenly over 60 s
//	burst 5000           5000 orders at one instant
//
// A rate can be 0/s, which is a pause, and have decimals. The error names the phase and what is wrong with it.
func ParsePlan(text string) (Plan, error) {
	var plan Plan
	for i, part := range strings.Split(text, ",") {
		phase, err := parsePhase(strings.TrimSpace(part))
		if err != nil {
			return nil, fmt.Errorf("phase %d, %q: %w", i+1, strings.TrimSpace(part), err)
		}
		plan = append(plan, phase)
	}
	if err := plan.validate(); err != nil {
		return nil, err
	}
	return plan, nil
}

func parsePhase(text string) (Phase, error) {
	if count, ok := strings.CutPrefix(text, "burst"); ok {
		return parseBurst(strings.TrimSpace(count))
	}
	rates, duration, ok := strings.Cut(text, ":")
	if !ok {
		return Phase{}, errors.New("is neither a rate with a duration, such as 500/s:30s or 100/s-1000/s:60s, nor a burst, such as burst 5000")
	}
	var phase Phase
	var err error
	from, to, ramp := strings.Cut(rates, "/s-")
	if ramp {
		from += "/s"
	}
	if phase.From, err = parseRate(from); err != nil {
		return Phase{}, err
	}
	phase.To = phase.From
	if ramp {
		if phase.To, err = parseRate(to); err != nil {
			return Phase{}, err
		}
	}
	phase.Duration, err = time.ParseDuration(strings.TrimSpace(duration))
	if err != nil || phase.Duration <= 0 || phase.Duration > maxDuration {
		return Phase{}, fmt.Errorf("%q is not a duration such as 30s or 5m, more than 0 and at most %v", strings.TrimSpace(duration), maxDuration)
	}
	return phase, nil
}

func parseBurst(count string) (Phase, error) {
	n, err := strconv.Atoi(count)
	if err != nil || n < 1 || n > maxBurst {
		return Phase{}, fmt.Errorf("%q is not a number of orders from 1 to %d", count, maxBurst)
	}
	return Phase{Burst: n}, nil
}

func parseRate(text string) (float64, error) {
	text = strings.TrimSpace(text)
	number, ok := strings.CutSuffix(text, "/s")
	rate, err := strconv.ParseFloat(number, 64)
	if !ok || err != nil || !validRate(rate) {
		return 0, fmt.Errorf("%q is not a rate such as 500/s, from 0 to %d", text, maxRate)
	}
	return math.Abs(rate), nil // -0 is 0
}

// validRate is false for NaN as well.
func validRate(rate float64) bool { return rate >= 0 && rate <= maxRate }

func (p Plan) validate() error {
	if p.Duration() > maxDuration {
		return fmt.Errorf("lasts %v, more than %v", p.Duration(), maxDuration)
	}
	for _, phase := range p {
		if phase.Burst > 0 || phase.From > 0 || phase.To > 0 {
			return nil
		}
	}
	return errors.New("has no orders")
}

// Duration is how long orders arrive; a burst takes no time.
func (p Plan) Duration() time.Duration {
	var sum time.Duration
	for _, phase := range p {
		sum += phase.Duration
	}
	return sum
}

// String returns the plan as ParsePlan reads it.
func (p Plan) String() string {
	parts := make([]string, 0, len(p))
	for _, phase := range p {
		parts = append(parts, phase.String())
	}
	return strings.Join(parts, ", ")
}

// String returns the phase as ParsePlan reads it.
func (p Phase) String() string {
	rate := func(r float64) string { return strconv.FormatFloat(r, 'f', -1, 64) + "/s" }
	switch {
	case p.Burst > 0:
		return "burst " + strconv.Itoa(p.Burst)
	case p.From == p.To:
		return rate(p.From) + ":" + p.Duration.String()
	default:
		return rate(p.From) + "-" + rate(p.To) + ":" + p.Duration.String()
	}
}

// burstPace is what the generator asks of itself in a burst: 20,000 orders a second.
const burstPace = 50 * time.Microsecond

// arrival is when an order is meant to be sent.
type arrival struct {
	at time.Duration // since the start
	// grace is what nobody can keep to: an order of a burst may wait for those before it.
	grace time.Duration
}

// schedule goes through the arrivals of a plan in the order of their times.
//
// Between bursts it turns a count into a time: an order arrives whenever the area under the rate has grown by the next
// step, which is 1 for constant arrivals and exponentially distributed for Poisson ones, whatever the rate does meanwhile.
type schedule struct {
	plan  Plan
	step  func() float64
	begun time.Duration // when plan[0] begins
	area  float64       // under the rate, from there to the next arrival
	burst int           // how many orders of plan[0] were handed out, if it is a burst
}

// newSchedule has the first of constant arrivals come at once.
func newSchedule(plan Plan, arrivals string, random *rand.Rand) *schedule {
	s := &schedule{plan: plan, step: func() float64 { return 1 }}
	if arrivals == Poisson {
		s.step = random.ExpFloat64
		s.area = s.step()
	}
	return s
}

// next returns the next arrival; ok is false when there are no more.
func (s *schedule) next() (a arrival, ok bool) {
	for len(s.plan) > 0 {
		phase := s.plan[0]
		if s.burst < phase.Burst {
			s.burst++
			return arrival{at: s.begun, grace: time.Duration(s.burst) * burstPace}, true
		}
		// A hair less than the whole, or rounding would now and then put one order too many at the very end.
		if whole := phase.area(); s.area < whole-1e-9*max(1, whole) {
			at := s.begun + phase.reaches(s.area)
			s.area += s.step()
			return arrival{at: at}, true
		}
		s.area = max(0, s.area-phase.area())
		s.begun += phase.Duration
		s.burst = 0
		s.plan = s.plan[1:]
	}
	return arrival{}, false
}

// area is the number of orders that a phase with a rate stands for.
func (p Phase) area() float64 { return (p.From + p.To) / 2 * p.Duration.Seconds() }

// reaches returns after what time the area under the rate is as given. It is the solution of a quadratic equation, in the
// form that also holds where the rate does not change.
func (p Phase) reaches(area float64) time.Duration {
	if area == 0 {
		return 0
	}
	slope := (p.To - p.From) / p.Duration.Seconds()
	root := math.Sqrt(max(0, p.From*p.From+2*slope*area))
	return time.Duration(min(2*area/(p.From+root)*float64(time.Second), float64(p.Duration)))
}
