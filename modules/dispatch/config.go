package dispatch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/units"
	"golang.org/x/net/http/httpguts"
)

// Config says how much the module does at once and how much of the backend's
// answers it keeps.
type Config struct {
	// Concurrency is the most attempts that run at once in this process. At
	// least 1; default 64.
	Concurrency int `koanf:"concurrency"`
	// MaxResponse is how many bytes of the body of an answer are kept; what is
	// beyond them is thrown away and the outcome marked as truncated. 0 keeps
	// none; default 64KiB.
	MaxResponse units.Base2Bytes `koanf:"max_response"`
}

// DefaultConfig returns the defaults named at the fields of Config.
func DefaultConfig() Config {
	return Config{Concurrency: 64, MaxResponse: 64 * units.KiB}
}

// Validate returns all faults at once, each with its key, or nil.
func (c Config) Validate() error {
	var faults []error
	if c.Concurrency < 1 {
		faults = append(faults, fmt.Errorf("dispatch.concurrency: must be at least 1, is %d", c.Concurrency))
	}
	if c.MaxResponse < 0 {
		faults = append(faults, fmt.Errorf("dispatch.max_response: must be at least 0, is %s", c.MaxResponse))
	}
	return errors.Join(faults...)
}

// BackendConfig says where the Backend API is and how it is called.
type BackendConfig struct {
	// URL is what orders are posted to: http or https, with a host. A user and
	// password in it become an Authorization header, unless Headers has one.
	// Default http://localhost:9090/orders.
	URL string `koanf:"url"`
	// Timeout bounds one attempt, from the first connection to the last byte of
	// the answer. Above 0; default 10s.
	Timeout time.Duration `koanf:"timeout"`
	// Headers are sent with every attempt. They cannot replace the headers that
	// Sluice or HTTP itself needs. Default none.
	Headers Headers `koanf:"headers"`
}

// DefaultBackendConfig returns the defaults named at the fields of
// BackendConfig.
func DefaultBackendConfig() BackendConfig {
	return BackendConfig{URL: "http://localhost:9090/orders", Timeout: 10 * time.Second}
}

// Validate returns all faults at once, each with its key, or nil. It shows
// neither the URL, which may hold a password, nor the values of headers.
func (c BackendConfig) Validate() error {
	var faults []error
	if _, err := parseURL(c.URL); err != nil {
		faults = append(faults, fmt.Errorf("backend.url: %w", err))
	}
	if c.Timeout <= 0 {
		faults = append(faults, fmt.Errorf("backend.timeout: must be above 0, is %s", c.Timeout))
	}
	return errors.Join(append(faults, c.Headers.validate()...)...)
}

func parseURL(text string) (*url.URL, error) {
	u, err := url.Parse(text)
	if err != nil {
		// The parser's error quotes the text, which may hold a password.
		return nil, errors.New("is not a URL")
	}
	if u.Scheme != "http" && u.Scheme != "https" {
		return nil, fmt.Errorf("must begin with http:// or https://, its scheme is %q", u.Scheme)
	}
	if u.Hostname() == "" {
		return nil, errors.New("must have a host")
	}
	if port := u.Port(); port != "" {
		if _, err := strconv.ParseUint(port, 10, 16); err != nil {
			return nil, fmt.Errorf("must have a port up to 65535, its port is %s", port)
		}
	}
	return u, nil
}

// secret stands wherever the value of a header would be shown.
const secret = "<secret>"

// Headers are names and values of HTTP header fields. The values count as
// secrets: printed, logged or marshalled, each shows as <secret>.
type Headers map[string]string

// ownHeaders cannot be set by configuration: the first group is the contract
// with the backend, the second belongs to tracing, the third to the framing of
// the message and to the connection, which net/http looks after.
var ownHeaders = []string{
	"Idempotency-Key", "X-Idempotency-Key", "X-Order-Number", "X-Attempt", "Content-Type",
	"Traceparent", "Tracestate", "Baggage",
	"Content-Length", "Content-Encoding", "Transfer-Encoding", "Te", "Trailer", "Expect",
	"Connection", "Proxy-Connection", "Keep-Alive", "Upgrade",
}

func (h Headers) validate() []error {
	var faults []error
	seen := map[string]string{}
	for _, name := range slices.Sorted(maps.Keys(h)) {
		canonical := http.CanonicalHeaderKey(name)
		switch {
		case !httpguts.ValidHeaderFieldName(name):
			faults = append(faults, fmt.Errorf("backend.headers.%s: is not the name of a header", name))
		case slices.Contains(ownHeaders, canonical):
			faults = append(faults, fmt.Errorf("backend.headers.%s: is set by sluice and cannot be configured", name))
		case seen[canonical] != "":
			faults = append(faults, fmt.Errorf("backend.headers.%s: is the same header as backend.headers.%s", name, seen[canonical]))
		case !httpguts.ValidHeaderFieldValue(h[name]):
			faults = append(faults, fmt.Errorf("backend.headers.%s: its value holds characters that a header cannot", name))
		}
		seen[canonical] = name
	}
	return faults
}

// MarshalJSON writes Redacted.
func (h Headers) MarshalJSON() ([]byte, error) { return json.Marshal(h.Redacted()) }

// MarshalYAML returns Redacted, for the YAML packages.
func (h Headers) MarshalYAML() (any, error) { return h.Redacted(), nil }

// LogValue returns String: slog's JSON handler would escape the marshalled form.
func (h Headers) LogValue() slog.Value { return slog.StringValue(h.String()) }

// Redacted returns the names with <secret> in place of each value.
func (h Headers) Redacted() map[string]string {
	redacted := make(map[string]string, len(h))
	for name := range h {
		redacted[name] = secret
	}
	return redacted
}

// String lists the names in order, without the values.
func (h Headers) String() string {
	var b strings.Builder
	b.WriteString("map[")
	for i, name := range slices.Sorted(maps.Keys(h)) {
		if i > 0 {
			b.WriteByte(' ')
		}
		b.WriteString(name + ":" + secret)
	}
	b.WriteByte(']')
	return b.String()
}

// Format writes String for every verb: without it %d, %#v and others would
// print the map with its values.
func (h Headers) Format(f fmt.State, _ rune) {
	_, _ = io.WriteString(f, h.String()) // fmt.State has nowhere to report it
}
