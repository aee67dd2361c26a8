package config

import (
	"bytes"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

// secret stands where a password would.
const secret = "<secret>"

// redacter is a map whose values are secrets: Redacted has the same names, and
// nothing that must not be shown.
type redacter interface{ Redacted() map[string]string }

// listRedacter is a list with secrets in it, likewise.
type listRedacter interface{ Redacted() []string }

// YAML returns the configuration as a file that Load reads, with <secret> in
// place of the values of headers, of the hashes of API keys, and of passwords in
// URLs and DSNs. (A URL or a key that lost its secret so is refused when it is
// loaded: it has to be put back.)
func (c Config) YAML() ([]byte, error) {
	root := &yaml.Node{Kind: yaml.MappingNode}
	for name, field := range fields(&c) {
		section, path := root, strings.Split(name, ".")
		for _, part := range path[:len(path)-1] {
			section = subsection(section, part)
		}
		appendEntry(section, path[len(path)-1], valueNode(field.Interface()))
	}
	var out bytes.Buffer
	encoder := yaml.NewEncoder(&out)
	encoder.SetIndent(2)
	if err := encoder.Encode(root); err != nil {
		return nil, fmt.Errorf("encode the configuration: %w", err)
	}
	return out.Bytes(), nil
}

// subsection returns the mapping of this name, which is the last one or a new
// one, for keys come in the order of the file.
func subsection(section *yaml.Node, name string) *yaml.Node {
	if n := len(section.Content); n > 0 && section.Content[n-2].Value == name {
		return section.Content[n-1]
	}
	mapping := &yaml.Node{Kind: yaml.MappingNode}
	appendEntry(section, name, mapping)
	return mapping
}

func appendEntry(mapping *yaml.Node, name string, value *yaml.Node) {
	mapping.Content = append(mapping.Content, textNode(name), value)
}

func valueNode(value any) *yaml.Node {
	switch v := value.(type) {
	case string:
		return textNode(hidePasswords(v))
	case redacter:
		pairs := v.Redacted()
		mapping := &yaml.Node{Kind: yaml.MappingNode}
		for _, name := range slices.Sorted(maps.Keys(pairs)) {
			appendEntry(mapping, name, textNode(pairs[name]))
		}
		return mapping
	case listRedacter:
		sequence := &yaml.Node{Kind: yaml.SequenceNode}
		for _, item := range v.Redacted() {
			sequence.Content = append(sequence.Content, textNode(item))
		}
		return sequence
	default:
		return &yaml.Node{Kind: yaml.ScalarNode, Value: format(value)}
	}
}

// textNode is a string, quoted where YAML would take it for something else.
func textNode(text string) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: text}
}

var passwords = []*regexp.Regexp{
	regexp.MustCompile(`(://[^/?#:@]*:)[^/?#]*(@)`),
	regexp.MustCompile(`(?i)(\b(?:password|passwd|pwd|sslpassword)\s*=\s*)(?:'[^']*'|[^&\s]+)()`),
}

func hidePasswords(text string) string {
	for _, pattern := range passwords {
		text = pattern.ReplaceAllString(text, "${1}"+secret+"${2}")
	}
	return text
}
