package config

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/knadh/koanf/v2"
	"go.yaml.in/yaml/v3"
)

// testPrefix begins the variables that our own tests read; they are no keys.
const testPrefix = envPrefix + "TEST_"

// Error is a configuration that cannot be used.
type Error struct {
	// Faults has at least one error. Each names its key, and where the value
	// came from if that is not the default.
	Faults []error
}

// Error returns one line for each fault.
func (e *Error) Error() string { return errors.Join(e.Faults...).Error() }

// Unwrap returns the faults.
func (e *Error) Unwrap() []error { return e.Faults }

// Load returns the defaults, with what the file, the environment and the flags
// say laid over them, in this order. file is the path of a YAML file, "" for
// none. environ is as os.Environ gives it; of it, only the variables that begin
// with SLUICE_ count, and not those that begin with SLUICE_TEST_. flags are
// values by key, as FromFlags gives them.
//
// Load reads the file, and Validate those that the configuration names; nothing
// else is touched. Its error is an *Error with every fault of every source.
func Load(file string, environ []string, flags map[string]string) (Config, error) {
	l := loader{keys: keys(), values: koanf.New("."), origins: map[string]string{}}
	if file != "" {
		l.readFile(file)
	}
	l.readEnviron(environ)
	l.readFlags(flags)

	cfg := Default()
	if err := l.values.UnmarshalWithConf("", &cfg, koanf.UnmarshalConf{Tag: tagName}); err != nil {
		l.faults = append(l.faults, err)
	}
	cfg.derive()
	l.validate(cfg)
	if len(l.faults) > 0 {
		return Config{}, &Error{Faults: l.faults}
	}
	return cfg, nil
}

// loader collects what the sources say, later ones over earlier ones.
type loader struct {
	keys    []Key
	values  *koanf.Koanf      // what is set, parsed
	origins map[string]string // key to where its value came from
	faults  []error
}

func (l *loader) fault(name, origin, problem string, args ...any) {
	l.faults = append(l.faults, fmt.Errorf("%s: %w (%s)", name, fmt.Errorf(problem, args...), origin))
}

// set takes the value of a known key, given as text.
func (l *loader) set(key Key, origin, text string) {
	value, err := parse(text, key.typ)
	l.store(key, origin, value, err)
}

// setPairs takes the value of a known key, given as names with values.
func (l *loader) setPairs(key Key, origin string, pairs map[string]string) {
	value, err := convert(pairs, key.typ)
	l.store(key, origin, value, err)
}

func (l *loader) store(key Key, origin string, value any, err error) {
	if err == nil {
		err = l.values.Set(key.Name, value)
	}
	if err != nil {
		l.fault(key.Name, origin, "%w", err)
		return
	}
	l.origins[key.Name] = origin
}

func (l *loader) readFile(file string) {
	data, err := os.ReadFile(file)
	if err != nil {
		l.faults = append(l.faults, fmt.Errorf("read the configuration: %w", err))
		return
	}
	documents := yaml.NewDecoder(bytes.NewReader(data))
	var document, second yaml.Node
	switch err := documents.Decode(&document); {
	case errors.Is(err, io.EOF):
		return // nothing but comments
	case err != nil:
		l.faults = append(l.faults, fmt.Errorf("%s: %s", file, strings.TrimPrefix(err.Error(), "yaml: ")))
		return
	}
	l.readSection(file, "", document.Content[0])
	if err := documents.Decode(&second); !errors.Is(err, io.EOF) {
		l.faults = append(l.faults, fmt.Errorf("%s: holds more than one document", file))
	}
}

// readSection reads the keys of a mapping; prefix is its name with a dot behind
// it, "" at the top.
func (l *loader) readSection(file, prefix string, section *yaml.Node) {
	section = dereference(section)
	if section.Tag == "!!null" {
		return // every key of it is a comment
	}
	if section.Kind != yaml.MappingNode {
		name := cmp.Or(strings.TrimSuffix(prefix, "."), "configuration")
		l.fault(name, at(file, section), "holds keys, not a value")
		return
	}
	seen := map[string]bool{}
	for i := 0; i+1 < len(section.Content); i += 2 {
		name, origin := prefix+section.Content[i].Value, at(file, section.Content[i])
		switch {
		case seen[name]:
			l.fault(name, origin, "is given twice")
		case l.isSection(name):
			l.readSection(file, name+".", section.Content[i+1])
		default:
			l.readValue(file, name, origin, section.Content[i+1])
		}
		seen[name] = true
	}
}

func (l *loader) readValue(file, name, origin string, value *yaml.Node) {
	value = dereference(value)
	key, known := l.find(func(k Key) string { return k.Name }, name)
	switch {
	case !known:
		l.fault(name, origin, "unknown key%s", suggest(name, l.names()))
	case value.Tag == "!!null":
		l.fault(name, origin, `has no value; an empty one is written as ""`)
	case value.Kind == yaml.ScalarNode:
		l.set(key, origin, value.Value)
	case value.Kind == yaml.MappingNode:
		l.readPairs(file, key, origin, value)
	default:
		l.readList(file, key, origin, value)
	}
}

func (l *loader) readList(file string, key Key, origin string, sequence *yaml.Node) {
	var items []string
	for i, item := range sequence.Content {
		if item = dereference(item); item.Kind != yaml.ScalarNode || item.Tag == "!!null" {
			l.fault(key.Name, at(file, item), "entry %d is not one value", i+1)
		}
		items = append(items, item.Value)
	}
	value, err := convertList(items, key.typ)
	l.store(key, origin, value, err)
}

func (l *loader) readPairs(file string, key Key, origin string, mapping *yaml.Node) {
	pairs := map[string]string{}
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		name, value := mapping.Content[i], dereference(mapping.Content[i+1])
		_, twice := pairs[name.Value]
		switch {
		case value.Kind != yaml.ScalarNode:
			l.fault(key.Name+"."+name.Value, at(file, name), "takes one value")
		case twice:
			l.fault(key.Name+"."+name.Value, at(file, name), "is given twice")
		}
		pairs[name.Value] = value.Value
		l.origins[key.Name+"."+name.Value] = at(file, name)
	}
	l.setPairs(key, origin, pairs)
}

func (l *loader) readEnviron(environ []string) {
	for _, variable := range slices.Sorted(slices.Values(environ)) {
		name, text, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, envPrefix) || strings.HasPrefix(name, testPrefix) {
			continue
		}
		key, known := l.find(func(k Key) string { return k.Env }, name)
		if !known {
			l.faults = append(l.faults, fmt.Errorf("%s: unknown environment variable%s", name, suggest(name, l.variables())))
			continue
		}
		l.set(key, "environment variable "+name, text)
	}
}

func (l *loader) readFlags(flags map[string]string) {
	for _, name := range slices.Sorted(maps.Keys(flags)) {
		key, known := l.find(func(k Key) string { return k.Name }, name)
		if !known {
			l.fault(name, "flag", "unknown key%s", suggest(name, l.names()))
			continue
		}
		l.set(key, "flag --"+key.Flag, flags[name])
	}
}

// validate adds the faults of the values themselves, each with the origin of
// the key that it begins with.
func (l *loader) validate(cfg Config) {
	for _, fault := range flatten(cfg.Validate()) {
		name, _, _ := strings.Cut(fault.Error(), ":")
		if origin := l.originOf(name); origin != "" {
			fault = fmt.Errorf("%w (%s)", fault, origin)
		}
		l.faults = append(l.faults, fault)
	}
}

// originOf returns where the value of a key came from, "" for the default. For
// an entry of a map it is where the entry stands, or else the map.
func (l *loader) originOf(name string) string {
	if origin := l.origins[name]; origin != "" {
		return origin
	}
	for _, key := range l.keys {
		if strings.HasPrefix(name, key.Name+".") {
			return l.origins[key.Name]
		}
	}
	return ""
}

func (l *loader) find(property func(Key) string, want string) (Key, bool) {
	i := slices.IndexFunc(l.keys, func(k Key) bool { return property(k) == want })
	if i < 0 {
		return Key{}, false
	}
	return l.keys[i], true
}

func (l *loader) isSection(name string) bool {
	return slices.ContainsFunc(l.keys, func(k Key) bool { return strings.HasPrefix(k.Name, name+".") })
}

// names lists what a file can hold: keys and the sections that they are in.
func (l *loader) names() []string {
	var names []string
	for _, key := range l.keys {
		for i, char := range key.Name {
			if char == '.' && !slices.Contains(names, key.Name[:i]) {
				names = append(names, key.Name[:i])
			}
		}
		names = append(names, key.Name)
	}
	return names
}

func (l *loader) variables() []string {
	var names []string
	for _, key := range l.keys {
		names = append(names, key.Env)
	}
	return names
}

// flatten takes joined errors apart. An error of one line is one fault, however
// many errors it wraps.
func flatten(err error) []error {
	joined, ok := err.(interface{ Unwrap() []error })
	switch {
	case err == nil:
		return nil
	case !ok || strings.Count(err.Error(), "\n") == 0:
		return []error{err}
	}
	var faults []error
	for _, part := range joined.Unwrap() {
		faults = append(faults, flatten(part)...)
	}
	return faults
}

func dereference(node *yaml.Node) *yaml.Node {
	if node.Kind == yaml.AliasNode {
		return node.Alias
	}
	return node
}

func at(file string, node *yaml.Node) string {
	return fmt.Sprintf("%s:%d", file, node.Line)
}
