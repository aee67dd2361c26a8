package intake

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/dunglas/httpsfv"
)

// maxIdempotencyKey is the longest Idempotency-Key in characters.
const maxIdempotencyKey = 255

// prefer is what a client asks for with the header Prefer (RFC 7240), as far
// as it is known here.
type prefer struct {
	// wait is how long the client is ready to wait; at most 2³¹ s.
	wait time.Duration
	// hasWait tells wait=0 from no wait at all.
	hasWait bool
	// respondAsync says that the client wants an answer at once.
	respondAsync bool
}

// parsePrefer reads the values of all Prefer headers of a request. Preferences
// never fail a request: what is unknown or malformed is passed over. If a
// preference is repeated, only its first occurrence counts (RFC 7240, section
// 2), even when that one is malformed.
func parsePrefer(values []string) prefer {
	var p prefer
	var waitSeen, asyncSeen bool
	for _, rest := range values {
		for rest != "" {
			var preference string
			preference, rest = cutUnquoted(rest, ',')
			preference, _ = cutUnquoted(preference, ';') // its parameters mean nothing to us
			name, value, _ := strings.Cut(preference, "=")
			name, value = trimBlank(name), trimBlank(value)
			switch {
			case !waitSeen && strings.EqualFold(name, "wait"):
				waitSeen = true
				p.wait, p.hasWait = parseDelay(unquoteWord(value))
			case !asyncSeen && strings.EqualFold(name, "respond-async"):
				asyncSeen = true
				p.respondAsync = unquoteWord(value) == "" // an empty value is none
			}
		}
	}
	return p
}

// parseDelay reads delta-seconds, one or more digits. What is beyond 2³¹ is
// taken for that (RFC 9111, section 1.2.2).
func parseDelay(s string) (time.Duration, bool) {
	if s == "" {
		return 0, false
	}
	const limit = 1 << 31
	var seconds int64
	for _, c := range []byte(s) {
		if c < '0' || c > '9' {
			return 0, false
		}
		seconds = min(seconds*10+int64(c-'0'), limit)
	}
	return time.Duration(seconds) * time.Second, true
}

// cutUnquoted cuts s around the first separator outside of a quoted-string
// (RFC 9110, section 5.6.4). Without one, all of s is before.
func cutUnquoted(s string, separator byte) (before, after string) {
	quoted := false
	for i := 0; i < len(s); i++ {
		switch c := s[i]; {
		case c == '"':
			quoted = !quoted
		case c == '\\' && quoted:
			i++
		case c == separator && !quoted:
			return s[:i], s[i+1:]
		}
	}
	return s, ""
}

// unquoteWord returns what a token or a quoted-string stands for. A malformed
// one is returned as it is: its quotes make it no value that we know.
func unquoteWord(s string) string {
	if len(s) < 2 || s[0] != '"' || s[len(s)-1] != '"' {
		return s
	}
	text := s[1 : len(s)-1]
	if !strings.ContainsAny(text, `"\`) {
		return text
	}
	var b strings.Builder
	for i := 0; i < len(text); i++ {
		switch {
		case text[i] == '"':
			return s
		case text[i] == '\\':
			if i++; i == len(text) {
				return s
			}
		}
		b.WriteByte(text[i])
	}
	return b.String()
}

// trimBlank removes optional white space (RFC 9110, section 5.6.3).
func trimBlank(s string) string { return strings.Trim(s, " \t") }

// parseIdempotencyKey reads the values of all Idempotency-Key headers of a
// request (draft-ietf-httpapi-idempotency-key-header): one string in quotes
// (RFC 9651, section 3.3.3), or the same without quotes as many clients send
// it; "k" and k are the same key. Parameters after the string are allowed and
// mean nothing. The key is "" when there is no header. Error texts are fit for
// a user.
func parseIdempotencyKey(values []string) (string, error) {
	switch len(values) {
	case 0:
		return "", nil
	case 1:
	default:
		return "", fmt.Errorf("there are %d of it, there may be one", len(values))
	}

	key := trimBlank(values[0])
	if strings.HasPrefix(key, `"`) {
		item, err := httpsfv.UnmarshalItem([]string{key})
		if err != nil {
			return "", errors.New("must be one string in quotes, with nothing but visible ASCII characters and spaces in it")
		}
		key, _ = item.Value.(string) // it began with a quote: it is a string
	} else if strings.ContainsFunc(key, notInBareKey) {
		return "", errors.New("must be a string in quotes, or visible ASCII characters without quotes and commas")
	}
	switch {
	case key == "":
		return "", errors.New("must not be empty")
	case len(key) > maxIdempotencyKey:
		return "", fmt.Errorf("must have at most %d characters, has %d", maxIdempotencyKey, len(key))
	}
	return key, nil
}

// notInBareKey reports whether a key with r in it needs quotes.
func notInBareKey(r rune) bool {
	return r <= ' ' || r > '~' || r == '"' || r == ','
}
