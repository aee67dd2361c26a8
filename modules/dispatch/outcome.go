package dispatch

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"syscall"
	"time"

	"sluice/modules/contract"
)

// answer is what came of one call: all, part or nothing of the backend's answer.
type answer struct {
	status      int // 0 when no answer came
	contentType string
	body        []byte
	truncated   bool          // there was more than was kept
	retryAfter  time.Duration // as the answer asks, whatever its status

	err      error // why there is no answer, or only part of one
	timedOut bool  // err came of backend.timeout
}

// decide turns an answer into the outcome's type and its one-line reason. It is
// the only place that knows which answers save an order, which refuse it for
// good and which are worth another attempt.
//
// An answer that breaks off is a failed attempt whatever its status: an
// incomplete message is not the backend's word (RFC 9112 section 8), and
// breaking off is how servers and proxies report a failure once the status line
// is out. The order is attempted again, under the same Idempotency-Key, rather
// than taken for saved on half an answer. What lies beyond
// dispatch.max_response does not count: such an answer is complete for us.
func decide(a answer, backend string, timeout time.Duration) (outcome, reason string) {
	answered := "backend answered " + statusLine(a.status)
	switch s := a.status; {
	case a.timedOut && s == 0:
		return contract.TypeAttemptFailed, fmt.Sprintf("backend did not answer within %s", timeout)
	case a.timedOut:
		return contract.TypeAttemptFailed, fmt.Sprintf("backend did not finish its answer %s within %s", statusLine(s), timeout)
	case a.err != nil && s == 0:
		return contract.TypeAttemptFailed, describe(a.err, backend)
	case a.err != nil:
		return contract.TypeAttemptFailed, fmt.Sprintf("backend broke off its answer %s", statusLine(s))

	case s == http.StatusRequestTimeout, // RFC 9110 section 15.5.9: the client may repeat the request
		s == http.StatusTooEarly,        // RFC 8470 section 5.2: may be repeated later
		s == http.StatusTooManyRequests: // RFC 6585 section 4: too many for now
		return contract.TypeAttemptFailed, answered

	case s >= 200 && s <= 299: // RFC 9110 section 15.3: received, understood and accepted
		return contract.TypeSaved, ""
	case s >= 400 && s <= 499: // section 15.5: the request is at fault, the same one would fail again
		return contract.TypeRejected, answered
	case s >= 500 && s <= 599: // section 15.6: the backend is at fault
		return contract.TypeAttemptFailed, answered
	case s >= 300 && s <= 399: // section 15.4: redirects are not followed, the backend may be on the move
		return contract.TypeAttemptFailed, answered
	case s >= 100 && s <= 199: // section 15.2: only an unasked-for 101 gets here, the others precede the answer
		return contract.TypeAttemptFailed, answered
	default: // section 15: not a valid status code, to be treated like a 5xx
		return contract.TypeAttemptFailed, answered
	}
}

// statusLine uses the standard's words, not the backend's, which could be
// anything.
func statusLine(status int) string {
	return strings.TrimSpace(fmt.Sprintf("%d %s", status, http.StatusText(status)))
}

// describe says in one line, for users, why no answer came. The backend is
// named by host and port alone; nothing here may show the rest of its URL.
func describe(err error, backend string) string {
	var (
		op  *net.OpError
		dns *net.DNSError
	)
	isOp := errors.As(err, &op)
	switch {
	case isOp && op.Op == "proxyconnect":
		return "connect to the proxy for the backend: " + oneLine(op.Err)
	case isAny(err, refused):
		return "connection refused by backend at " + backend
	case errors.As(err, &dns) && dns.IsNotFound:
		return "backend host not found: " + dns.Name
	case errors.As(err, &dns):
		return fmt.Sprintf("look up backend host %s: %s", dns.Name, dns.Err)
	case isOp && op.Op == "dial":
		return fmt.Sprintf("connect to backend at %s: %s", backend, oneLine(op.Err))
	case isAny(err, closed), strings.Contains(err.Error(), "server closed idle connection"): // net/http exports no value for it
		return fmt.Sprintf("backend at %s closed the connection without an answer", backend)
	default:
		return fmt.Sprintf("call backend at %s: %s", backend, oneLine(err))
	}
}

// refused and closed hold the numbers of Windows (WSAECONNREFUSED and so on)
// beside the names of the others: the syscall package gives the names other
// values there than the system does.
var (
	refused = []error{syscall.ECONNREFUSED, syscall.Errno(10061)}
	closed  = []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE, syscall.Errno(10053), syscall.Errno(10054)}
)

func isAny(err error, targets []error) bool {
	for _, target := range targets {
		if errors.Is(err, target) {
			return true
		}
	}
	return false
}

// maxReason bounds texts that we did not write: net/http quotes up to a whole
// line of a malformed answer.
const maxReason = 256

func oneLine(err error) string {
	text := strings.Join(strings.Fields(err.Error()), " ")
	if len(text) > maxReason {
		text = strings.ToValidUTF8(text[:maxReason], "") + "…"
	}
	return text
}
