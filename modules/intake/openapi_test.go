package intake

import (
	"bytes"
	"context"
	"encoding/json"
	"html"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"go.yaml.in/yaml/v3"

	"sluice/platform/httpserver"
)

// served returns the document and the page for orders of that schema.
func served(t *testing.T, s *schema, pointer string) (document []byte, page *httptest.ResponseRecorder) {
	t.Helper()
	doc, docs, err := openAPI(s, pointer)
	require.NoError(t, err)
	answer := httptest.NewRecorder()
	doc.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/openapi.yaml", nil))
	page = httptest.NewRecorder()
	docs.ServeHTTP(page, httptest.NewRequest(http.MethodGet, "/docs", nil))
	return answer.Body.Bytes(), page
}

// requireOpenAPI checks that it is an OpenAPI document, its examples included.
func requireOpenAPI(t *testing.T, document []byte) *openapi3.T {
	t.Helper()
	spec, err := openapi3.NewLoader().LoadFromData(document)
	require.NoError(t, err, string(document))
	require.True(t, spec.IsOpenAPI31OrLater())
	require.NoError(t, spec.Validate(context.Background(), openapi3.EnableExamplesValidation()))
	return spec
}

func TestTheDocumentIsOpenAPI(t *testing.T) {
	s, err := compileSchema("")
	require.NoError(t, err)
	document, _ := served(t, s, "/orderNumber")
	spec := requireOpenAPI(t, document)

	ids := map[string]bool{}
	for path, item := range spec.Paths.Map() {
		for method, o := range item.Operations() {
			name := method + " " + path
			require.NotEmpty(t, o.Summary, name)
			require.NotEmpty(t, o.Extensions["x-codeSamples"], name)
			require.False(t, ids[o.OperationID], o.OperationID)
			ids[o.OperationID] = true
			require.NotNil(t, o.Responses.Status(http.StatusInternalServerError), "%s can fail", name)
			require.Nil(t, o.Responses.Default(), "%s must name every status", name)
		}
	}
}

func TestTheDocumentHasEveryRoute(t *testing.T) {
	mux := http.NewServeMux()
	m := &Module{deps: Deps{TracerProvider: tracenoop.NewTracerProvider(), MeterProvider: noop.NewMeterProvider(), Propagator: propagation.TraceContext{}}}
	m.Routes(mux)
	spec, err := openapi3.NewLoader().LoadFromData(bytes.ReplaceAll(openAPIText, []byte("$ref: schema/order.json"), []byte("type: object")))
	require.NoError(t, err)
	for path, item := range spec.Paths.Map() {
		for method := range item.Operations() {
			name := method + " " + path
			if strings.HasPrefix(path, "/problems/") {
				continue // for all addresses: serve.go
			}
			_, pattern := mux.Handler(httptest.NewRequest(method, strings.ReplaceAll(path, "{id}", "x"), nil))
			require.Equal(t, name, pattern)
		}
	}
	source, err := os.ReadFile("intake.go")
	require.NoError(t, err)
	for _, route := range regexp.MustCompile(`(?:m\.handle\(mux, |mux\.Handle\()"(\S+) (/[^a"]\S*)"`).FindAllStringSubmatch(string(source), -1) {
		item := spec.Paths.Value(route[2])
		require.NotNil(t, item, "%s is not documented", route[2])
		require.NotNil(t, item.Operations()[route[1]], "%s %s is not documented", route[1], route[2])
	}
}

func TestTheDocumentHasEveryTypeOfProblem(t *testing.T) {
	var doc struct {
		Components struct {
			Schemas struct {
				ProblemType struct{ Enum []string } `yaml:"ProblemType"`
			}
		}
	}
	require.NoError(t, yaml.Unmarshal(openAPIText, &doc))
	var names []string
	for _, problem := range ProblemTypes() {
		names = append(names, "/problems/"+problem.Name)
		for _, text := range []string{problem.Title, problem.Happened, problem.Do} {
			require.NotEmpty(t, text, problem.Name)
		}
		require.True(t, strings.HasSuffix(problem.Happened, ".") && strings.HasSuffix(problem.Do, "."), problem.Name)
	}
	require.Equal(t, names, doc.Components.Schemas.ProblemType.Enum)
}

// writeFiles writes a schema in several files and returns the path of the first.
func writeFiles(t *testing.T, files ...[2]string) string {
	t.Helper()
	dir := t.TempDir()
	for _, file := range files {
		path := filepath.Join(dir, file[0])
		require.NoError(t, os.MkdirAll(filepath.Dir(path), 0o700))
		require.NoError(t, os.WriteFile(path, []byte(file[1]), 0o600))
	}
	return filepath.Join(dir, files[0][0])
}

// Whatever a schema is made of, the served document is one of OpenAPI, and its
// order schema finds the same orders good and bad.
func TestTheDocumentHasTheSchemaThatIsConfigured(t *testing.T) {
	for name, test := range map[string]struct {
		files     [][2]string
		good, bad string
	}{
		"in one file": {[][2]string{{"o.json", `{"type": "object", "properties": {"z": {"type": "integer"}, "a": {"const": 1.50}}, "required": ["z"]}`}},
			`{"z": 1, "a": 1.5}`, `{"z": 1.5}`},
		"a reference within": {[][2]string{{"o.json", `{"properties": {"x": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}`}},
			`{"x": 1}`, `{"x": "1"}`},
		"to itself": {[][2]string{{"o.json", `{"type": "object", "properties": {"x": {"$ref": "#"}}, "additionalProperties": false}`}},
			`{"x": {"x": {}}}`, `{"x": {"x": {"y": 1}}}`},
		"with an identifier": {[][2]string{{"o.json", `{"$id": "https://example.org/schemas/order", "properties": {"x": {"$ref": "#/$defs/n"}, "y": {"$ref": "order#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}`}},
			`{"x": 1, "y": 2}`, `{"y": "1"}`},
		"in several files": {[][2]string{
			{"o.json", `{"properties": {"x": {"$ref": "parts/line.json"}, "y": {"$ref": "parts/line.json#/$defs/n"}}}`},
			{"parts/line.json", `{"type": "object", "properties": {"n": {"$ref": "#/$defs/n"}, "more": {"$ref": "../line.json"}}, "$defs": {"n": {"type": "integer"}}}`},
			{"line.json", `{"type": "array", "items": {"$ref": "o.json"}}`}},
			`{"x": {"n": 1, "more": [{"y": 1}]}, "y": 2}`, `{"x": {"more": [{"y": "1"}]}}`},
		"values that look like references": {[][2]string{{"o.json", `{"properties": {"$ref": {"enum": ["#/x", {"$ref": "#/y"}]}, "const": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"type": "integer"}}}`}},
			`{"$ref": {"$ref": "#/y"}, "const": 1}`, `{"const": "1"}`},
		"odd texts": {[][2]string{{"o.json", `{"description": "yes: no # \"\u00e4\ud83d\ude00\n", "properties": {"true": {"type": "boolean"}, "1": {"const": "1"}, "~": {"const": null}}}`}},
			`{"true": true, "1": "1", "~": null}`, `{"1": 1}`},
		"everything": {[][2]string{{"o.json", `{"not": false}`}}, `[1]`, ``},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := compileSchema(writeFiles(t, test.files...))
			require.NoError(t, err)
			document, page := served(t, s, "/x")
			requireOpenAPI(t, document)
			require.NotContains(t, string(document), "A-1001\",\"customerId", "examples of another schema")
			require.NotContains(t, string(document), t.TempDir(), "where files are is nobody's business")
			require.Contains(t, page.Body.String(), `id="schema-Order"`)

			var value any
			require.NoError(t, yaml.Unmarshal(document, &value))
			text, err := json.Marshal(value)
			require.NoError(t, err)
			value, err = jsonschema.UnmarshalJSON(bytes.NewReader(text))
			require.NoError(t, err)
			compiler := jsonschema.NewCompiler()
			require.NoError(t, compiler.AddResource("file:///served.json", value))
			compiled, err := compiler.Compile("file:///served.json#/components/schemas/Order")
			require.NoError(t, err)
			for text, good := range map[string]bool{test.good: true, test.bad: false} {
				if text == "" {
					continue
				}
				require.Equal(t, good, len(validateText(t, s, text)) == 0, text)
				value, err := jsonschema.UnmarshalJSON(strings.NewReader(text))
				require.NoError(t, err)
				require.Equal(t, good, compiled.Validate(value) == nil, text)
			}
		})
	}
}

func TestThePageShowsEverythingAndFetchesNothing(t *testing.T) {
	s, err := compileSchema("")
	require.NoError(t, err)
	document, answer := served(t, s, "/orderNumber")
	require.Equal(t, http.StatusOK, answer.Code)
	require.Equal(t, "text/html; charset=utf-8", answer.Header().Get("Content-Type"))
	page := html.UnescapeString(answer.Body.String())
	for _, outside := range []string{"<script", "<link", "<img", "<iframe", "src=", "@import", "url(", " style=", " onclick="} {
		require.NotContains(t, page, outside)
	}
	require.Empty(t, regexp.MustCompile(`(href|action)="[^#/]`).FindString(page))
	spec := requireOpenAPI(t, document)
	for path, item := range spec.Paths.Map() {
		for method, o := range item.Operations() {
			from := strings.Index(page, `<section class="operation" id="`+o.OperationID+`"`)
			require.Positive(t, from, o.OperationID)
			section := page[from : from+strings.Index(page[from:], "</section>")]
			require.Contains(t, section, ">"+method+"<")
			require.Contains(t, section, ">"+path+"<")
			for _, p := range append(item.Parameters, o.Parameters...) {
				require.Contains(t, section, "<code>"+p.Value.Name+"</code>")
			}
			for status, response := range o.Responses.Map() {
				require.Contains(t, section, ">"+status+"</span>")
				for header := range response.Value.Headers {
					require.Contains(t, section, "<code>"+header+"</code>")
				}
				for mediaType := range response.Value.Content {
					require.Contains(t, section, "<code>"+mediaType+"</code>")
				}
			}
			require.Contains(t, section, "curl ")
		}
	}
	for name := range spec.Components.Schemas {
		require.Contains(t, page, `id="schema-`+name+`"`)
	}
	for _, match := range regexp.MustCompile(`href="#([^"]+)"`).FindAllStringSubmatch(page, -1) {
		require.Contains(t, page, `id="`+match[1]+`"`)
	}
	for _, problem := range append(httpserver.ProblemTypes(), ProblemTypes()...) {
		require.Contains(t, page, `href="/problems/`+problem.Name+`"`)
	}
	require.Empty(t, regexp.MustCompile(`\$ref|#/components`).FindString(regexp.MustCompile(`(?s)<details>.*?</details>`).ReplaceAllString(page, "")))
}
