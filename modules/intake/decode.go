package intake

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"
	"sync"
	"unicode"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

const (
	// maxDepth is how deep the arrays and objects of an order may be nested.
	// It bounds the stack of everything that walks through an order.
	maxDepth = 64
	// maxExponentDigits is how long the exponent of a number may be, leading
	// zeros aside, so that it can be computed with in an int64.
	maxExponentDigits = 18
	// maxNaturalKey is the longest natural key in bytes.
	maxNaturalKey = 255
	// maxQuoted is how much of a client's text an error text repeats, in bytes.
	maxQuoted = 64
	// maxPooled is the size in bytes beyond which a buffer is not kept for the
	// next order: one huge order should not cost its memory for ever.
	maxPooled = 64 << 10
)

// document is a JSON text that has been read.
type document struct {
	// value is a map[string]any, []any, string, json.Number, bool or nil.
	value any
	// hash is equal for documents that are equal as JSON values, and for no
	// others: the order of members, white space, escapes in strings and the
	// spelling of numbers (1, 1.0, 10e-1) make no difference. Numbers are
	// compared by their exact decimal value, without rounding.
	hash [sha256.Size]byte
}

// syntaxError says where and why a text is not a JSON document.
type syntaxError struct {
	Offset int64  // in bytes from the start of the text
	Detail string // fit for a user, begins with line and column
}

func (e *syntaxError) Error() string { return e.Detail }

// decodeDocument reads body, which must be exactly one JSON value (RFC 8259)
// in valid UTF-8. It refuses what two readers could read as two different
// orders (RFC 7493, sections 2.1 and 2.3): repeated member names and escapes
// that are half a character. It also refuses values nested deeper than
// maxDepth, and numbers other than zero whose exponent has more than
// maxExponentDigits digits. Errors are *syntaxError. Time and memory are
// bounded by the length of body, whatever the numbers in it say. body is
// neither changed nor kept. Safe for concurrent use.
func decodeDocument(body []byte) (document, error) {
	r := readers.Get().(*reader)
	defer r.release()
	r.open(body)

	value, err := r.value()
	if err != nil {
		return document{}, err
	}
	if rest := bytes.TrimLeft(body[r.tokens.InputOffset():], " \t\r\n"); len(rest) > 0 {
		return document{}, r.fault(len(body)-len(rest), "unexpected text after the end of the JSON value")
	}
	return document{value: value, hash: sha256.Sum256(r.canon)}, nil
}

var readers = sync.Pool{New: func() any { return &reader{tokens: new(jsontext.Decoder)} }}

// reader builds the value of a text and, beside it, its canonical form, in
// which every value begins with a byte that tells its kind and carries its
// length or an end mark, so that no two values have the same form.
type reader struct {
	tokens *jsontext.Decoder
	input  bytes.Buffer // around body: jsontext reads a bytes.Buffer in place
	body   []byte
	text   string // body once more: the strings of the value are parts of it
	depth  int

	canon    []byte   // the canonical form so far
	scratch  []byte   // an unescaped string, or members while they are put in order
	places   []int    // of members, in the order of their names
	members  []member // of the objects that are open, inner ones last
	elements []any    // of the arrays that are open, inner ones last
}

// member is a member of an object that is being read.
type member struct {
	name       string
	value      any
	start, end int // of name and value in reader.canon
}

func (r *reader) open(body []byte) {
	r.body, r.text = body, string(body)
	r.input = *bytes.NewBuffer(body)
	r.tokens.Reset(&r.input)
}

func (r *reader) release() {
	r.open(nil) // lets go of the body
	r.canon, r.scratch = r.canon[:0], r.scratch[:0]
	// After an error the stacks are not empty.
	clear(r.members)
	clear(r.elements)
	r.members, r.elements = r.members[:0], r.elements[:0]
	if cap(r.canon)+cap(r.scratch) <= maxPooled && cap(r.members)+cap(r.elements)+cap(r.places) <= maxPooled/16 {
		readers.Put(r)
	}
}

func (r *reader) value() (any, error) {
	switch kind := r.tokens.PeekKind(); kind {
	case '"':
		text, err := r.string()
		if err != nil {
			return nil, err
		}
		r.canon = appendText(append(r.canon, 's'), text)
		return text, nil
	case '0':
		return r.number()
	case '{', '[':
		if err := r.delimiter(); err != nil {
			return nil, err
		}
		if r.depth == maxDepth {
			return nil, r.fault(int(r.tokens.InputOffset())-1, fmt.Sprintf("nested deeper than %d levels", maxDepth))
		}
		r.depth++
		var value any
		var err error
		if kind == '{' {
			value, err = r.object()
		} else {
			value, err = r.array()
		}
		r.depth--
		return value, err
	default: // true, false, null, or an error
		if err := r.delimiter(); err != nil {
			return nil, err
		}
		r.canon = append(r.canon, byte(kind))
		if kind == 'n' {
			return nil, nil
		}
		return kind == 't', nil
	}
}

// delimiter reads a token that is not a string or number.
func (r *reader) delimiter() error {
	if _, err := r.tokens.ReadToken(); err != nil {
		return r.refused(err)
	}
	return nil
}

// string reads a string.
func (r *reader) string() (string, error) {
	raw, err := r.tokens.ReadValue()
	if err != nil {
		return "", r.refused(err)
	}
	if bytes.IndexByte(raw, '\\') < 0 {
		end := int(r.tokens.InputOffset())
		return r.text[end-len(raw)+1 : end-1], nil
	}
	if r.scratch, err = jsontext.AppendUnquote(r.scratch[:0], raw); err != nil {
		return "", r.refused(err)
	}
	return string(r.scratch), nil
}

func (r *reader) number() (any, error) {
	raw, err := r.tokens.ReadValue()
	if err != nil {
		return nil, r.refused(err)
	}
	end := int(r.tokens.InputOffset())
	text := r.text[end-len(raw) : end]
	d, ok := parseDecimal(text)
	if !ok {
		return nil, r.fault(end-len(raw), "the exponent of the number is out of range")
	}
	r.canon = d.append(append(r.canon, 'd'))
	return json.Number(text), nil
}

func (r *reader) object() (any, error) {
	r.canon = append(r.canon, '{')
	first, start := len(r.members), len(r.canon)
	ordered := true
	for r.tokens.PeekKind() != '}' {
		name, err := r.string()
		if err != nil {
			return nil, err
		}
		m := member{name: name, start: len(r.canon)}
		r.canon = appendText(r.canon, m.name)
		if m.value, err = r.value(); err != nil {
			return nil, err
		}
		m.end = len(r.canon)
		if n := len(r.members); n > first && r.members[n-1].name > m.name {
			ordered = false
		}
		r.members = append(r.members, m)
	}
	if err := r.delimiter(); err != nil {
		return nil, err
	}

	members := r.members[first:]
	if !ordered {
		r.order(members, start)
	}
	object := make(map[string]any, len(members))
	for _, m := range members {
		object[m.name] = m.value
	}
	clear(members)
	r.members = r.members[:first]
	r.canon = append(r.canon, '}')
	return object, nil
}

// order puts the members of an object, which stand in canon from start on, in
// the order of their names. It sorts their places, because moving the members,
// which hold pointers, would keep the garbage collector's barriers busy.
func (r *reader) order(members []member, start int) {
	r.places = r.places[:0]
	for i := range members {
		r.places = append(r.places, i)
	}
	slices.SortFunc(r.places, func(i, j int) int { return cmp.Compare(members[i].name, members[j].name) })

	r.scratch = append(r.scratch[:0], r.canon[start:]...)
	r.canon = r.canon[:start]
	for _, i := range r.places {
		r.canon = append(r.canon, r.scratch[members[i].start-start:members[i].end-start]...)
	}
}

func (r *reader) array() (any, error) {
	r.canon = append(r.canon, '[')
	first := len(r.elements)
	for r.tokens.PeekKind() != ']' {
		value, err := r.value()
		if err != nil {
			return nil, err
		}
		r.elements = append(r.elements, value)
	}
	if err := r.delimiter(); err != nil {
		return nil, err
	}

	array := make([]any, len(r.elements)-first)
	copy(array, r.elements[first:])
	clear(r.elements[first:])
	r.elements = r.elements[:first]
	r.canon = append(r.canon, ']')
	return array, nil
}

// refused turns an error of jsontext into one of ours.
func (r *reader) refused(err error) error {
	var at *jsontext.SyntacticError
	if !errors.As(err, &at) {
		// The one other error: io.EOF, because there is nothing to read.
		return r.fault(len(r.body), "there is no JSON value")
	}
	detail := at.Err.Error()
	switch {
	case errors.Is(at.Err, jsontext.ErrDuplicateName):
		detail = fmt.Sprintf("the member %s stands twice in one object", quote(at.JSONPointer.LastToken()))
	case errors.Is(at.Err, io.ErrUnexpectedEOF):
		detail = "the text ends before the JSON value does"
	}
	return r.fault(int(at.ByteOffset), detail)
}

// fault returns a syntaxError for the given place. The column counts
// characters, from 1, as editors do.
func (r *reader) fault(offset int, detail string) error {
	offset = min(offset, len(r.body))
	before := r.body[:offset]
	line := 1 + bytes.Count(before, []byte{'\n'})
	column := 1 + utf8.RuneCount(before[bytes.LastIndexByte(before, '\n')+1:])
	return &syntaxError{
		Offset: int64(offset),
		Detail: fmt.Sprintf("line %d, column %d: %s", line, column, detail),
	}
}

func appendText(dst []byte, text string) []byte {
	dst = binary.AppendUvarint(dst, uint64(len(text)))
	return append(dst, text...)
}

// decimal is a number by its value: the digits of head and tail, one after the
// other, times 10 to the power of exponent. There are no zeros at either end
// of the digits, and for zero there are no digits at all, so that equal
// numbers have equal digits and exponents.
type decimal struct {
	negative   bool
	head, tail string
	exponent   int64
}

// parseDecimal takes a JSON number apart without computing it: 1e999999999
// costs no more than 1. It reports false when the exponent is out of range.
func parseDecimal(text string) (decimal, bool) {
	var d decimal
	text, d.negative = strings.CutPrefix(text, "-")
	power := ""
	if i := strings.IndexAny(text, "eE"); i >= 0 {
		text, power = text[:i], text[i+1:]
	}
	d.head, d.tail, _ = strings.Cut(text, ".")
	d.tail = strings.TrimRight(d.tail, "0")
	d.exponent = -int64(len(d.tail))
	if d.tail == "" {
		whole := len(d.head)
		d.head = strings.TrimRight(d.head, "0")
		d.exponent = int64(whole - len(d.head))
	}
	if d.head = strings.TrimLeft(d.head, "0"); d.head == "" {
		d.tail = strings.TrimLeft(d.tail, "0")
	}
	if d.head == "" && d.tail == "" {
		return decimal{}, true // zero, whatever its sign and exponent
	}

	if power == "" {
		return d, true
	}
	power, negative := strings.CutPrefix(power, "-")
	power = strings.TrimLeft(strings.TrimPrefix(power, "+"), "0")
	if len(power) > maxExponentDigits {
		return decimal{}, false
	}
	if power != "" {
		n, err := strconv.ParseInt(power, 10, 64)
		if err != nil {
			return decimal{}, false
		}
		if negative {
			n = -n
		}
		d.exponent += n
	}
	return d, true
}

// append appends the canonical form of d to dst.
func (d decimal) append(dst []byte) []byte {
	sign := byte('+')
	if d.negative {
		sign = '-'
	}
	dst = append(dst, sign)
	dst = binary.AppendUvarint(dst, uint64(len(d.head)+len(d.tail)))
	dst = append(dst, d.head...)
	dst = append(dst, d.tail...)
	return binary.AppendVarint(dst, d.exponent)
}

// integer returns the digits of d if it is an integer of at most limit
// characters.
func (d decimal) integer(limit int) (string, bool) {
	switch {
	case d.head == "" && d.tail == "":
		return "0", true
	case d.exponent < 0 || d.exponent > int64(limit): // not computed: it may be huge
		return "", false
	}
	digits := d.head + d.tail + strings.Repeat("0", int(d.exponent))
	if d.negative {
		digits = "-" + digits
	}
	if len(digits) > limit {
		return "", false
	}
	return digits, true
}

// pointer is a JSON Pointer (RFC 6901) as its unescaped tokens. The empty one
// stands for "nowhere", not for the whole document: it finds nothing.
type pointer []string

// parsePointer reads a JSON Pointer. "" is the empty pointer.
func parsePointer(s string) (pointer, error) {
	if s == "" {
		return nil, nil
	}
	if s[0] != '/' {
		return nil, fmt.Errorf("%s is not a JSON Pointer (RFC 6901): it must begin with /", quote(s))
	}
	tokens := strings.Split(s[1:], "/")
	for i, token := range tokens {
		rest := strings.ReplaceAll(strings.ReplaceAll(token, "~0", ""), "~1", "")
		if strings.Contains(rest, "~") {
			return nil, fmt.Errorf("%s is not a JSON Pointer (RFC 6901): ~ must be followed by 0 or 1", quote(s))
		}
		// First ~1, then ~0: the other way round ~01 would become a slash.
		tokens[i] = strings.ReplaceAll(strings.ReplaceAll(token, "~1", "/"), "~0", "~")
	}
	return tokens, nil
}

// text returns the natural key that v holds where p points to: a string as it
// is, an integer as its digits (1.0 and 1 are one number, so both are "1"). It
// reports false when there is nothing, something else, or a text that is
// empty, longer than maxNaturalKey bytes, or has control characters, which
// would not survive in a header.
func (p pointer) text(v any) (string, bool) {
	if len(p) == 0 {
		return "", false
	}
	for _, token := range p {
		var ok bool
		if v, ok = child(v, token); !ok {
			return "", false
		}
	}
	switch v := v.(type) {
	case string:
		bad := v == "" || len(v) > maxNaturalKey || strings.ContainsFunc(v, unicode.IsControl)
		if bad {
			return "", false
		}
		return strings.Clone(v), true // v keeps the whole text alive
	case json.Number:
		d, ok := parseDecimal(string(v))
		if !ok {
			return "", false
		}
		return d.integer(maxNaturalKey)
	default:
		return "", false
	}
}

// child returns the member or element of v that a token of a pointer names.
func child(v any, token string) (any, bool) {
	switch v := v.(type) {
	case map[string]any:
		value, ok := v[token]
		return value, ok
	case []any:
		i, ok := arrayIndex(token)
		if !ok || i >= len(v) {
			return nil, false
		}
		return v[i], true
	default:
		return nil, false
	}
}

// arrayIndex reads a token as RFC 6901 writes indexes: no sign, no leading
// zeros.
func arrayIndex(token string) (int, bool) {
	if token == "" || len(token) > 1 && token[0] == '0' || strings.Trim(token, "0123456789") != "" {
		return 0, false
	}
	i, err := strconv.Atoi(token)
	return i, err == nil
}

// quote returns s in quotes, cut short if it is long: it comes from a client
// and goes into an error text.
func quote(s string) string {
	return strconv.Quote(shorten(s, maxQuoted))
}

// shorten cuts s to about limit bytes, at the end of a character.
func shorten(s string, limit int) string {
	if len(s) <= limit {
		return s
	}
	for limit > 0 && !utf8.RuneStart(s[limit]) {
		limit--
	}
	return s[:limit] + "…"
}
