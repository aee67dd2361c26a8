package config

import (
	_ "embed"
	"errors"
	"fmt"
	"iter"
	"maps"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/alecthomas/units"
	"go.yaml.in/yaml/v3"
)

// reference is the annotated reference of every key. Its comments are the
// descriptions that Keys, and so the help of the flags, give.
//
//go:embed sluice.yaml
var reference []byte

const (
	envPrefix = "SLUICE_"
	tagName   = "koanf"
)

// Key is one setting.
type Key struct {
	Name        string // "dispatch.concurrency", as in the file
	Env         string // "SLUICE_DISPATCH_CONCURRENCY"
	Flag        string // "dispatch-concurrency", without the dashes in front
	Type        string // string, int, duration, size, map or list
	Default     string // as it is written in the environment
	Description string // one or more sentences

	typ reflect.Type
}

// Summary is the first sentence of the description, without its full stop.
func (k Key) Summary() string {
	first, _, _ := strings.Cut(k.Description, ". ")
	return strings.TrimSuffix(first, ".")
}

// Keys lists every key, in the order of the file.
func Keys() []Key {
	described := keys()
	descriptions := describe(reference)
	for i, key := range described {
		described[i].Description = descriptions[key.Name]
	}
	return described
}

// keys lists every key without its description, which only help needs.
func keys() []Key {
	defaults := Default()
	var keys []Key
	for name, field := range fields(&defaults) {
		keys = append(keys, Key{
			Name:    name,
			Env:     envPrefix + strings.ToUpper(strings.ReplaceAll(name, ".", "_")),
			Flag:    strings.NewReplacer(".", "-", "_", "-").Replace(name),
			Type:    typeName(field.Interface()),
			Default: format(field.Interface()),
			typ:     field.Type(),
		})
	}
	return keys
}

// fields yields each key with its field in cfg, by the tags that koanf reads.
func fields(cfg *Config) iter.Seq2[string, reflect.Value] {
	return func(yield func(string, reflect.Value) bool) {
		walk("", reflect.ValueOf(cfg).Elem(), yield)
	}
}

func walk(prefix string, section reflect.Value, yield func(string, reflect.Value) bool) bool {
	for i := range section.NumField() {
		name, option, _ := strings.Cut(section.Type().Field(i).Tag.Get(tagName), ",")
		field := section.Field(i)
		var more bool
		switch {
		case option == "squash":
			more = walk(prefix, field, yield)
		case field.Kind() == reflect.Struct:
			more = walk(prefix+name+".", field, yield)
		default:
			more = yield(prefix+name, field)
		}
		if !more {
			return false
		}
	}
	return true
}

// describe returns the comment above each key of a YAML document, on one line.
func describe(document []byte) map[string]string {
	descriptions := map[string]string{}
	var visit func(prefix string, node *yaml.Node)
	visit = func(prefix string, node *yaml.Node) {
		for i := 0; i+1 < len(node.Content); i += 2 {
			name := prefix + node.Content[i].Value
			var words []string
			for line := range strings.Lines(node.Content[i].HeadComment) {
				words = append(words, strings.Fields(strings.TrimPrefix(line, "#"))...)
			}
			descriptions[name] = strings.Join(words, " ")
			visit(name+".", node.Content[i+1])
		}
	}
	var root yaml.Node
	if err := yaml.Unmarshal(document, &root); err == nil && len(root.Content) > 0 {
		visit("", root.Content[0])
	}
	return descriptions
}

func typeName(value any) string {
	switch value.(type) {
	case time.Duration:
		return "duration"
	case units.Base2Bytes:
		return "size"
	}
	if kind := reflect.TypeOf(value).Kind(); kind != reflect.Slice {
		return kind.String()
	}
	return "list"
}

// format writes a value as parse reads it.
func format(value any) string {
	switch v := value.(type) {
	case time.Duration:
		return formatDuration(v)
	case redacter:
		var pairs []string
		redacted := v.Redacted()
		for _, name := range slices.Sorted(maps.Keys(redacted)) {
			pairs = append(pairs, name+":"+redacted[name])
		}
		return strings.Join(pairs, ",")
	case listRedacter:
		return strings.Join(v.Redacted(), ",")
	default:
		return fmt.Sprint(v)
	}
}

// formatDuration writes 5m where the standard library writes 5m0s.
func formatDuration(d time.Duration) string {
	text := d.String()
	if strings.HasSuffix(text, "m0s") {
		text = strings.TrimSuffix(text, "0s")
	}
	if strings.HasSuffix(text, "h0m") {
		text = strings.TrimSuffix(text, "0m")
	}
	return text
}

// parse reads the text of a value of this type. Its errors say what was wanted.
func parse(text string, typ reflect.Type) (any, error) {
	switch reflect.Zero(typ).Interface().(type) {
	case string:
		return text, nil
	case int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return nil, fmt.Errorf("%q is not a whole number", text)
		}
		return n, nil
	case time.Duration:
		d, err := time.ParseDuration(text)
		if err != nil {
			return nil, fmt.Errorf("%q is not a duration such as 250ms, 30s or 5m", text)
		}
		return d, nil
	case units.Base2Bytes:
		size, err := units.ParseBase2Bytes(text)
		if err != nil {
			return nil, fmt.Errorf("%q is not a size such as 64KiB or 1MiB", text)
		}
		return size, nil
	default:
		if typ.Kind() == reflect.Slice {
			return convertList(splitList(text), typ)
		}
		pairs, err := parsePairs(text)
		if err != nil {
			return nil, err
		}
		return convert(pairs, typ)
	}
}

// parsePairs reads "name:value,other:value". Its errors do not show the text,
// for values are secrets.
func parsePairs(text string) (map[string]string, error) {
	pairs := map[string]string{}
	if strings.TrimSpace(text) == "" {
		return pairs, nil
	}
	for i, pair := range strings.Split(text, ",") {
		name, value, found := strings.Cut(pair, ":")
		name = strings.TrimSpace(name)
		_, twice := pairs[name]
		switch {
		case !found || name == "":
			return nil, fmt.Errorf("entry %d is not name:value", i+1)
		case twice:
			return nil, fmt.Errorf("names %s twice", name)
		}
		pairs[name] = strings.TrimSpace(value)
	}
	return pairs, nil
}

// convert gives a map the type that the configuration has for it.
func convert(pairs map[string]string, typ reflect.Type) (any, error) {
	if typ.Kind() != reflect.Map {
		return nil, errors.New("takes one value, not several names with values")
	}
	return reflect.ValueOf(pairs).Convert(typ).Interface(), nil
}

// splitList reads "one,other".
func splitList(text string) []string {
	if strings.TrimSpace(text) == "" {
		return nil
	}
	items := strings.Split(text, ",")
	for i := range items {
		items[i] = strings.TrimSpace(items[i])
	}
	return items
}

// convertList gives a list the type that the configuration has for it.
func convertList(items []string, typ reflect.Type) (any, error) {
	if typ.Kind() != reflect.Slice {
		return nil, errors.New("does not take a list")
	}
	return reflect.ValueOf(items).Convert(typ).Interface(), nil
}
