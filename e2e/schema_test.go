package e2e

import (
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/stretchr/testify/require"
)

// ownSchema is an order of another shape than the default one, in two files.
func ownSchema(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range map[string]string{
		"order.json": `{"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "object", "required": ["head", "lines"],
			"properties": {
				"head": {"type": "object", "properties": {"no": {"type": ["string", "integer"]}, "when": {"$ref": "#/$defs/day"}}},
				"lines": {"type": "array", "minItems": 1, "items": {"$ref": "line.json"}}},
			"additionalProperties": false,
			"$defs": {"day": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}}}`,
		"line.json": `{"type": "object", "required": ["article", "pieces"],
			"properties": {"article": {"type": "string"}, "pieces": {"$ref": "#/$defs/pieces"}},
			"$defs": {"pieces": {"type": "integer", "minimum": 1, "maximum": 999}}}`,
	} {
		require.NoError(t, os.WriteFile(dir+"/"+name, []byte(text), 0o600))
	}
	return dir + "/order.json"
}

func TestOrdersOfAnotherShape(t *testing.T) { eachHome(t, testOrdersOfAnotherShape) }

func testOrdersOfAnotherShape(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, h, fast(b, "intake.schema", ownSchema(t), "intake.order_number_pointer", "/head/no"))
	text := ` {"head": {"no": "X 1", "when": "2026-11-22"}, "lines": [{"article": "tea", "pieces": 2}]}`

	a := g.post(t, text)
	require.Equal(t, http.StatusAccepted, a.status, string(a.body))
	require.Equal(t, "X 1", *a.order(t).OrderNumber)
	g.await(t, a.order(t).ID, "saved")
	require.Equal(t, a.order(t).ID, g.numbered(t, "X%201")[0].ID)
	var kept struct{ Body json.RawMessage }
	getJSON(t, b.url+"/orders/X%201", &kept)
	require.JSONEq(t, text, string(kept.Body))
	require.Equal(t, "true", g.post(t, text).header.Get("Idempotent-Replayed"))
	g.post(t, strings.Replace(text, `"pieces": 2`, `"pieces": 3`, 1)).problem(t, http.StatusConflict, "duplicate-order-number")

	// A number may be one: equal ones are equal, however they are written.
	whole := strings.Replace(text, `"X 1"`, `1700`, 1)
	a = g.post(t, whole)
	require.Equal(t, http.StatusAccepted, a.status, string(a.body))
	require.Equal(t, "1700", *a.order(t).OrderNumber)
	again := g.post(t, strings.Replace(whole, "1700", "1.7e3", 1))
	require.Equal(t, "true", again.header.Get("Idempotent-Replayed"))
	require.Equal(t, a.order(t).ID, again.order(t).ID)
	require.Equal(t, "saved", g.await(t, a.order(t).ID, "saved").Status)
	g.post(t, strings.Replace(whole, "tea", "coffee", 1)).problem(t, http.StatusConflict, "duplicate-order-number")

	for _, test := range []struct{ old, new, pointer, detail string }{
		{`"pieces": 2`, `"pieces": 0`, "/lines/0/pieces", "must be at least 1"},
		{`"article": "tea", `, ``, "/lines/0/article", "is required"},
		{`"2026-11-22"`, `"today"`, "/head/when", "must match the pattern"},
		{`"head"`, `"more": 1, "head"`, "/more", "is not allowed here"},
		{`"X 1"`, `1.5`, "/head/no", "must be a whole number or a string"},
		{`"no": "X 1", `, ``, "/head/no", "is the order number"},
		{`"X 1"`, `""`, "/head/no", "is the order number"},
	} {
		p := g.post(t, strings.Replace(text, test.old, test.new, 1)).problem(t, http.StatusUnprocessableEntity, "invalid-order")
		require.Len(t, p.Errors, 1)
		require.Equal(t, test.pointer, p.Errors[0].Pointer)
		require.Contains(t, p.Errors[0].Detail, test.detail)
	}
	g.post(t, body("A-1")).problem(t, http.StatusUnprocessableEntity, "invalid-order")
	requireDescribed(t, g, text, strings.Replace(text, `"pieces": 2`, `"pieces": 1000`, 1))
}

// requireDescribed checks that the document of the gateway knows a good order
// from a bad one.
func requireDescribed(t *testing.T, g *gateway, good, bad string) {
	t.Helper()
	a := do(t, http.MethodGet, g.url+"/openapi.yaml", "", nil)
	schemas, err := schemasOf(a.body, "file:///served.yaml", jsonschema.Draft2020)
	require.NoError(t, err)
	schema, err := schemas.Compile("file:///served.yaml#/components/schemas/Order")
	require.NoError(t, err)
	for text, valid := range map[string]bool{good: true, bad: false} {
		value, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
		require.NoError(t, err)
		require.Equal(t, valid, schema.Validate(value) == nil, text)
	}
}

func TestOrdersWithoutANumber(t *testing.T) { eachHome(t, testOrdersWithoutANumber) }

func testOrdersWithoutANumber(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, h, fast(b, "intake.schema", ownSchema(t), "intake.order_number_pointer", ""))
	text := `{"head": {}, "lines": [{"article": "tea", "pieces": 2}]}`
	ids := map[string]bool{}
	for range 2 {
		a := g.post(t, text)
		require.Equal(t, http.StatusAccepted, a.status, string(a.body))
		require.Nil(t, a.order(t).OrderNumber)
		require.Nil(t, g.await(t, a.order(t).ID, "saved").OrderNumber)
		ids[a.order(t).ID] = true
	}
	require.Len(t, ids, 2, "nothing says that they are the same")
	first := g.post(t, text, "Idempotency-Key", `"k"`)
	again := g.post(t, text, "Idempotency-Key", `"k"`)
	require.Equal(t, first.order(t).ID, again.order(t).ID)
	require.Equal(t, "true", again.header.Get("Idempotent-Replayed"))
}

func TestABrokenSchemaIsAConfigurationError(t *testing.T) {
	dir := t.TempDir()
	for name, test := range map[string]struct{ text, says string }{
		"not JSON":              {`{"type": `, "ends before"},
		"no schema":             {`{"type": "strin"}`, "not a valid JSON Schema: /type "},
		"a pattern":             {`{"pattern": "("}`, "/pattern"},
		"a part that is not":    {`{"$ref": "#/$defs/none"}`, "none"},
		"a file that is not":    {`{"$ref": "none.json"}`, "none.json"},
		"a file of the network": {`{"$ref": "http://127.0.0.1:1/order.json"}`, "not followed"},
	} {
		t.Run(name, func(t *testing.T) {
			file := dir + "/" + strings.ReplaceAll(name, " ", "-") + ".json"
			require.NoError(t, os.WriteFile(file, []byte(test.text), 0o600))
			code, stdout, stderr := command(t, settings{"intake.schema": file, "store.dsn": dir + "/sluice.db"}.env(), "serve")
			require.Equal(t, 2, code, stderr)
			require.Empty(t, stdout)
			lines := strings.Split(strings.TrimSpace(stderr), "\n")
			require.Len(t, lines, 2, stderr)
			require.Regexp(t, "^intake.schema: .*"+strings.TrimSuffix(file[strings.LastIndex(file, "/")+1:], ".json"), lines[1])
			require.Contains(t, lines[1], test.says)
		})
	}
	code, _, stderr := command(t, settings{"intake.schema": dir + "/none.json", "intake.order_number_pointer": "no/slash"}.env(), "serve")
	require.Equal(t, 2, code)
	require.Contains(t, stderr, "intake.schema: read the schema: open "+dir+"/none.json")
	require.Contains(t, stderr, "intake.order_number_pointer: ")
	require.NoFileExists(t, dir+"/sluice.db")
}
