package intake

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"mime"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/google/uuid"

	"sluice/modules/contract"
)

// order is one row: what the client sent, where its life stands, and what the
// relay has to do for it.
type order struct {
	ID    uuid.UUID // UUIDv7, so it sorts by time of acceptance
	Owner string    // name of the API key that sent it, "" without keys

	Number         string // natural key, "" where there is none
	NumberReleased bool   // another order may take Number: this one was rejected
	IdempotencyKey string // "" when the client sent none

	ContentType string
	Body        []byte   // as the client sent it; only due loads it
	Size        int      // of Body in bytes
	Hash        [32]byte // of Body as a JSON value

	Status      contract.Status
	Attempts    int // finished ones
	AttemptBase int // attempts that a replay wiped off the limit
	History     []attempt
	historySize int // as it was read from a database, in bytes

	AcceptedAt time.Time
	UpdatedAt  time.Time
	FinishedAt time.Time // zero until Status is final

	// PublishAt is when the relay is to publish the order (or, once it is
	// dead, the news of that); zero when there is nothing to publish.
	PublishAt time.Time
	// Direct marks an order that POST /orders/sync is calling the backend for.
	// Nobody was promised anything yet: if the call fails, the order goes.
	Direct bool

	TraceParent string // W3C Trace Context of the request that brought it
	TraceState  string

	BackendStatus int // of the last answer, 0 when there was none
	BackendType   string
	BackendBody   []byte
	Problem       []byte // why a final order is not saved, a JSON object
}

// attempt is one line of an order's history.
type attempt struct {
	Number        int        `json:"number"`
	StartedAt     time.Time  `json:"startedAt"`
	Duration      string     `json:"duration"`
	Status        int        `json:"status,omitempty"`
	Error         string     `json:"error,omitempty"`
	NextAttemptAt *time.Time `json:"nextAttemptAt"`
}

// historyLimit is beyond how many attempts an order forgets those before its
// last replay; replayed again and again it would otherwise grow without end. Of
// those since then, which dispatch.max_attempts bounds, it forgets none.
const historyLimit = 100

// newID returns a UUIDv7 (RFC 9562, section 5.7).
func newID() (uuid.UUID, error) {
	id, err := uuid.NewV7()
	if err != nil {
		return uuid.Nil, fmt.Errorf("make an order id: %w", err)
	}
	return id, nil
}

// verdict is what an update function decides about an order.
type verdict int

const (
	leave  verdict = iota // nothing changed
	save                  // write the changed order
	remove                // delete the order
)

// due reports whether the relay has to publish the order at time now.
func (o *order) due(now time.Time) bool {
	return !o.PublishAt.IsZero() && !o.PublishAt.After(now)
}

// adopt makes an asynchronous order of one that a direct call is under way
// for, if repeat is the same order from a second client. That one is answered
// 202: from then on the order is promised, and must outlive a failure of the
// direct call. PublishAt stays at the end of that call's lease.
func (o *order) adopt(repeat *order) verdict {
	if !o.Direct || o.Hash != repeat.Hash {
		return leave
	}
	o.Direct = false
	return save
}

// takesKey reports whether a repetition of the order brings it an idempotency key
// and it has none: from then on that is its key, and whoever uses it for another
// order learns so.
func (o *order) takesKey(repeat *order) bool {
	return o.IdempotencyKey == "" && repeat.IdempotencyKey != "" && o.Hash == repeat.Hash
}

// apply is the state machine: it changes the order as an attempt's outcome
// says. An outcome that was seen before, or that is older than what is known,
// changes nothing, except that news of a save counts until the backend has
// given a final answer: it has the order, whatever a twin of the attempt
// reported.
func (o *order) apply(out contract.Outcome, now time.Time, retry RetryConfig) verdict {
	late := out.Attempt <= o.Attempts || o.Status.Final()
	switch {
	case out.Type == contract.TypeDead:
		return leave // our own announcement, coming back
	case o.Status == contract.StatusSaved || o.Status == contract.StatusRejected:
		return leave
	case late && out.Type != contract.TypeSaved:
		return leave
	}

	o.Attempts = max(o.Attempts, out.Attempt)
	o.Direct = false
	o.UpdatedAt = now
	o.BackendStatus, o.BackendType, o.BackendBody = out.StatusCode, out.ContentType, out.Body
	o.PublishAt = time.Time{}
	o.FinishedAt = time.Time{}

	switch out.Type {
	case contract.TypeSaved:
		o.Status = contract.StatusSaved
		o.FinishedAt = now
		o.Problem = nil
	case contract.TypeRejected:
		o.Status = contract.StatusRejected
		o.FinishedAt = now
		o.NumberReleased = true
		o.Problem = rejection(out)
	case contract.TypeAttemptFailed:
		if tries := o.Attempts - o.AttemptBase; tries >= retry.MaxAttempts {
			o.Status = contract.StatusDead
			o.FinishedAt = now
			o.PublishAt = now // the news wants publishing
			o.Problem = exhausted(out, tries)
			break
		}
		o.Status = contract.StatusRetrying
		o.PublishAt = now.Add(pause(o.Attempts-o.AttemptBase, out.RetryAfter, retry))
	}
	o.remember(out)
	return save
}

func (o *order) remember(out contract.Outcome) {
	entry := attempt{
		Number:    out.Attempt,
		StartedAt: out.StartedAt.UTC(),
		Duration:  out.Duration.Round(10 * time.Microsecond).String(),
		Status:    out.StatusCode,
		Error:     out.Error,
	}
	if o.Status == contract.StatusRetrying {
		next := o.PublishAt.UTC()
		entry.NextAttemptAt = &next
	}
	o.History = append(o.History, entry)
	for len(o.History) > historyLimit && o.History[0].Number <= o.AttemptBase {
		o.History = o.History[1:]
	}
}

// nextAttempt returns when the order is to be tried again, or the zero time.
// PublishAt does not say so: a relay that works on the order moves it.
func (o *order) nextAttempt() time.Time {
	n := len(o.History)
	if o.Status != contract.StatusRetrying || n == 0 || o.History[n-1].NextAttemptAt == nil {
		return time.Time{}
	}
	return *o.History[n-1].NextAttemptAt
}

// replay gives a dead order a fresh set of attempts, beginning at once.
func (o *order) replay(now time.Time) verdict {
	if o.Status != contract.StatusDead {
		return leave
	}
	o.Status = contract.StatusRetrying
	o.AttemptBase = o.Attempts
	o.FinishedAt = time.Time{}
	o.UpdatedAt = now
	o.PublishAt = now
	o.Problem = nil
	return save
}

// pause returns how long to wait after the given number of failed tries:
// exponential backoff with full jitter (M. Brooker, "Exponential Backoff And
// Jitter", AWS Architecture Blog 2015), and never less than the backend asked
// for (RFC 9110, section 10.2.3).
func pause(tries int, retryAfter time.Duration, retry RetryConfig) time.Duration {
	ceiling := retry.RetryMax
	if shift := tries - 1; shift < 62 {
		if d := retry.RetryInitial << shift; d > 0 && d>>shift == retry.RetryInitial {
			ceiling = min(ceiling, d)
		}
	}
	return max(retryAfter, rand.N(ceiling+1))
}

// submitted returns the event by which dispatch is asked for the next attempt.
func (o *order) submitted() contract.Submitted {
	return contract.Submitted{
		OrderID:     o.ID.String(),
		OrderNumber: o.Number,
		Attempt:     o.Attempts + 1,
		ContentType: o.ContentType,
		AcceptedAt:  o.AcceptedAt,
		Body:        o.Body,
	}
}

// dead returns the event which says that the order will not be tried again.
func (o *order) dead() contract.Outcome {
	out := contract.Outcome{
		Type:        contract.TypeDead,
		OrderID:     o.ID.String(),
		OrderNumber: o.Number,
		Attempt:     o.Attempts,
		StartedAt:   o.UpdatedAt,
		StatusCode:  o.BackendStatus,
	}
	if n := len(o.History); n > 0 {
		out.Error = o.History[n-1].Error
	}
	return out
}

// traceID returns the trace of the request that brought the order: the second
// field of its traceparent (W3C Trace Context, section 3.2.2), or "".
func (o *order) traceID() string {
	if parts := strings.Split(o.TraceParent, "-"); len(parts) >= 4 {
		return parts[1]
	}
	return ""
}

// rejection returns the problem of an order that the backend refused: the
// backend's own document where it sent one.
func rejection(out contract.Outcome) []byte {
	if doc, ok := problemOf(out); ok {
		return doc
	}
	return problemRejected(out).JSON()
}

// exhausted returns the problem of an order whose last attempt failed.
func exhausted(out contract.Outcome, tries int) []byte {
	if doc, ok := problemOf(out); ok {
		return doc
	}
	return problemExhausted(out, tries).JSON()
}

// problemOf returns the problem document (RFC 9457) that the backend sent.
func problemOf(out contract.Outcome) ([]byte, bool) {
	mediaType, _, err := mime.ParseMediaType(out.ContentType)
	if err != nil || mediaType != "application/problem+json" || out.Truncated || !utf8.Valid(out.Body) {
		return nil, false
	}
	var members map[string]json.RawMessage
	if json.Unmarshal(out.Body, &members) != nil || members == nil {
		return nil, false
	}
	return out.Body, true
}
