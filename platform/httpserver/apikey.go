package httpserver

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"regexp"
	"strings"
)

const keyAPIKeys = "http.api_keys"

// APIKeys are the entries of http.api_keys, each name:sha256hex: the name of a
// client, and the SHA-256 of a key of its. A client with several entries may
// use any of those keys. The hashes count as secrets: printed, logged or
// marshalled, each shows as <secret>.
type APIKeys []string

// apiKey is one entry, parsed.
type apiKey struct {
	name string
	hash [sha256.Size]byte
}

// clientName is what the name of a client looks like. It is shorter than a
// hash, so that name and hash cannot be mistaken for each other.
var clientName = regexp.MustCompile(`^[A-Za-z0-9._-]{1,40}$`)

// NewAPIKey makes a key for the client of this name, with 256 random bits, and
// the entry of http.api_keys that knows it.
func NewAPIKey(name string) (key, entry string, err error) {
	if !clientName.MatchString(name) {
		return "", "", errName
	}
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never an error, says its documentation
	key = hex.EncodeToString(secret)
	hash := sha256.Sum256([]byte(key))
	return key, name + ":" + hex.EncodeToString(hash[:]), nil
}

var (
	errName  = errors.New("the name must be 1 to 40 characters of A-Z, a-z, 0-9, '.', '_' and '-'")
	errHash  = errors.New("must be name:sha256hex, with the 64 hex digits of the key's SHA-256 behind the colon")
	errEmpty = errors.New("is the SHA-256 of an empty key")
)

// parseAPIKey reads one entry. Its errors show nothing of it: somebody may have
// written the key itself where the hash belongs.
func parseAPIKey(entry string) (apiKey, error) {
	name, digits, found := strings.Cut(entry, ":")
	if !found {
		return apiKey{}, errHash
	}
	if !clientName.MatchString(name) {
		return apiKey{}, errName
	}
	key := apiKey{name: name}
	if n, err := hex.Decode(key.hash[:], []byte(digits[:min(len(digits), 2*sha256.Size)])); err != nil || n != sha256.Size || len(digits) != 2*sha256.Size {
		return apiKey{name: name}, errHash
	}
	if key.hash == sha256.Sum256(nil) {
		return apiKey{name: name}, errEmpty
	}
	return key, nil
}

// parse returns the keys, or every fault of the entries, each with its place.
func (k APIKeys) parse() ([]apiKey, []error) {
	var keys []apiKey
	var faults []error
	first := map[[sha256.Size]byte]int{} // entry by hash
	for i, entry := range k {
		key, err := parseAPIKey(entry)
		// A name that is none may be a secret in the wrong place.
		place := fmt.Sprintf("%s: entry %d", keyAPIKeys, i+1)
		if key.name != "" {
			place += fmt.Sprintf(" (%s)", key.name)
		}
		if err != nil {
			faults = append(faults, fmt.Errorf("%s: %w", place, err))
			continue
		}
		if j, taken := first[key.hash]; taken {
			faults = append(faults, fmt.Errorf("%s: has the same key as entry %d", place, j))
			continue
		}
		first[key.hash] = i + 1
		keys = append(keys, key)
	}
	return keys, faults
}

// Names returns how many clients have a key.
func (k APIKeys) Names() int {
	names := map[string]bool{}
	for _, entry := range k {
		name, _, _ := strings.Cut(entry, ":")
		names[name] = true
	}
	return len(names)
}

// Redacted returns the entries with <secret> in place of each hash, and in
// place of a whole entry that is not valid.
func (k APIKeys) Redacted() []string {
	redacted := make([]string, len(k))
	for i, entry := range k {
		redacted[i] = "<secret>"
		if key, err := parseAPIKey(entry); err == nil {
			redacted[i] = key.name + ":<secret>"
		}
	}
	return redacted
}

// MarshalJSON writes Redacted.
func (k APIKeys) MarshalJSON() ([]byte, error) { return json.Marshal(k.Redacted()) }

// LogValue returns Redacted.
func (k APIKeys) LogValue() slog.Value { return slog.AnyValue(k.Redacted()) }

// Format writes Redacted for every verb.
func (k APIKeys) Format(f fmt.State, _ rune) {
	_, _ = io.WriteString(f, fmt.Sprint(k.Redacted())) // fmt.State has nowhere to report it
}
