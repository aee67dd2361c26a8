package intake

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"unicode/utf16"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

// sampleOrder is an order as clients send them, about 300 bytes.
const sampleOrder = `{
  "orderNumber": "A-1001",
  "customerId": "customer-4711",
  "currency": "EUR",
  "note": "leave it next door, \u00fcber die Stra\u00dfe",
  "items": [
    {"sku": "WIDGET-1", "quantity": 3, "unitPrice": 12.50},
    {"sku": "GADGET-22", "quantity": 1, "unitPrice": 199.99}
  ],
  "express": true, "coupon": null
}`

func TestDecodeDocumentBuildsTheValue(t *testing.T) {
	doc, err := decodeDocument([]byte(sampleOrder))
	require.NoError(t, err)
	require.Equal(t, map[string]any{
		"orderNumber": "A-1001",
		"customerId":  "customer-4711",
		"currency":    "EUR",
		"note":        "leave it next door, über die Straße",
		"items": []any{
			map[string]any{"sku": "WIDGET-1", "quantity": json.Number("3"), "unitPrice": json.Number("12.50")},
			map[string]any{"sku": "GADGET-22", "quantity": json.Number("1"), "unitPrice": json.Number("199.99")},
		},
		"express": true,
		"coupon":  nil,
	}, doc.value)
}

func TestDecodeDocumentRefuses(t *testing.T) {
	deep := strings.Repeat("[", maxDepth+1) + strings.Repeat("]", maxDepth+1)
	tests := []struct {
		name, body string
		offset     int64
		detail     string
	}{
		{"nothing", "", 0, "line 1, column 1: there is no JSON value"},
		{"only white space", " \n ", 3, "line 2, column 2: there is no JSON value"},
		{"an open object", `{"a": 1`, 7, "line 1, column 8: the text ends before the JSON value does"},
		{"an open string", `{"a": "b`, 8, "line 1, column 9: the text ends before the JSON value does"},
		{"an open array", "[1,\n2", 5, "line 2, column 2: the text ends before the JSON value does"},
		{"a comma too many in an object", `{"a": 1,}`, 7, "line 1, column 8: invalid character ',' at start of value"},
		{"a comma too many in an array", `[1,]`, 2, "line 1, column 3: invalid character ',' at start of value"},
		{"a missing comma", `[1 2]`, 3, "line 1, column 4: invalid character '2' after array element (expecting ',' or ']')"},
		{"the wrong bracket", `{"a": [1}`, 8, "line 1, column 9: invalid character '}' after array element (expecting ',' or ']')"},
		{"a bracket alone", `]`, 0, "line 1, column 1: invalid character ']' at start of value"},
		{"a name that is a number", `{1: 2}`, 1, "line 1, column 2: object member name must be a string"},
		{"a name that is an array", `{[[1]]: 2}`, 1, "line 1, column 2: object member name must be a string"},
		{"a name without a value", `{"a"}`, 4, "line 1, column 5: invalid character '}' after object name (expecting ':')"},
		{"a word that is none", `{"a": nul}`, 9, "line 1, column 10: invalid character '}' in literal null (expecting 'l')"},
		{"not a number", `[NaN]`, 1, "line 1, column 2: invalid character 'N' at start of value"},
		{"a number with a leading zero", `[01]`, 2, "line 1, column 3: invalid character '1' after array element (expecting ',' or ']')"},
		{"a number with a plus", `[+1]`, 1, "line 1, column 2: invalid character '+' at start of value"},
		{"single quotes", `{'a': 1}`, 1, "line 1, column 2: invalid character '\\'' at start of value"},
		{"a comment", "{ // a\n}", 2, "line 1, column 3: invalid character '/' at start of value"},
		{"a control character in a string", "[\"a\x01\"]", 3, `line 1, column 4: invalid character '\x01' in string (expecting non-control character)`},
		{"an escape that is none", `["\q"]`, 2, "line 1, column 3: invalid escape sequence `\\q` in string"},
		{"a second value", "{}\n {}", 4, "line 2, column 2: unexpected text after the end of the JSON value"},
		{"text after the value", `1 x`, 2, "line 1, column 3: unexpected text after the end of the JSON value"},
		{"a byte order mark", "\ufeff{}", 0, `line 1, column 1: invalid character '\ufeff' at start of value`},
		{"invalid UTF-8", "[\"é\xff\"]", 4, "line 1, column 4: invalid UTF-8"},
		{"a surrogate in UTF-8", "[\"\xed\xa0\x80\"]", 2, "line 1, column 3: invalid UTF-8"},
		{"half a surrogate pair", `["\ud83d"]`, 2, "line 1, column 3: invalid surrogate pair `\\ud83d\"]`"},
		{"a surrogate pair the wrong way round", `["\ude00\ud83d"]`, 2, "line 1, column 3: invalid surrogate pair `\\ude00\\ud83d` in string"},
		{"a repeated name", "{\"a\": 1,\n \"a\": 2}", 10, `line 2, column 2: the member "a" stands twice in one object`},
		{"a name repeated in another spelling", `{"ab": 1, "\u0061b": 1}`, 10, `line 1, column 11: the member "ab" stands twice in one object`},
		{"nesting too deep", deep, maxDepth, "line 1, column 65: nested deeper than 64 levels"},
		{"an exponent out of range", `{"a": 1e1000000000000000000}`, 6, "line 1, column 7: the exponent of the number is out of range"},
		{"a negative exponent out of range", `-1E-1000000000000000000`, 0, "line 1, column 1: the exponent of the number is out of range"},
		{"columns counted in characters", `{"ä": "ö" x}`, 12, "line 1, column 11: invalid character 'x' after object value (expecting ',' or '}')"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			doc, err := decodeDocument([]byte(test.body))
			var fault *syntaxError
			require.ErrorAs(t, err, &fault)
			require.Contains(t, fault.Error(), test.detail)
			require.Equal(t, test.offset, fault.Offset)
			require.Zero(t, doc)
		})
	}
}

func TestDecodeDocumentCutsLongNamesInErrors(t *testing.T) {
	name := strings.Repeat("é", 1<<16)
	_, err := decodeDocument([]byte(`{"` + name + `": 1, "` + name + `": 2}`))
	require.Error(t, err)
	require.Less(t, len(err.Error()), 200)
	require.True(t, utf8.ValidString(err.Error()))
}

func TestDecodeDocumentTakesTheDeepestNesting(t *testing.T) {
	for _, brackets := range []string{"[]", "{}"} {
		open, end := brackets[:1], brackets[1:]
		inner := ""
		if open == "{" {
			open, inner = `{"a":`, "1"
		}
		_, err := decodeDocument([]byte(strings.Repeat(open, maxDepth) + inner + strings.Repeat(end, maxDepth)))
		require.NoError(t, err)
	}
	// Depth is that of one place, not a sum.
	_, err := decodeDocument([]byte("[" + strings.Repeat("[],", 1000) + "{}]"))
	require.NoError(t, err)
}

func TestDecodeDocumentLeavesTheBodyAlone(t *testing.T) {
	body := []byte(sampleOrder)
	doc, err := decodeDocument(body)
	require.NoError(t, err)
	require.Equal(t, sampleOrder, string(body))

	// The value is not a view of the body either: bodies are pooled.
	for i := range body {
		body[i] = '#'
	}
	again, err := decodeDocument([]byte(sampleOrder))
	require.NoError(t, err)
	require.Equal(t, again, doc)
}

func TestDecodeDocumentIsNotConfusedByAnErrorBefore(t *testing.T) {
	want, err := decodeDocument([]byte(sampleOrder))
	require.NoError(t, err)
	for i := range sampleOrder { // stop at every place, so that a pooled reader is left in every state
		_, err := decodeDocument([]byte(sampleOrder[:i]))
		require.Error(t, err)
		got, err := decodeDocument([]byte(sampleOrder))
		require.NoError(t, err)
		require.Equal(t, want, got)
	}
}

func TestReaderKeepsNothingOfADocument(t *testing.T) {
	for _, body := range []string{sampleOrder, `{"a": [1, {"b": 2}, {"c": [3, `, strings.Repeat("[", maxDepth+1)} {
		r := &reader{tokens: new(jsontext.Decoder)}
		r.open([]byte(body))
		_, _ = r.value() // both ways: an error leaves the stacks as they were
		r.release()
		require.Nil(t, r.body)
		require.Empty(t, r.text)
		require.Zero(t, r.input)
		require.Zero(t, r.depth)
		require.Empty(t, r.canon)
		require.Empty(t, r.members)
		require.Empty(t, r.elements)
		for _, m := range r.members[:cap(r.members)] {
			require.Zero(t, m)
		}
		for _, e := range r.elements[:cap(r.elements)] {
			require.Nil(t, e)
		}
	}
}

func TestDecodeDocumentConcurrently(t *testing.T) {
	var group sync.WaitGroup
	for i := range 8 {
		group.Go(func() {
			text := strings.ReplaceAll(sampleOrder, "A-1001", fmt.Sprintf("A-%d", i))
			want, err := decodeDocument([]byte(text))
			for range 200 {
				got, again := decodeDocument([]byte(text))
				if err != nil || again != nil || got.hash != want.hash {
					t.Errorf("order %d: %v, %v, hash %x, want %x", i, err, again, got.hash, want.hash)
					return
				}
			}
		})
	}
	group.Wait()
}

func TestHash(t *testing.T) {
	tests := []struct {
		name string
		same [][]string // texts in one list are equal values, texts of two lists are not
	}{
		{"numbers", [][]string{
			{"1", "1.0", "1e0", "1E+0", "1e-0", "10e-1", "0.1e1", "0.01e2", "100E-2", "1.000", "0.0001e0004"},
			{"-1", "-1.0", "-10e-1"},
			{"0", "-0", "0.0", "-0.00", "0e5", "0E-5", "0e99999999999999999999999", "-0.0e-99999999999999999999999"},
			{"10", "1e1", "1e01", "100e-1"},
			{"12", "1.2e1", "12.0"},
			{"120", "1.2e2", "12e1"},
			{"1.2", "12e-1"},
			{"0.12", "12e-2", "00.12"[1:]},
			{"0.012", "12e-3", "1.2e-2"},
			{"102", "1.02e2"}, {"1002"}, {"1.02"},
			{"1e400", "10e399", "0.1e401"}, {"1e401"},
			{"1e-400"}, {"1e-401"},
			{"0.1", "1e-1"}, {"0.10000000000000000000000000000001"}, {"0.10000000000000000000000000000002"},
			{"9007199254740993"}, {"9007199254740992"}, {"9007199254740992.5"},
			{"1e999999999999999999", "10e999999999999999998"}, {"1e999999999999999998"}, {"-1e999999999999999999"},
			{"1e-999999999999999999", "0.1e-999999999999999998"},
			{`"1"`}, {"[1]", "[1.0]"}, {"true"}, {"null"},
		}},
		{"strings", [][]string{
			{`"a"`, `"\u0061"`}, {`"A"`, `"\u0041"`},
			{`"/"`, `"\/"`, `"\u002f"`, `"\u002F"`},
			{`"\n"`, `"\u000a"`}, {`"\\n"`}, {`"n"`},
			{`"ü"`, `"\u00fc"`}, {"\"u\u0308\""}, // looks the same, but is two code points
			{`"😀"`, `"\ud83d\ude00"`, `"\uD83D\uDE00"`},
			{`"\u0000"`}, {`"\u0000\u0000"`}, {`""`}, {`" "`}, {`"null"`}, {`"\ufffd"`, `"�"`},
		}},
		{"members", [][]string{
			{`{"a":1,"b":2}`, `{"b":2,"a":1}`, "{ \"b\" : 2.0 ,\t\"a\":\r\n1 }", `{"\u0062":2,"\u0061":1e0}`},
			{`{"a":2,"b":1}`}, {`{"a":1}`}, {`{"b":2}`}, {`{"a":1,"b":2,"c":null}`}, {`{"c":null}`}, {`{}`, "{\n}"},
			{`{"a":{"b":2}}`}, {`{"ab":2}`}, {`{"a":"b"}`}, {`{"":1}`}, {`{"a":{"c":3,"b":2},"b":[{"x":1,"a":2}]}`, `{"b":[{"a":2,"x":1}],"a":{"b":2,"c":3}}`},
		}},
		{"arrays", [][]string{
			{"[]", "[ ]"}, {"[[]]"}, {"[[],[]]"}, {"[[[]]]"}, {"[null]"}, {"{}"},
			{"[1,2]", "[ 1.0,\n2 ]"}, {"[2,1]"}, {"[12]"}, {"[[1],2]"}, {"[1,[2]]"}, {"[[1,2]]"}, {`["1",2]`}, {`["1,2"]`},
			{`["ab","c"]`}, {`["a","bc"]`}, {`["abc"]`}, {`["","abc"]`}, {`["abc",""]`},
		}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			owner := map[[32]byte]int{}
			for i, texts := range test.same {
				for j, text := range texts {
					doc, err := decodeDocument([]byte(text))
					require.NoError(t, err, text)
					first, seen := owner[doc.hash]
					require.Equal(t, j > 0, seen, "%s must equal only %v", text, texts)
					if seen {
						require.Equal(t, i, first, text)
					}
					owner[doc.hash] = i
				}
			}
		})
	}
}

// The hash is stored with every order. If it changed, a client that repeats an
// order after an update of Sluice would be told that the order is another one.
func TestHashIsTheSameInEveryVersion(t *testing.T) {
	doc, err := decodeDocument([]byte(sampleOrder))
	require.NoError(t, err)
	require.Equal(t, "b8ff074f8d23d1ed2a6021c4be660a9c1476159eb5ed798d7041fa6021c3356c", hex.EncodeToString(doc.hash[:]))
}

func TestHugeNumbersAreCheap(t *testing.T) {
	for _, text := range []string{"1e999999999999999999", "-1e-999999999999999999", "0e" + strings.Repeat("9", 100)} {
		body := []byte(text)
		allocated := testing.AllocsPerRun(100, func() {
			_, _ = decodeDocument(body)
		})
		require.Less(t, allocated, 10.0, text)
	}
}

// tree is a JSON value as the tests make it up: nil, bool, string, rational
// number, []any or map[string]any.

func drawTree(depth int) *rapid.Generator[any] {
	leaf := rapid.OneOf(
		rapid.Just[any](nil),
		rapid.Map(rapid.Bool(), func(b bool) any { return b }),
		rapid.Map(rapid.String(), func(s string) any { return s }),
		rapid.Custom(func(t *rapid.T) any {
			digits := rapid.Int64Range(-99_999, 99_999).Draw(t, "digits")
			power := rapid.IntRange(-6, 6).Draw(t, "power")
			return new(big.Rat).Mul(new(big.Rat).SetInt64(digits), powerOfTen(power))
		}),
	)
	if depth == 0 {
		return leaf
	}
	inner := rapid.Deferred(func() *rapid.Generator[any] { return drawTree(depth - 1) })
	return rapid.OneOf(
		leaf,
		rapid.Map(rapid.SliceOfN(inner, 0, 4), func(a []any) any { return a }),
		rapid.Map(rapid.MapOfN(rapid.StringN(0, 3, -1), inner, 0, 5), func(m map[string]any) any { return m }),
	)
}

func powerOfTen(n int) *big.Rat {
	power := new(big.Rat).SetInt(new(big.Int).Exp(big.NewInt(10), big.NewInt(int64(max(n, -n))), nil))
	if n < 0 {
		power.Inv(power)
	}
	return power
}

// spell writes a tree as JSON, each time another way: order of members, white
// space, escapes and the spelling of numbers are drawn from random.
func spell(b *strings.Builder, v any, random *rand.Rand) {
	blank := func() {
		for random.IntN(4) == 0 {
			b.WriteByte(" \t\r\n"[random.IntN(4)])
		}
	}
	blank()
	defer blank()
	switch v := v.(type) {
	case nil:
		b.WriteString("null")
	case bool:
		b.WriteString(strconv.FormatBool(v))
	case string:
		spellText(b, v, random)
	case *big.Rat:
		spellNumber(b, v, random)
	case []any:
		b.WriteByte('[')
		blank()
		for i, item := range v {
			if i > 0 {
				b.WriteByte(',')
			}
			spell(b, item, random)
		}
		b.WriteByte(']')
	case map[string]any:
		names := make([]string, 0, len(v))
		for name := range v {
			names = append(names, name)
		}
		slices.Sort(names)
		random.Shuffle(len(names), func(i, j int) { names[i], names[j] = names[j], names[i] })
		b.WriteByte('{')
		blank()
		for i, name := range names {
			if i > 0 {
				b.WriteByte(',')
			}
			blank()
			spellText(b, name, random)
			blank()
			b.WriteByte(':')
			spell(b, v[name], random)
		}
		b.WriteByte('}')
	}
}

func spellText(b *strings.Builder, s string, random *rand.Rand) {
	b.WriteByte('"')
	for _, c := range s {
		switch {
		case c < ' ' || c == '"' || c == '\\' || random.IntN(4) == 0:
			format := []string{`\u%04x`, `\u%04X`}[random.IntN(2)]
			for _, unit := range utf16.AppendRune(nil, c) {
				fmt.Fprintf(b, format, unit)
			}
		case c == '/' && random.IntN(2) == 0:
			b.WriteString(`\/`)
		default:
			b.WriteRune(c)
		}
	}
	b.WriteByte('"')
}

func spellNumber(b *strings.Builder, r *big.Rat, random *rand.Rand) {
	shift := random.IntN(9) - 4
	shifted := new(big.Rat).Mul(r, powerOfTen(-shift))
	decimals, _ := shifted.FloatPrec()
	b.WriteString(shifted.FloatString(decimals + random.IntN(3)))
	if shift != 0 || random.IntN(2) == 0 {
		sign := ""
		if shift >= 0 && random.IntN(2) == 0 {
			sign = "+"
		}
		fmt.Fprintf(b, "%c%s%d", "eE"[random.IntN(2)], sign, shift)
	}
}

func spelled(v any, seed uint64) string {
	var b strings.Builder
	spell(&b, v, rand.New(rand.NewPCG(seed, 0)))
	return b.String()
}

func TestHashPropertySpellingMakesNoDifference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v := drawTree(3).Draw(t, "value")
		one := spelled(v, rapid.Uint64().Draw(t, "one"))
		two := spelled(v, rapid.Uint64().Draw(t, "two"))
		a, err := decodeDocument([]byte(one))
		require.NoError(t, err, one)
		b, err := decodeDocument([]byte(two))
		require.NoError(t, err, two)
		require.Equal(t, a.hash, b.hash, "%s\n%s", one, two)
		require.Equal(t, reference(v), reference(a.value))
	})
}

func TestHashPropertyValuesMakeADifference(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		v, w := drawTree(2).Draw(t, "one"), drawTree(2).Draw(t, "two")
		a, err := decodeDocument([]byte(spelled(v, 1)))
		require.NoError(t, err)
		b, err := decodeDocument([]byte(spelled(w, 2)))
		require.NoError(t, err)
		require.Equal(t, reflect.DeepEqual(reference(v), reference(w)), a.hash == b.hash)
	})
}

// reference returns v with each number replaced by a string of its own kind
// that is equal for equal numbers. It computes them as fractions where the
// code under test takes their digits apart.
func reference(v any) any {
	type number string
	switch v := v.(type) {
	case map[string]any:
		m := map[string]any{}
		for name, value := range v {
			m[name] = reference(value)
		}
		return m
	case []any:
		a := make([]any, len(v))
		for i, value := range v {
			a[i] = reference(value)
		}
		return a
	case *big.Rat:
		return number(v.RatString())
	case json.Number:
		r, ok := new(big.Rat).SetString(string(v))
		if !ok {
			panic("the reference cannot compute " + string(v))
		}
		return number(r.RatString())
	default:
		return v
	}
}

// small reports whether the reference can compute all numbers of a text.
func small(v any) bool {
	var long faults
	long.addNumbers(v, nil)
	return len(long) == 0
}

func decodeStandard(body []byte) (any, error) {
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.UseNumber()
	var v any
	if err := decoder.Decode(&v); err != nil {
		return nil, err
	}
	if _, err := decoder.Token(); err != io.EOF {
		return nil, fmt.Errorf("text after the value")
	}
	return v, nil
}

// treeOf turns a decoded value into one that spell can write.
func treeOf(v any) any {
	switch v := v.(type) {
	case map[string]any:
		m := map[string]any{}
		for name, value := range v {
			m[name] = treeOf(value)
		}
		return m
	case []any:
		a := make([]any, len(v))
		for i, value := range v {
			a[i] = treeOf(value)
		}
		return a
	case json.Number:
		r, _ := new(big.Rat).SetString(string(v))
		return r
	default:
		return v
	}
}

func FuzzDecodeDocument(f *testing.F) {
	f.Add([]byte(sampleOrder), []byte(`{"orderNumber": "A-1001"}`), uint64(1))
	f.Add([]byte(`1e400`), []byte(`10e399`), uint64(2))
	f.Add([]byte(`[-0, 0.0]`), []byte(`[0e99, -0E-7]`), uint64(3))
	f.Add([]byte(`{"a":1,"\u0061":2}`), []byte(`["\ud800"]`), uint64(4))
	f.Add([]byte("\"\xff\""), []byte(`{"b":[],"a":{}}`), uint64(5))
	f.Fuzz(func(t *testing.T, one, two []byte, seed uint64) {
		a, err := decodeDocument(one)
		standard, standardErr := decodeStandard(one)
		if err != nil {
			var fault *syntaxError
			require.ErrorAs(t, err, &fault)
			require.True(t, fault.Offset >= 0 && fault.Offset <= int64(len(one)))
			require.True(t, utf8.ValidString(fault.Detail))
			if standardErr == nil {
				// Refused by us alone, which must be for one of the stricter rules.
				require.Regexp(t, `invalid UTF-8|surrogate pair|stands twice|nested deeper|exponent of the number`, fault.Detail)
			}
			return
		}
		require.NoError(t, standardErr)
		require.Equal(t, standard, a.value)
		if !small(a.value) {
			return
		}

		again, err := decodeDocument([]byte(spelled(treeOf(a.value), seed)))
		require.NoError(t, err)
		require.Equal(t, a.hash, again.hash)

		b, err := decodeDocument(two)
		if err != nil || !small(b.value) {
			return
		}
		require.Equal(t, reflect.DeepEqual(reference(a.value), reference(b.value)), a.hash == b.hash)
	})
}

func TestParsePointer(t *testing.T) {
	for text, want := range map[string]pointer{
		"":                nil,
		"/":               {""},
		"/orderNumber":    {"orderNumber"},
		"/a/b/0":          {"a", "b", "0"},
		"/a~1b/~0x/~01":   {"a/b", "~x", "~1"},
		"/~0~1~00":        {"~/~0"},
		"/with space/ü/":  {"with space", "ü", ""},
		"//":              {"", ""},
		"/~01~10":         {"~1/0"},
		"/customer/order": {"customer", "order"},
	} {
		got, err := parsePointer(text)
		require.NoError(t, err, text)
		require.Equal(t, want, got, text)
		require.Equal(t, text, formatPointer(got))
	}
	for text, want := range map[string]string{
		"orderNumber": `"orderNumber" is not a JSON Pointer (RFC 6901): it must begin with /`,
		"#/a":         `"#/a" is not a JSON Pointer (RFC 6901): it must begin with /`,
		"/a~":         `"/a~" is not a JSON Pointer (RFC 6901): ~ must be followed by 0 or 1`,
		"/~2":         `"/~2" is not a JSON Pointer (RFC 6901): ~ must be followed by 0 or 1`,
		"/a/~~0":      `"/a/~~0" is not a JSON Pointer (RFC 6901): ~ must be followed by 0 or 1`,
		"/~~10":       `"/~~10" is not a JSON Pointer (RFC 6901): ~ must be followed by 0 or 1`,
	} {
		_, err := parsePointer(text)
		require.EqualError(t, err, want)
	}
}

func TestPointerText(t *testing.T) {
	long := strings.Repeat("x", maxNaturalKey)
	tests := []struct{ pointer, body, want string }{
		{"/orderNumber", sampleOrder, "A-1001"},
		{"/a", `{"a": " B 7/ü "}`, " B 7/ü "},
		{"/a/1/b", `{"a": [0, {"b": "x"}]}`, "x"},
		{"/a~1b/~0", `{"a/b": {"~": "x"}}`, "x"},
		{"/", `{"": "x"}`, "x"},
		{"/0", `{"0": "x"}`, "x"},
		{"/a", `{"a": 4711}`, "4711"},
		{"/a", `{"a": -4711}`, "-4711"},
		{"/a", `{"a": 4711.0}`, "4711"},
		{"/a", `{"a": 4.711e3}`, "4711"},
		{"/a", `{"a": 12e3}`, "12000"},
		{"/a", `{"a": -0}`, "0"},
		{"/a", `{"a": 12345678901234567890123}`, "12345678901234567890123"},
		{"/a", `{"a": 1e254}`, "1" + strings.Repeat("0", 254)},
		{"/a", `{"a": "` + long + `"}`, long},

		{"", sampleOrder, ""},
		{"/b", sampleOrder, ""},
		{"/orderNumber/0", sampleOrder, ""},
		{"/items", sampleOrder, ""},
		{"/items/0", sampleOrder, ""},
		{"/items/2/sku", sampleOrder, ""},
		{"/items/-/sku", sampleOrder, ""},
		{"/items/00/sku", sampleOrder, ""},
		{"/items/+0/sku", sampleOrder, ""},
		{"/items/99999999999999999999/sku", sampleOrder, ""},
		{"/express", sampleOrder, ""},
		{"/coupon", sampleOrder, ""},
		{"/a", `{"a": ""}`, ""},
		{"/a", `{"a": 1.5}`, ""},
		{"/a", `{"a": 1e255}`, ""},
		{"/a", `{"a": -1e254}`, ""},
		{"/a", `{"a": 1e999999999999999999}`, ""},
		{"/a", `{"a": "` + long + `x"}`, ""},
		{"/a", `{"a": "x\ny"}`, ""},
		{"/a", `{"a": "x\u0000"}`, ""},
		{"/a", `{"a": "x\u007f"}`, ""},
		{"/a", `{"a": "x\u0085"}`, ""},
		{"/a", `"x"`, ""},
	}
	for _, test := range tests {
		p, err := parsePointer(test.pointer)
		require.NoError(t, err)
		doc, err := decodeDocument([]byte(test.body))
		require.NoError(t, err)
		text, ok := p.text(doc.value)
		require.Equal(t, test.want, text, "%s in %s", test.pointer, test.body)
		require.Equal(t, test.want != "", ok)
	}
}

// What are equal orders must have equal numbers.
func TestPointerTextPropertySpellingMakesNoDifference(t *testing.T) {
	at, err := parsePointer("/a")
	require.NoError(t, err)
	rapid.Check(t, func(t *rapid.T) {
		v := map[string]any{"a": drawTree(0).Draw(t, "value")}
		one, err := decodeDocument([]byte(spelled(v, rapid.Uint64().Draw(t, "one"))))
		require.NoError(t, err)
		two, err := decodeDocument([]byte(spelled(v, rapid.Uint64().Draw(t, "two"))))
		require.NoError(t, err)
		a, okA := at.text(one.value)
		b, okB := at.text(two.value)
		require.Equal(t, a, b)
		require.Equal(t, okA, okB)
		if r, ok := v["a"].(*big.Rat); ok && r.IsInt() {
			require.Equal(t, r.Num().String(), a)
		}
	})
}

func BenchmarkDecodeDocument(b *testing.B) {
	body := []byte(sampleOrder)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := decodeDocument(body); err != nil {
			b.Fatal(err)
		}
	}
}

// The same with the standard library, without a hash and the stricter rules.
func BenchmarkDecodeDocumentStandard(b *testing.B) {
	body := []byte(sampleOrder)
	b.SetBytes(int64(len(body)))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := decodeStandard(body); err != nil {
			b.Fatal(err)
		}
	}
}
