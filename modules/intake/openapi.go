package intake

import (
	"bytes"
	_ "embed" // for the document
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/url"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"go.yaml.in/yaml/v3"

	"sluice/platform/httpserver"
)

// openAPIText is the contract with clients, as it is with the built-in schema.
//
//go:embed openapi.yaml
var openAPIText []byte

// orderComponent is the name of the order schema in the document; the names of
// the files that it refers to begin with it.
const orderComponent = "Order"

// openAPI makes GET /openapi.yaml and GET /docs for orders of that schema.
func openAPI(s *schema, numberPointer string) (document, page *httpserver.Static, err error) {
	doc, err := openAPIDocument(s, numberPointer)
	if err != nil {
		return nil, nil, err
	}
	var text bytes.Buffer
	encoder := yaml.NewEncoder(&text)
	encoder.SetIndent(2)
	if err := errors.Join(encoder.Encode(doc), encoder.Close()); err != nil {
		return nil, nil, fmt.Errorf("write the OpenAPI document: %w", err)
	}
	if page, err = docsPage(doc, ProblemTypes()); err != nil {
		return nil, nil, err
	}
	// RFC 9512.
	return httpserver.NewStatic("application/yaml", text.Bytes()), page, nil
}

// openAPIDocument returns openapi.yaml with the schema in it.
func openAPIDocument(s *schema, numberPointer string) (*yaml.Node, error) {
	var file yaml.Node
	if err := yaml.Unmarshal(openAPIText, &file); err != nil {
		return nil, fmt.Errorf("read openapi.yaml: %w", err)
	}
	doc := file.Content[0]
	components, err := s.components()
	if err != nil {
		return nil, err
	}
	schemas := memberOf(doc, "components", "schemas")
	for _, name := range slices.Sorted(maps.Keys(components)) {
		setMember(schemas, name, components[name])
	}
	body := memberOf(doc, "components", "requestBodies", "Order")
	if numberPointer != "" {
		setMember(body, "x-order-number-pointer", stringNode(numberPointer))
	}
	if s.location != builtinLocation {
		forgetExamples(doc)
	}
	return doc, nil
}

// orderArgument is an order on the command line of a sample.
var orderArgument = regexp.MustCompile(`-d '\{.*\}'`)

// forgetExamples removes the orders of the built-in schema.
func forgetExamples(doc *yaml.Node) {
	removeMember(memberOf(doc, "components", "requestBodies", "Order", "content", "application/json"), "examples")
	removeMember(memberOf(doc, "components", "examples"), "Order")
	removeMember(memberOf(doc, "paths", "/orders/batch", "post", "requestBody", "content", "application/x-ndjson"), "example")
	for _, path := range []string{"/orders", "/orders/sync"} {
		for _, sample := range memberOf(doc, "paths", path, "post", "x-codeSamples").Content {
			source := memberOf(sample, "source")
			source.Value = orderArgument.ReplaceAllString(source.Value, "-d @order.json")
		}
	}
}

// components returns the schema and the files that it refers to as components
// of an OpenAPI document, by name, with the references between them.
func (s *schema) components() (map[string]*yaml.Node, error) {
	names := map[string]string{s.location: orderComponent}
	taken := map[string]bool{orderComponent: true}
	for _, location := range slices.Sorted(maps.Keys(s.files)) {
		if location == s.location {
			continue
		}
		base := orderComponent + "." + componentName(location)
		name := base
		for i := 2; taken[name]; i++ {
			name = base + "-" + strconv.Itoa(i)
		}
		names[location], taken[name] = name, true
	}
	nodes, bases := map[string]*yaml.Node{}, map[string]*url.URL{}
	for location, text := range s.files {
		node, err := jsonNode(text)
		if err != nil {
			return nil, fmt.Errorf("read the schema %s: %w", location, err)
		}
		base, err := url.Parse(location)
		if err != nil {
			return nil, fmt.Errorf("read the schema %s: %w", location, err)
		}
		// Its identifier would have references within it mean something else
		// than in the document that it becomes a part of.
		if id := memberOf(node, "$id"); id != nil {
			if base, err = base.Parse(id.Value); err != nil {
				return nil, fmt.Errorf("read the schema %s: %w", location, err)
			}
			names[strings.TrimSuffix(base.String(), "#")] = names[location]
			removeMember(node, "$id")
		}
		nodes[names[location]], bases[names[location]] = node, base
	}
	for name, node := range nodes {
		moveReferences(node, bases[name], names)
	}
	return nodes, nil
}

// componentName returns the name of a file without what a component's name
// cannot have.
func componentName(location string) string {
	name := strings.TrimSuffix(path.Base(location), path.Ext(location))
	return strings.Map(func(r rune) rune {
		if strings.ContainsRune("-_", r) || '0' <= r && r <= '9' || 'a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' {
			return r
		}
		return '-'
	}, name)
}

// moveReferences makes references of a schema at base lead to components. Parts
// with an identifier of their own are left alone: what they refer to stays
// what it was.
func moveReferences(node *yaml.Node, base *url.URL, names map[string]string) {
	if node.Kind == yaml.SequenceNode {
		for _, item := range node.Content {
			moveReferences(item, base, names)
		}
		return
	}
	if node.Kind != yaml.MappingNode || memberOf(node, "$id") != nil {
		return
	}
	for i := 0; i < len(node.Content); i += 2 {
		key, value := node.Content[i].Value, node.Content[i+1]
		switch key {
		case "const", "enum", "default", "examples", "example": // values, not schemas
		case "$ref", "$dynamicRef":
			value.Value = movedReference(value.Value, base, names)
		case "properties", "patternProperties", "$defs", "definitions", "dependentSchemas":
			for j := 1; j < len(value.Content); j += 2 {
				moveReferences(value.Content[j], base, names)
			}
		default:
			moveReferences(value, base, names)
		}
	}
}

func movedReference(ref string, base *url.URL, names map[string]string) string {
	_, fragment, _ := strings.Cut(ref, "#")
	target, err := base.Parse(ref)
	if err != nil {
		return ref // the compiler took it for something that we do not know
	}
	target.Fragment, target.RawFragment = "", ""
	name, ok := names[target.String()]
	switch {
	case !ok:
		return ref
	case fragment != "" && fragment[0] != '/':
		return "#" + fragment // an anchor
	default:
		return "#/components/schemas/" + name + fragment
	}
}

// jsonNode returns a JSON text as YAML, with its members in their order and its
// numbers as they are written.
func jsonNode(text []byte) (*yaml.Node, error) {
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	node, err := nextNode(decoder)
	if errors.Is(err, io.EOF) {
		return nil, io.ErrUnexpectedEOF
	}
	return node, err
}

func nextNode(decoder *json.Decoder) (*yaml.Node, error) {
	token, err := decoder.Token()
	if err != nil {
		return nil, err
	}
	switch token := token.(type) {
	case json.Delim:
		node := &yaml.Node{Kind: yaml.MappingNode}
		if token == '[' {
			node.Kind = yaml.SequenceNode
		}
		for decoder.More() {
			// A name or an item; the value of a name is the next one.
			child, err := nextNode(decoder)
			if err != nil {
				return nil, err
			}
			node.Content = append(node.Content, child)
		}
		_, err = decoder.Token() // the other end
		return node, err
	case string:
		return stringNode(token), nil
	case json.Number:
		tag := "!!int"
		if strings.ContainsAny(token.String(), ".eE") {
			tag = "!!float"
		}
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: tag, Value: token.String()}, nil
	case bool:
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!bool", Value: strconv.FormatBool(token)}, nil
	default:
		return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!null", Value: "null"}, nil
	}
}

func stringNode(s string) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: s}
}

// memberOf returns the value at a path of names, nil if there is none.
func memberOf(node *yaml.Node, names ...string) *yaml.Node {
	for _, name := range names {
		i := memberIndex(node, name)
		if i < 0 {
			return nil
		}
		node = node.Content[i+1]
	}
	return node
}

func memberIndex(node *yaml.Node, name string) int {
	if node != nil && node.Kind == yaml.MappingNode {
		for i := 0; i < len(node.Content); i += 2 {
			if node.Content[i].Value == name {
				return i
			}
		}
	}
	return -1
}

func setMember(node *yaml.Node, name string, value *yaml.Node) {
	if i := memberIndex(node, name); i >= 0 {
		node.Content[i+1] = value
		return
	}
	node.Content = append(node.Content, stringNode(name), value)
}

func removeMember(node *yaml.Node, name string) {
	if i := memberIndex(node, name); i >= 0 {
		node.Content = slices.Delete(node.Content, i, i+2)
	}
}
