package httpserver

import (
	"context"
	"fmt"
	"math"
	"net/http"
	"strconv"
	"time"

	"golang.org/x/time/rate"
)

// rateLimit is one client's bucket of tokens, one for each order: it holds
// http.rate_burst of them and is filled at http.rate_limit.
type rateLimit struct {
	bucket *rate.Limiter
	policy string // the field RateLimit-Policy
}

// policyName stands in both fields. There is one policy.
const policyName = `"default"`

func newRateLimit(cfg Config) *rateLimit {
	if cfg.RateLimit == 0 {
		return nil
	}
	burst := max(cfg.RateLimit, cfg.RateBurst)
	// The window is as long as the bucket takes to fill, so that the policy
	// never promises more than the rate.
	window := (burst + cfg.RateLimit - 1) / cfg.RateLimit
	return &rateLimit{
		bucket: rate.NewLimiter(rate.Limit(cfg.RateLimit), burst),
		policy: fmt.Sprintf("%s;q=%d;w=%d", policyName, burst, window),
	}
}

// RateLimited serves h as long as the client is within its rate limit, and
// answers 429 beyond that, before anything of the body is read. All answers say
// what is left. Without a limit it does nothing.
func RateLimited(h http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		limit := clientOf(r.Context()).limit
		if limit == nil {
			h(w, r)
			return
		}
		t := time.Now()
		if limit.bucket.AllowN(t, 1) {
			limit.describe(w.Header(), t)
			h(w, r)
			return
		}
		seconds := limit.describe(w.Header(), t)
		w.Header().Set("Retry-After", strconv.Itoa(seconds))
		WriteProblem(w, r, Problem{Type: "rate-limited", Title: "Too many orders in too short a time", Status: http.StatusTooManyRequests,
			Detail: fmt.Sprintf("%v orders a second are allowed (http.rate_limit); this one was not accepted, send it again later", limit.bucket.Limit())})
	}
}

// DescribeRate sets the fields RateLimit-Policy and RateLimit of an answer, as
// RateLimited does, for a handler that waits with WaitRate instead.
func DescribeRate(w http.ResponseWriter, r *http.Request) {
	if limit := clientOf(r.Context()).limit; limit != nil {
		limit.describe(w.Header(), time.Now())
	}
}

// WaitRate blocks until the client may send n more orders, for a request that
// brings many: to read no further is what tells its sender to slow down. It
// returns an error only when ctx, that of the request, ends before, or must. Requests of
// the same client that ask at the same time are served in turn.
func WaitRate(ctx context.Context, n int) error {
	limit := clientOf(ctx).limit
	if limit == nil {
		return nil
	}
	for n > 0 {
		piece := min(n, limit.bucket.Burst())
		if err := limit.bucket.WaitN(ctx, piece); err != nil {
			return fmt.Errorf("wait for the rate limit: %w", err)
		}
		n -= piece
	}
	return nil
}

// describe sets the fields of draft-ietf-httpapi-ratelimit-headers-11: the
// policy, and how many orders are left for so many seconds. It returns the
// seconds, at least one, in which there will be one if there is none now.
func (l *rateLimit) describe(header http.Header, t time.Time) (seconds int) {
	tokens := l.bucket.TokensAt(t)
	seconds = max(1, int(math.Ceil((1-tokens)/float64(l.bucket.Limit()))))
	header.Set("RateLimit-Policy", l.policy)
	header.Set("RateLimit", fmt.Sprintf("%s;r=%d;t=%d", policyName, max(0, int(tokens)), seconds))
	return seconds
}
