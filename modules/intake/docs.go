package intake

import (
	_ "embed" // for the template
	"errors"
	"fmt"
	"html"
	"html/template"
	"strconv"
	"strings"

	"github.com/go-json-experiment/json/jsontext"
	"go.yaml.in/yaml/v3"

	"sluice/platform/httpserver"
)

//go:embed docs.html
var docsText string

var docsTemplate = template.Must(template.New("docs").Funcs(template.FuncMap{"lower": strings.ToLower}).Parse(docsText))

// docsPage renders an OpenAPI document, as far as ours goes.
func docsPage(doc *yaml.Node, problems []httpserver.ProblemType) (*httpserver.Static, error) {
	r := renderer{doc: doc}
	view := r.page()
	view.Problems = problems
	if r.err != nil {
		return nil, fmt.Errorf("render the OpenAPI document: %w", r.err)
	}
	var body strings.Builder
	if err := docsTemplate.Execute(&body, view); err != nil {
		return nil, fmt.Errorf("render the OpenAPI document: %w", err)
	}
	return httpserver.NewPage(view.Title+" API", template.HTML(body.String()))
}

// What the template is given.
type (
	docsView struct {
		Title, Version, Summary string
		Text                    template.HTML
		Groups                  []docsGroup
		Schemas                 []docsSchema
		Security                template.HTML
		Problems                []httpserver.ProblemType
	}
	docsGroup struct {
		Name, Text string
		Operations []docsOperation
	}
	docsOperation struct {
		ID, Method, Path, Summary string
		Text                      template.HTML
		Parameters                []docsField
		Body                      *docsBody
		Responses                 []docsResponse
		Samples                   []docsExample
	}
	docsField struct {
		Name, In, Example string
		Required          bool
		Type, Text        template.HTML
	}
	docsBody struct {
		Text     template.HTML
		Contents []docsContent
	}
	docsResponse struct {
		Status, Class string
		Text          template.HTML
		Headers       []docsField
		Contents      []docsContent
		Problems      []string
	}
	docsContent struct {
		MediaType string
		Type      template.HTML
		Examples  []docsExample
	}
	docsExample struct{ Title, Text string }
	docsSchema  struct {
		Name       string
		Text, Type template.HTML
		Fields     []docsField
		Source     string
	}
)

// renderer reads the document. It keeps the first error.
type renderer struct {
	doc *yaml.Node
	err error
}

func (r *renderer) page() docsView {
	info := memberOf(r.doc, "info")
	view := docsView{
		Title: text(info, "title"), Version: text(info, "version"), Summary: text(info, "summary"),
		Text:     prose(text(info, "description")),
		Security: prose(text(memberOf(r.doc, "components", "securitySchemes", "apiKey"), "description")),
	}
	for _, tag := range items(memberOf(r.doc, "tags")) {
		group := docsGroup{Name: text(tag, "name"), Text: text(tag, "description")}
		each(memberOf(r.doc, "paths"), func(path string, operations *yaml.Node) {
			shared := memberOf(operations, "parameters")
			each(operations, func(method string, o *yaml.Node) {
				if tags := items(memberOf(o, "tags")); len(tags) > 0 && tags[0].Value == group.Name {
					group.Operations = append(group.Operations, r.operation(strings.ToUpper(method), path, o, shared))
				}
			})
		})
		view.Groups = append(view.Groups, group)
	}
	each(memberOf(r.doc, "components", "schemas"), func(name string, schema *yaml.Node) {
		view.Schemas = append(view.Schemas, r.schema(name, schema))
	})
	return view
}

func (r *renderer) operation(method, path string, o, shared *yaml.Node) docsOperation {
	view := docsOperation{ID: text(o, "operationId"), Method: method, Path: path,
		Summary: text(o, "summary"), Text: prose(text(o, "description"))}
	for _, p := range append(items(shared), items(memberOf(o, "parameters"))...) {
		p = r.resolve(p)
		view.Parameters = append(view.Parameters, r.field(text(p, "name"), p))
	}
	if body := r.resolve(memberOf(o, "requestBody")); body != nil {
		view.Body = &docsBody{Text: prose(text(body, "description")), Contents: r.contents(body)}
	}
	each(memberOf(o, "responses"), func(status string, response *yaml.Node) {
		view.Responses = append(view.Responses, r.response(status, r.resolve(response)))
	})
	for _, sample := range items(memberOf(o, "x-codeSamples")) {
		view.Samples = append(view.Samples, docsExample{text(sample, "label"), strings.TrimSpace(text(sample, "source"))})
	}
	return view
}

func (r *renderer) response(status string, response *yaml.Node) docsResponse {
	view := docsResponse{Status: status, Text: prose(text(response, "description")), Contents: r.contents(response)}
	switch status[0] {
	case '2':
		view.Class = "ok"
	case '3':
		view.Class = "same"
	default:
		view.Class = "bad"
	}
	each(memberOf(response, "headers"), func(name string, header *yaml.Node) {
		view.Headers = append(view.Headers, r.field(name, r.resolve(header)))
	})
	each(memberOf(response, "content"), func(_ string, content *yaml.Node) {
		view.Problems = append(view.Problems, r.problems(memberOf(content, "schema"))...)
	})
	return view
}

// problems lists the types of problems that a schema allows. A schema that is
// no problem, or any problem, has none.
func (r *renderer) problems(schema *yaml.Node) []string {
	var list []string
	for _, kind := range items(memberOf(schema, "properties", "type", "enum")) {
		if strings.HasPrefix(kind.Value, "/problems/") {
			list = append(list, kind.Value)
		}
	}
	for _, alternative := range items(memberOf(schema, "oneOf")) {
		list = append(list, r.problems(alternative)...)
	}
	if len(list) == 0 && memberOf(schema, "$ref") != nil {
		return r.problems(r.resolve(schema))
	}
	return list
}

func (r *renderer) contents(of *yaml.Node) []docsContent {
	var list []docsContent
	each(memberOf(of, "content"), func(mediaType string, content *yaml.Node) {
		view := docsContent{MediaType: mediaType, Type: r.typeOf(memberOf(content, "schema"))}
		if item := memberOf(content, "x-item-schema"); item != nil {
			view.Type = "a stream of " + r.typeOf(item)
		}
		if example := memberOf(content, "example"); example != nil {
			view.Examples = append(view.Examples, docsExample{"Example", r.example(example)})
		}
		each(memberOf(content, "examples"), func(_ string, example *yaml.Node) {
			example = r.resolve(example)
			view.Examples = append(view.Examples, docsExample{text(example, "summary"), r.example(memberOf(example, "value"))})
		})
		list = append(list, view)
	})
	return list
}

// example returns a value as JSON, or as it is if it is text.
func (r *renderer) example(value *yaml.Node) string {
	if value.Kind == yaml.ScalarNode {
		return strings.TrimSpace(value.Value)
	}
	var b strings.Builder
	writeJSON(&b, value, "")
	return b.String()
}

// field is a parameter, a header or a property.
func (r *renderer) field(name string, node *yaml.Node) docsField {
	schema := memberOf(node, "schema")
	if schema == nil {
		schema = node
	}
	return docsField{Name: name, In: text(node, "in"), Example: text(node, "example"), Required: text(node, "required") == "true",
		Type: r.typeOf(schema), Text: prose(text(node, "description"))}
}

func (r *renderer) schema(name string, node *yaml.Node) docsSchema {
	source, err := yaml.Marshal(node)
	if err != nil && r.err == nil {
		r.err = err
	}
	view := docsSchema{Name: name, Text: prose(text(node, "description")), Type: r.typeOf(node), Source: strings.TrimSpace(string(source))}
	required := map[string]bool{}
	for _, property := range items(memberOf(node, "required")) {
		required[property.Value] = true
	}
	each(memberOf(node, "properties"), func(property string, schema *yaml.Node) {
		field := r.field(property, schema)
		if field.Text == "" {
			field.Text = prose(text(r.resolve(schema), "description"))
		}
		field.Required = required[property]
		view.Fields = append(view.Fields, field)
	})
	return view
}

// typeOf says in a few words what a schema allows.
func (r *renderer) typeOf(schema *yaml.Node) template.HTML {
	if schema == nil || schema.Kind != yaml.MappingNode {
		return "anything"
	}
	if ref := text(schema, "$ref"); ref != "" {
		name, ok := strings.CutPrefix(ref, "#/components/schemas/")
		if !ok {
			return "<code>" + escape(ref) + "</code>"
		}
		name, rest, _ := strings.Cut(name, "/")
		if rest != "" {
			return `<a href="#schema-` + escape(name) + `">part of ` + escape(name) + `</a>`
		}
		return `<a href="#schema-` + escape(name) + `">` + escape(name) + `</a>`
	}
	for _, keyword := range []string{"oneOf", "anyOf"} {
		if alternatives := items(memberOf(schema, keyword)); len(alternatives) > 0 {
			return joined(alternatives, " or ", r.typeOf)
		}
	}
	if constant := memberOf(schema, "const"); constant != nil {
		return "<code>" + escape(constant.Value) + "</code>"
	}
	if values := items(memberOf(schema, "enum")); len(values) > 0 {
		return joined(values, ", ", func(v *yaml.Node) template.HTML { return "<code>" + escape(v.Value) + "</code>" })
	}
	kind := memberOf(schema, "type")
	if kind == nil {
		return "anything"
	}
	name := escape(kind.Value)
	if kind.Kind == yaml.SequenceNode {
		name = joined(kind.Content, " or ", func(v *yaml.Node) template.HTML { return escape(v.Value) })
	}
	if kind.Value == "array" {
		name += " of " + r.typeOf(memberOf(schema, "items"))
	}
	return name + bounds(schema)
}

// bounds says what a schema asks of a value beside its type.
func bounds(schema *yaml.Node) template.HTML {
	var list []string
	for _, keyword := range []struct{ name, says string }{
		{"format", "%s"}, {"minimum", "at least %s"}, {"maximum", "at most %s"}, {"exclusiveMinimum", "more than %s"}, {"exclusiveMaximum", "less than %s"},
		{"minLength", "at least %s characters"}, {"maxLength", "at most %s characters"}, {"minItems", "at least %s items"}, {"maxItems", "at most %s items"},
		{"default", "default %s"}, {"pattern", "matches `%s`"},
	} {
		if value := memberOf(schema, keyword.name); value != nil && value.Kind == yaml.ScalarNode {
			list = append(list, fmt.Sprintf(keyword.says, value.Value))
		}
	}
	if len(list) == 0 {
		return ""
	}
	return ", " + inline(strings.Join(list, ", "))
}

// resolve follows a reference within the document.
func (r *renderer) resolve(node *yaml.Node) *yaml.Node {
	ref := text(node, "$ref")
	if ref == "" {
		return node
	}
	pointer, local := strings.CutPrefix(ref, "#/")
	target := r.doc
	for _, name := range strings.Split(pointer, "/") {
		target = memberOf(target, strings.NewReplacer("~1", "/", "~0", "~").Replace(name))
	}
	if (!local || target == nil) && r.err == nil {
		r.err = errors.New("no such component: " + ref)
	}
	return target
}

// text returns a member that is a scalar, "" if it is none.
func text(node *yaml.Node, name string) string {
	if value := memberOf(node, name); value != nil && value.Kind == yaml.ScalarNode {
		return value.Value
	}
	return ""
}

func items(node *yaml.Node) []*yaml.Node {
	if node == nil || node.Kind != yaml.SequenceNode {
		return nil
	}
	return node.Content[:len(node.Content):len(node.Content)]
}

func each(node *yaml.Node, do func(name string, value *yaml.Node)) {
	if node == nil || node.Kind != yaml.MappingNode {
		return
	}
	for i := 0; i < len(node.Content); i += 2 {
		do(node.Content[i].Value, node.Content[i+1])
	}
}

func joined(nodes []*yaml.Node, separator string, show func(*yaml.Node) template.HTML) template.HTML {
	var parts []string
	for _, node := range nodes {
		parts = append(parts, string(show(node)))
	}
	return template.HTML(strings.Join(parts, separator))
}

func escape(s string) template.HTML { return template.HTML(html.EscapeString(s)) }

// prose returns text with its paragraphs, and `this` as code.
func prose(s string) template.HTML {
	var b strings.Builder
	for paragraph := range strings.SplitSeq(strings.TrimSpace(s), "\n\n") {
		if paragraph != "" {
			b.WriteString("<p>" + string(inline(paragraph)) + "</p>")
		}
	}
	return template.HTML(b.String())
}

func inline(s string) template.HTML {
	var b strings.Builder
	for i, part := range strings.Split(s, "`") {
		if i%2 == 1 {
			part = "<code>" + html.EscapeString(part) + "</code>"
		} else {
			part = html.EscapeString(part)
		}
		b.WriteString(part)
	}
	return template.HTML(b.String())
}

// writeJSON writes a value as JSON with its members in their order.
func writeJSON(b *strings.Builder, node *yaml.Node, indent string) {
	const step = "  "
	list := func(open, end string, width int, write func(i int)) {
		b.WriteString(open)
		for i := 0; i < len(node.Content); i += width {
			if i > 0 {
				b.WriteByte(',')
			}
			b.WriteString("\n" + indent + step)
			write(i)
		}
		if len(node.Content) > 0 {
			b.WriteString("\n" + indent)
		}
		b.WriteString(end)
	}
	switch {
	case node.Kind == yaml.MappingNode:
		list("{", "}", 2, func(i int) {
			b.WriteString(jsonString(node.Content[i].Value) + ": ")
			writeJSON(b, node.Content[i+1], indent+step)
		})
	case node.Kind == yaml.SequenceNode:
		list("[", "]", 1, func(i int) { writeJSON(b, node.Content[i], indent+step) })
	case node.ShortTag() == "!!str" || node.ShortTag() == "!!timestamp":
		b.WriteString(jsonString(node.Value))
	default:
		b.WriteString(node.Value)
	}
}

func jsonString(s string) string {
	text, err := jsontext.AppendQuote(nil, s)
	if err != nil {
		return strconv.Quote(s) // of bytes that are no UTF-8, which YAML does not have
	}
	return string(text)
}
