package intake

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"
)

// compileText compiles a schema that is in no file yet.
func compileText(t *testing.T, text string) (*schema, error) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "schema.json")
	require.NoError(t, os.WriteFile(path, []byte(text), 0o600))
	return compileSchema(path)
}

func validateText(t *testing.T, s *schema, order string) []fieldError {
	t.Helper()
	doc, err := decodeDocument([]byte(order))
	require.NoError(t, err)
	return s.validate(doc.value)
}

// texts makes a list of faults readable.
func texts(list []fieldError) []string {
	var lines []string
	for _, fault := range list {
		lines = append(lines, fault.Pointer+": "+fault.Detail)
	}
	return lines
}

func TestBuiltinSchemaAccepts(t *testing.T) {
	s, err := compileSchema("")
	require.NoError(t, err)
	item := `{"sku": "S", "quantity": 1, "unitPrice": 0}`
	for _, order := range []string{
		sampleOrder,
		`{"orderNumber": "A", "customerId": "", "currency": "eur", "items": [` + item + `]}`,
		`{"orderNumber": "` + strings.Repeat("Az9._-", 10) + `1234", "customerId": "c", "currency": "USD", "items": [` + item + `,` + item + `]}`,
		`{"orderNumber": "A", "customerId": "c", "currency": "EUR", "items": [{"sku": "", "quantity": 1.0, "unitPrice": 0.001, "more": {}}], "more": [1]}`,
		`{"orderNumber": "A", "customerId": "c", "currency": "EUR", "items": [{"sku": "S", "quantity": 1e3, "unitPrice": -0.0}]}`,
		`{"orderNumber": "A", "customerId": "c", "currency": "EUR", "items": [{"sku": "S", "quantity": 12345678901234567890123, "unitPrice": 1e308}]}`,
	} {
		require.Nil(t, validateText(t, s, order), order)
	}
}

func TestBuiltinSchemaRefuses(t *testing.T) {
	s, err := compileSchema("")
	require.NoError(t, err)
	order := func(orderNumber, customerID, currency, items string) string {
		return fmt.Sprintf(`{"orderNumber": %s, "customerId": %s, "currency": %s, "items": %s}`, orderNumber, customerID, currency, items)
	}
	item := func(sku, quantity, unitPrice string) string {
		return order(`"A"`, `"c"`, `"EUR"`, fmt.Sprintf(`[{"sku": %s, "quantity": %s, "unitPrice": %s}]`, sku, quantity, unitPrice))
	}
	good := `[{"sku": "S", "quantity": 1, "unitPrice": 0}]`
	tests := []struct {
		order string
		want  []string
	}{
		{`{}`, []string{"/currency: is required", "/customerId: is required", "/items: is required", "/orderNumber: is required"}},
		{`[]`, []string{": must be an object, is an array"}},
		{`"A"`, []string{": must be an object, is a string"}},
		{`null`, []string{": must be an object, is null"}},
		{order(`""`, `"c"`, `"EUR"`, good), []string{"/orderNumber: must have at least 1 character, has 0"}},
		{order(`"`+strings.Repeat("x", 65)+`"`, `"c"`, `"EUR"`, good), []string{"/orderNumber: must have at most 64 characters, has 65"}},
		{order(`"A 1"`, `"c"`, `"EUR"`, good), []string{"/orderNumber: must match the pattern ^[A-Za-z0-9._-]*$"}},
		{order(`"A\n"`, `"c"`, `"EUR"`, good), []string{"/orderNumber: must match the pattern ^[A-Za-z0-9._-]*$"}},
		{order(`1`, `null`, `["EUR"]`, `{}`), []string{
			"/currency: must be a string, is an array",
			"/customerId: must be a string, is null",
			"/items: must be an array, is an object",
			"/orderNumber: must be a string, is a number",
		}},
		{order(`"A"`, `"c"`, `"EURO"`, `[]`), []string{
			"/currency: must match the pattern ^[A-Za-z]{3}$",
			"/items: must have at least 1 item, has 0",
		}},
		{order(`"A"`, `"c"`, `"EUR\n"`, good), []string{"/currency: must match the pattern ^[A-Za-z]{3}$"}},
		{order(`"A"`, `"c"`, `"EUR"`, `[{}, 1]`), []string{
			"/items/0/quantity: is required",
			"/items/0/sku: is required",
			"/items/0/unitPrice: is required",
			"/items/1: must be an object, is a number",
		}},
		{item(`"S"`, `0`, `-0.01`), []string{"/items/0/quantity: must be at least 1", "/items/0/unitPrice: must be at least 0"}},
		{item(`"S"`, `1.5`, `"1"`), []string{"/items/0/quantity: must be a whole number", "/items/0/unitPrice: must be a number, is a string"}},
		{item(`1`, `true`, `null`), []string{
			"/items/0/quantity: must be a whole number, is true or false",
			"/items/0/sku: must be a string, is a number",
			"/items/0/unitPrice: must be a number, is null",
		}},
		{item(`"S"`, `0.99999999999999999999999`, `-1e-300`), []string{"/items/0/quantity: must be a whole number", "/items/0/unitPrice: must be at least 0"}},
	}
	for _, test := range tests {
		require.Equal(t, test.want, texts(validateText(t, s, test.order)), test.order)
	}
}

// The library computes with fractions: without a bound, a number of a few
// characters takes it seconds, and a slightly longer one makes it panic.
func TestNumbersThatAreTooLongToBeChecked(t *testing.T) {
	s, err := compileText(t, `{"properties": {"n": {"type": "integer", "minimum": 1, "multipleOf": 1}}, "uniqueItems": true}`)
	require.NoError(t, err)
	const text = "must have at most 400 characters and an exponent from -400 to 400"
	for _, number := range []string{
		"1e401", "1E+401", "1e-401", "1e1000001", "1e999999999999999999", "-1e-999999999999999999", "0e99999999999999999999",
		strings.Repeat("7", 401), "0." + strings.Repeat("7", 399),
	} {
		require.Equal(t, []string{"/n: " + text}, texts(validateText(t, s, `{"n": `+number+`}`)), number)
		require.Equal(t, []string{"/other/1/a~1b: " + text}, texts(validateText(t, s, `{"other": [1, {"a/b": `+number+`}]}`)), number)
		require.Equal(t, []string{"/1: " + text, "/2: " + text}, texts(validateText(t, s, `["x", `+number+`, `+number+`]`)), number)
		require.Equal(t, []string{": " + text}, texts(validateText(t, s, number)), number)
	}
	for _, number := range []string{"1e400", "1E+0400", strings.Repeat("7", 400)} {
		require.Nil(t, validateText(t, s, `{"n": `+number+`}`), number)
	}
	require.Nil(t, validateText(t, s, `{"other": 1e-400}`))
}

func TestValidateSaysWhatIsWrong(t *testing.T) {
	tests := []struct {
		name, schema, order string
		want                []string
	}{
		{"false", `{"properties": {"a": false}}`, `{"a": 1}`, []string{"/a: is not allowed here"}},
		{"further members", `{"properties": {"a": true}, "additionalProperties": false}`, `{"c": 1, "b/~": 2, "a": 1}`,
			[]string{"/b~1~0: is not allowed here", "/c: is not allowed here"}},
		{"unevaluated members", `{"allOf": [{"properties": {"a": true}}], "unevaluatedProperties": false}`, `{"c": 1, "b": 2, "a": 1}`,
			[]string{"/b: is not allowed here", "/c: is not allowed here"}},
		{"unevaluated items", `{"prefixItems": [true], "unevaluatedItems": false}`, `[1, 2]`, []string{"/1: is not allowed here"}},
		{"several types", `{"type": ["string", "null"]}`, `1`, []string{": must be null or a string, is a number"}},
		{"integer among types", `{"type": ["integer", "null"]}`, `1.5`, []string{": must be null or a whole number"}},
		{"const", `{"const": {"a": [1.50, "x"]}}`, `{}`, []string{`: must be {"a":[1.50,"x"]}`}},
		{"const of a number", `{"const": 1.0}`, `2`, []string{": must be 1.0"}},
		{"enum", `{"enum": ["a<b", 1, null, true]}`, `"c"`, []string{`: must be one of "a<b", 1, null, true`}},
		{"string lengths count characters", `{"items": {"minLength": 2, "maxLength": 2}}`, `["ü", "üü", "üüü"]`,
			[]string{"/0: must have at least 2 characters, has 1", "/2: must have at most 2 characters, has 3"}},
		{"items", `{"properties": {"a": {"minItems": 2}, "b": {"maxItems": 1}, "c": {"uniqueItems": true}}}`, `{"a": [1], "b": [1, 2], "c": [1, 2, 1.0]}`,
			[]string{"/a: must have at least 2 items, has 1", "/b: must have at most 1 item, has 2", "/c: must not repeat an item: 0 and 2 are equal"}},
		{"members", `{"properties": {"a": {"minProperties": 1}, "b": {"maxProperties": 1}}}`, `{"a": {}, "b": {"x": 1, "y": 2}}`,
			[]string{"/a: must have at least 1 member, has 0", "/b: must have at most 1 member, has 2"}},
		{"contains", `{"contains": {"const": 1}}`, `[2, 3]`, []string{": must have an item of the required form, has none"}},
		{"minContains", `{"contains": {"const": 1}, "minContains": 2}`, `[1, 3]`, []string{": must have at least 2 items of the required form, has 1"}},
		{"maxContains", `{"contains": {"const": 1}, "maxContains": 1}`, `[1, 1]`, []string{": must have at most 1 item of a certain form, has 2"}},
		{"numbers", `{"properties": {"a": {"minimum": 0.01}, "b": {"maximum": 1e3}, "c": {"exclusiveMinimum": 0}, "d": {"exclusiveMaximum": 0}, "e": {"multipleOf": 0.01}}}`,
			`{"a": 0.001, "b": 1001, "c": 0, "d": -0.0, "e": 0.015}`,
			[]string{"/a: must be at least 0.01", "/b: must be at most 1000", "/c: must be more than 0", "/d: must be less than 0", "/e: must be a multiple of 0.01"}},
		{"decimals are exact", `{"items": {"multipleOf": 0.01, "minimum": 0.1}}`, `[0.29, 1.1, 19.99, 0.1]`, nil},
		{"dependent members", `{"dependentRequired": {"a": ["b", "c"]}}`, `{"a": 1}`, []string{`/b: is required beside "a"`, `/c: is required beside "a"`}},
		{"not", `{"not": {"type": "object"}}`, `{}`, []string{": is of a form that is not allowed"}},
		{"allOf", `{"allOf": [{"required": ["a"]}, {"required": ["a", "b"]}]}`, `{}`, []string{"/a: is required", "/b: is required"}},
		{"if", `{"if": {"required": ["a"]}, "then": {"required": ["b"]}, "else": {"required": ["c"]}}`, `{"a": 1}`, []string{"/b: is required"}},
		{"references", `{"$defs": {"x": {"type": "string", "minLength": 1}}, "properties": {"a": {"$ref": "#/$defs/x"}, "b": {"$ref": "#/$defs/x"}}}`, `{"a": "", "b": 1}`,
			[]string{"/a: must have at least 1 character, has 0", "/b: must be a string, is a number"}},
		{"anyOf", `{"properties": {"p": {"anyOf": [{"required": ["iban"]}, {"properties": {"card": {"type": "object", "required": ["number"]}}, "required": ["card"]}]}}}`, `{"p": {"card": {}}}`,
			[]string{"/p: fits none of the alternatives: /iban is required; or /card/number is required"}},
		{"anyOf of types", `{"anyOf": [{"type": "string"}, {"type": "null"}]}`, `1`,
			[]string{": fits none of the alternatives: must be a string, is a number; or must be null, is a number"}},
		{"anyOf of one", `{"anyOf": [{"required": ["a", "b"]}]}`, `{}`, []string{"/a: is required", "/b: is required"}},
		{"many alternatives", `{"oneOf": [{"const": 1}, {"const": 2}, {"const": 3}, {"const": 4}, {"const": 5}, {"const": 6}]}`, `0`,
			[]string{": fits none of the alternatives: must be 1; or must be 2; or must be 3; or must be 4; or must be 5; or …"}},
		{"oneOf of two that fit", `{"oneOf": [{"type": "object"}, {"required": ["a"]}]}`, `{"a": 1}`, []string{": fits more than one of the alternatives, must fit one"}},
		{"names", `{"propertyNames": {"pattern": "^[a-z]+$"}}`, `{"a": 1, "B": 2}`,
			[]string{"/B: is not allowed as a name: must match the pattern ^[a-z]+$"}},
		{"names in alternatives", `{"anyOf": [{"propertyNames": {"maxLength": 1}}, {"type": "array"}]}`, `{"ab": 1}`,
			[]string{": fits none of the alternatives: /ab is not allowed as a name: must have at most 1 character, has 2; or must be an array, is an object"}},
		{"formats are annotations", `{"format": "email"}`, `"x"`, nil},
		{"formats of drafts that check them", `{"$schema": "http://json-schema.org/draft-07/schema#", "format": "email"}`, `"x"`, []string{": must be a valid email"}},
		{"items in the order of their numbers", `{"items": {"type": "string"}}`, `["","","",1,"","","","","","","",1]`,
			[]string{"/3: must be a string, is a number", "/11: must be a string, is a number"}},
		{"the same fault found twice", `{"required": ["a"], "allOf": [{"required": ["a"]}]}`, `{}`, []string{"/a: is required"}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			s, err := compileText(t, test.schema)
			require.NoError(t, err)
			for range 20 { // maps are walked in another order each time
				require.Equal(t, test.want, texts(validateText(t, s, test.order)))
			}
		})
	}
}

// The library tells the place of a bad name by a slice that it writes over
// while it goes on to the next object.
func TestValidateFindsBadNamesWhereTheyAre(t *testing.T) {
	s, err := compileText(t, `{"additionalProperties": {"additionalProperties": {"propertyNames": {"pattern": "^[a-z]+$"}}}}`)
	require.NoError(t, err)
	for range 50 {
		require.Equal(t, []string{
			"/a/x/BAD: is not allowed as a name: must match the pattern ^[a-z]+$",
			"/a/x/WORSE: is not allowed as a name: must match the pattern ^[a-z]+$",
			"/c/x/0: is not allowed as a name: must match the pattern ^[a-z]+$",
		}, texts(validateText(t, s, `{
			"BAD": {"x": {}}, "a": {"BAD": {}, "x": {"BAD": 1, "ok": 2, "WORSE": 3}, "y": {}},
			"b": {"x": {}}, "c": {"x": {"0": 1}, "y": [1, 2]}
		}`)))
	}
}

func TestValidateReportsTwentyFaultsAtMost(t *testing.T) {
	s, err := compileText(t, `{"items": {"type": "string"}}`)
	require.NoError(t, err)
	list := validateText(t, s, "["+strings.Repeat("1,", 999)+"1]")
	require.Len(t, list, maxFieldErrors)
	for i, fault := range list {
		require.Equal(t, fmt.Sprintf("/%d", i), fault.Pointer)
	}
}

func TestValidateCutsHugeNames(t *testing.T) {
	s, err := compileText(t, `{"additionalProperties": false}`)
	require.NoError(t, err)
	list := validateText(t, s, `{"`+strings.Repeat("/", 1<<20)+`": 1}`)
	require.Len(t, list, 1)
	require.LessOrEqual(t, len(list[0].Pointer), maxPointer+len("…"))
}

func TestValidateConcurrently(t *testing.T) {
	s, err := compileSchema("")
	require.NoError(t, err)
	good, err := decodeDocument([]byte(sampleOrder))
	require.NoError(t, err)
	var group sync.WaitGroup
	for range 8 {
		group.Go(func() {
			for range 50 {
				if ok, bad := s.validate(good.value), s.validate(json.Number("1")); ok != nil || len(bad) != 1 {
					t.Errorf("got %v for a good order, %v for a bad one", ok, bad)
					return
				}
			}
		})
	}
	group.Wait()
}

func TestCompileSchemaRefuses(t *testing.T) {
	tests := []struct{ name, schema, want string }{
		{"what is not JSON", "{\n  \"type\": }", "line 2, column 11: missing value after object name"},
		{"a repeated keyword", `{"type": "object", "type": "array"}`, `line 1, column 20: the member "type" stands twice in one object`},
		{"what is no schema", `1`, "not a valid JSON Schema: must be true or false or an object, is a number"},
		{"a keyword with a bad value", `{"properties": {"a": {"minLength": -1, "required": "x"}}}`,
			"not a valid JSON Schema: /properties/a/minLength must be at least 0; /properties/a/required must be an array, is a string"},
		{"a type that is none", `{"type": "text"}`, "not a valid JSON Schema: /type fits none of the alternatives"},
		{"a pattern that is none", `{"pattern": "("}`, "pattern"},
		{"a reference to nothing", `{"$ref": "#/$defs/x"}`, "#/$defs/x"},
		{"a missing file", `{"$ref": "other.json"}`, "reference to file://"},
		{"a dialect from the network", `{"$schema": "https://schemas.example/dialect"}`,
			"reference to https://schemas.example/dialect: not followed: a schema may refer to itself and to other files only"},
		{"another host's file", `{"$ref": "file://host.example/x.json"}`,
			"reference to file://host.example/x.json: not followed: a schema may refer to itself and to other files only"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := compileText(t, test.schema)
			require.ErrorContains(t, err, test.want)
			require.ErrorContains(t, err, "schema.json")
			require.NotContains(t, err.Error(), "\n")
		})
	}

	_, err := compileSchema(filepath.Join(t.TempDir(), "none.json"))
	require.ErrorIs(t, err, os.ErrNotExist)
	require.ErrorContains(t, err, "none.json")
	_, err = compileSchema(t.TempDir())
	require.Error(t, err)
}

func TestCompileSchemaDoesNotUseTheNetwork(t *testing.T) {
	asked := make(chan string, 10)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked <- r.URL.Path
		_, _ = w.Write([]byte(`{}`)) // the test fails anyway
	}))
	defer server.Close()

	url := server.URL + "/x.json"
	_, err := compileText(t, `{"properties": {"a": {"$ref": "`+url+`"}}}`)
	require.ErrorContains(t, err, "reference to "+url+": not followed")
	_, err = compileText(t, `{"$id": "`+server.URL+`/root.json", "$ref": "x.json"}`)
	require.ErrorContains(t, err, "reference to "+url+": not followed")
	require.Empty(t, asked)
}

func TestCompileSchemaFollowsFiles(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a #1 100% ü?") // all that has a meaning in a URL
	require.NoError(t, os.MkdirAll(filepath.Join(dir, "parts"), 0o700))
	path := filepath.Join(dir, "order schema.json")
	require.NoError(t, os.WriteFile(path, []byte(`{"properties": {"item": {"$ref": "parts/item.json#/$defs/item"}}}`), 0o600))
	require.NoError(t, os.WriteFile(filepath.Join(dir, "parts", "item.json"), []byte(`{"$defs": {"item": {"type": "object"}}}`), 0o600))

	s, err := compileSchema(path)
	require.NoError(t, err)
	require.Equal(t, []string{"/item: must be an object, is a number"}, texts(validateText(t, s, `{"item": 1}`)))

	t.Chdir(dir)
	s, err = compileSchema("order schema.json")
	require.NoError(t, err)
	require.Nil(t, validateText(t, s, `{"item": {}}`))

	require.NoError(t, os.WriteFile(filepath.Join("parts", "item.json"), []byte(`{"$defs": }`), 0o600))
	_, err = compileSchema(path)
	require.ErrorContains(t, err, "line 1, column 11")
	require.ErrorContains(t, err, "item.json")
}

func BenchmarkValidate(b *testing.B) {
	s, err := compileSchema("")
	require.NoError(b, err)
	doc, err := decodeDocument([]byte(sampleOrder))
	require.NoError(b, err)
	b.ReportAllocs()
	for b.Loop() {
		if faults := s.validate(doc.value); faults != nil {
			b.Fatal(faults)
		}
	}
}
