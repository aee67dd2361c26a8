package httpserver

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"errors"
	"fmt"
	"net/http"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/metric"
)

// Client is who sent a request: the owner of one or several API keys, or
// anybody where there are no keys. All who use a name share one Client, and
// with it one rate limit.
type Client struct {
	name  string
	limit *rateLimit // nil without a limit
}

// clientKey is the key of the *Client in a request's context.
type clientKey struct{}

// ClientName returns the name of the API key that a request came with. It is
// "" where there are no keys. ctx is that of the request, behind Admission.
func ClientName(ctx context.Context) string { return clientOf(ctx).name }

// clientOf never returns nil.
func clientOf(ctx context.Context) *Client {
	if client, ok := ctx.Value(clientKey{}).(*Client); ok {
		return client
	}
	return &Client{}
}

// Admission lets requests through to next that come with one of the keys of
// http.api_keys, and answers the others 401. Without keys everybody is let
// through. What open returns true for needs no key; it is asked only about
// requests without a valid one. Handlers find the client by the request's
// context: see ClientName and RateLimited.
//
// It goes around the mux and all of its routes, so that a route which somebody
// adds needs a key unless open says otherwise, and so that a stranger does not
// learn which paths there are. cfg must be valid.
func Admission(cfg Config, meter metric.Meter, open func(*http.Request) bool, next http.Handler) (http.Handler, error) {
	keys, faults := cfg.APIKeys.parse()
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	if len(keys) == 0 {
		if cfg.RateLimit == 0 {
			return next, nil
		}
		anybody := &Client{limit: newRateLimit(cfg)}
		return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), clientKey{}, anybody)))
		}), nil
	}
	refused, err := meter.Int64Counter("sluice.http.unauthorized", metric.WithDescription("Requests without a valid API key."), metric.WithUnit("{request}"))
	if err != nil {
		return nil, fmt.Errorf("register metrics: %w", err)
	}
	ring := newKeyring(cfg, keys)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		client, problem := ring.authenticate(r.Header.Values("Authorization"))
		switch {
		case client != nil:
			next.ServeHTTP(w, r.WithContext(context.WithValue(r.Context(), clientKey{}, client)))
		case open(r):
			next.ServeHTTP(w, r)
		default:
			refused.Add(r.Context(), 1, metric.WithAttributes(attribute.String("reason", problem.reason)))
			w.Header().Set("WWW-Authenticate", problem.challenge())
			WriteProblem(w, r, Problem{Type: "unauthorized", Title: "The request needs a valid API key", Status: http.StatusUnauthorized, Detail: problem.detail})
		}
	}), nil
}

// keyring knows the clients by their keys.
type keyring struct {
	keys    []apiKey
	clients []*Client // clients[i] has keys[i]
}

func newKeyring(cfg Config, keys []apiKey) *keyring {
	ring := &keyring{keys: keys}
	named := map[string]*Client{}
	for _, key := range keys {
		if named[key.name] == nil {
			named[key.name] = &Client{name: key.name, limit: newRateLimit(cfg)}
		}
		ring.clients = append(ring.clients, named[key.name])
	}
	return ring
}

// authenticate returns the client that the values of all Authorization fields
// of a request name, or what is wrong with them.
func (ring *keyring) authenticate(fields []string) (*Client, refusal) {
	token, problem := parseBearer(fields)
	if problem != (refusal{}) {
		return nil, problem
	}
	// The hash is compared with all others in full, so the time that it takes
	// says neither whether nor where there is one like it. (Of a long random key
	// its hash's first digits would give nothing away. Of a short one that
	// somebody has chosen they would.)
	hash := sha256.Sum256([]byte(token))
	match := -1
	for i := range ring.keys {
		match = subtle.ConstantTimeSelect(subtle.ConstantTimeCompare(hash[:], ring.keys[i].hash[:]), i, match)
	}
	if match < 0 {
		return nil, refusal{"unknown-key", "invalid_token", "nobody here has this API key"}
	}
	return ring.clients[match], refusal{}
}

// refusal is why a request is not let through.
type refusal struct {
	reason string // for metrics
	code   string // of RFC 6750, section 3.1; "" if no token was sent
	detail string // for a person to read
}

// challenge is the value of WWW-Authenticate. A request that did not try to
// authenticate is told no error (RFC 6750, section 3.1).
func (f refusal) challenge() string {
	if f.code == "" {
		return `Bearer realm="sluice"`
	}
	return `Bearer realm="sluice", error="` + f.code + `"`
}

const scheme = "Bearer"

// parseBearer reads the values of all Authorization fields of a request: there
// must be one, with the scheme in any case and one b64token (RFC 9110, section
// 11.4; RFC 6750, section 2.1). It returns the zero refusal with a token that
// is not empty.
func parseBearer(fields []string) (token string, problem refusal) {
	switch len(fields) {
	case 0:
		return "", refusal{"no-key", "", "send a key as Authorization: Bearer <key>"}
	case 1:
	default:
		return "", refusal{"malformed", "invalid_request", fmt.Sprintf("there are %d Authorization fields, there may be one", len(fields))}
	}
	name, rest, _ := strings.Cut(trimBlank(fields[0]), " ")
	if !strings.EqualFold(name, scheme) {
		return "", refusal{"no-key", "", "the Authorization field has another scheme; send a key as Authorization: Bearer <key>"}
	}
	token = strings.Trim(rest, " ")
	if !isB64Token(token) {
		return "", refusal{"malformed", "invalid_request", "behind Bearer there must be one key: letters, digits and - . _ ~ + /, with = only at its end"}
	}
	return token, refusal{}
}

// isB64Token reports whether s is a b64token (RFC 6750, section 2.1).
func isB64Token(s string) bool {
	s = strings.TrimRight(s, "=")
	return s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		switch {
		case 'a' <= r && r <= 'z', 'A' <= r && r <= 'Z', '0' <= r && r <= '9':
			return false
		default:
			return !strings.ContainsRune("-._~+/", r)
		}
	})
}

// trimBlank removes optional white space (RFC 9110, section 5.6.3).
func trimBlank(s string) string { return strings.Trim(s, " \t") }

// Pages returns a function that is true for GET and HEAD of these paths; one
// that ends in a slash stands for all below it. A path is taken as it was sent:
// one that a mux would clean first ("/docs/../orders") is none of them.
func Pages(paths ...string) func(*http.Request) bool {
	return func(r *http.Request) bool {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			return false
		}
		path := r.URL.EscapedPath()
		if strings.ContainsAny(path, "%\\") || strings.Contains(path, "//") || strings.Contains(path, "/.") {
			return false
		}
		for _, page := range paths {
			if path == page || strings.HasSuffix(page, "/") && strings.HasPrefix(path, page) {
				return true
			}
		}
		return false
	}
}
