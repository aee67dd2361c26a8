package intake

import (
	"cmp"
	_ "embed" // for the built-in schema
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/santhosh-tekuri/jsonschema/v6/kind"

	"sluice/platform/httpserver"
)

const (
	// maxFieldErrors is how many faults of an order are reported at once.
	maxFieldErrors = 20
	// maxAlternatives is how many alternatives of an anyOf or oneOf an error
	// text speaks of.
	maxAlternatives = 5
	// maxPointer is the longest pointer in an error in bytes; a longer one is
	// cut off. Only an order with huge member names gets there.
	maxPointer = 1024
	// maxNumber bounds the numbers that are checked: how many characters one
	// may have, and how large its exponent may be either way. The library
	// computes with exact fractions, so that 1e999999 would take it 26 ms and
	// a million digits two seconds; and beyond 1e1000000 it panics.
	maxNumber = 400
)

// builtinLocation names the built-in schema.
const builtinLocation = "builtin:///order.json"

// builtinSchema is what orders must look like when no schema is configured.
//
//go:embed schema/order.json
var builtinSchema []byte

// fieldError is one fault of an order: a JSON Pointer to the value at fault,
// and what is wrong with it. A member that is missing has a pointer too, to
// where it should be.
type fieldError = httpserver.FieldError

// schema is a compiled JSON Schema. It is safe for concurrent use.
type schema struct {
	compiled *jsonschema.Schema
	location string            // of the file that was asked for
	files    map[string][]byte // that file and those that it refers to, by location
}

// compileSchema compiles the JSON Schema in a file, or the built-in one if
// path is empty. A schema that does not name its draft in $schema is a
// 2020-12 one; there, "format" is an annotation and is not checked.
// References may lead to other files, never to the network. Errors tell the
// file and the fault in one line.
func compileSchema(path string) (*schema, error) {
	location, text := builtinLocation, builtinSchema
	if path != "" {
		var err error
		if location, err = fileURL(path); err != nil {
			return nil, err
		}
		if text, err = os.ReadFile(path); err != nil {
			return nil, fmt.Errorf("read the schema: %w", err)
		}
	}
	doc, err := decodeDocument(text)
	if err != nil {
		return nil, fmt.Errorf("read the schema %s: %w", path, err)
	}

	compiler := jsonschema.NewCompiler()
	compiler.DefaultDraft(jsonschema.Draft2020)
	files := schemaFiles{location: text}
	compiler.UseLoader(files)
	if err := compiler.AddResource(location, doc.value); err != nil {
		return nil, fmt.Errorf("add the schema %s: %w", path, err)
	}
	compiled, err := compiler.Compile(location)
	if err != nil {
		return nil, fmt.Errorf("compile the schema %s: %w", path, plainCompileError(err))
	}
	return &schema{compiled: compiled, location: location, files: files}, nil
}

// plainCompileError puts the library's longer texts into one line.
func plainCompileError(err error) error {
	var load *jsonschema.LoadURLError
	if errors.As(err, &load) {
		return fmt.Errorf("reference to %s: %w", load.URL, load.Err)
	}
	var invalid *jsonschema.SchemaValidationError
	var faults *jsonschema.ValidationError
	if errors.As(err, &invalid) && errors.As(invalid.Err, &faults) {
		var texts []string
		for _, fault := range fieldErrors(faults, nil) {
			texts = append(texts, strings.TrimSpace(fault.Pointer+" "+fault.Detail))
		}
		return fmt.Errorf("not a valid JSON Schema: %s", strings.Join(texts, "; "))
	}
	return err
}

// fileURL returns the file: URL of a path, whatever characters are in it.
func fileURL(path string) (string, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return "", fmt.Errorf("find the schema %s: %w", path, err)
	}
	abs = filepath.ToSlash(abs)
	if !strings.HasPrefix(abs, "/") {
		abs = "/" + abs // C:/… on Windows
	}
	return (&url.URL{Scheme: "file", Path: abs}).String(), nil
}

// schemaFiles loads the files that a schema refers to, and nothing else, and
// keeps their texts by location.
type schemaFiles map[string][]byte

// Load is for jsonschema.Compiler.
func (f schemaFiles) Load(location string) (any, error) {
	u, err := url.Parse(location)
	if err != nil {
		return nil, err
	}
	if u.Scheme != "file" || u.Host != "" {
		return nil, errors.New("not followed: a schema may refer to itself and to other files only")
	}
	path, err := jsonschema.FileLoader{}.ToFile(location)
	if err != nil {
		return nil, err
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	doc, err := decodeDocument(text)
	f[location] = text
	return doc.value, err
}

// validate checks v, the value of a document, and returns what is wrong with
// it: at most maxFieldErrors faults, sorted by where they are; nil if there
// are none. Numbers that are too long to be checked are faults, wherever they
// stand. It changes nothing.
func (s *schema) validate(v any) []fieldError {
	var long faults
	long.addNumbers(v, make([]string, 0, maxDepth))
	if len(long) > 0 {
		return long.report()
	}

	err := s.compiled.Validate(v)
	if err == nil {
		return nil
	}
	var invalid *jsonschema.ValidationError
	if !errors.As(err, &invalid) {
		return []fieldError{{Detail: "cannot be checked: " + err.Error()}}
	}
	return fieldErrors(invalid, v)
}

// fieldErrors turns the tree of the library's errors about v into a list.
func fieldErrors(err *jsonschema.ValidationError, v any) []fieldError {
	var list faults
	list.add(err)
	list.placeNames(v)
	return list.report()
}

// fault is a fieldError in the making.
type fault struct {
	path   []string
	detail string
	// misplaced says that only the length and the last token of path are to be
	// relied on: see placeNames.
	misplaced bool
}

type faults []fault

// add appends the leaves of the tree of errors: what is wrong with a value
// itself, and not that something within it is wrong.
func (f *faults) add(err *jsonschema.ValidationError) {
	at := err.InstanceLocation
	leaf := func(detail string, name ...string) {
		*f = append(*f, fault{path: slices.Concat(at, name), detail: detail})
	}
	switch k := err.ErrorKind.(type) {
	case *kind.Required:
		for _, name := range k.Missing {
			leaf("is required", name)
		}
	case *kind.DependentRequired:
		for _, name := range k.Missing {
			leaf(fmt.Sprintf("is required beside %s", quote(k.Prop)), name)
		}
	case *kind.Dependency:
		for _, name := range k.Missing {
			leaf(fmt.Sprintf("is required beside %s", quote(k.Prop)), name)
		}
	case *kind.AdditionalProperties:
		for _, name := range k.Properties {
			leaf("is not allowed here", name)
		}
	case *kind.PropertyNames:
		leaf("is not allowed as a name: "+within(0, err.Causes...), k.Property)
		(*f)[len(*f)-1].misplaced = true
	case *kind.AnyOf, *kind.OneOf:
		if len(err.Causes) < 2 {
			f.addCauses(err)
			return
		}
		var texts []string
		for _, cause := range err.Causes[:min(len(err.Causes), maxAlternatives)] {
			texts = append(texts, within(len(at), cause))
		}
		if len(err.Causes) > maxAlternatives {
			texts = append(texts, "…")
		}
		leaf("fits none of the alternatives: " + strings.Join(texts, "; or "))
	case *kind.Contains, *kind.MinContains:
		leaf(describe(k)) // that each item by itself is another one is no fault
	default:
		f.addCauses(err)
	}
}

func (f *faults) addCauses(err *jsonschema.ValidationError) {
	if len(err.Causes) == 0 {
		*f = append(*f, fault{path: err.InstanceLocation, detail: describe(err.ErrorKind)})
	}
	for _, cause := range err.Causes {
		f.add(cause)
	}
}

// within describes the first of the faults in branches of the tree of errors,
// whose place is told from the given depth on.
func within(depth int, branches ...*jsonschema.ValidationError) string {
	var list faults
	for _, branch := range branches {
		list.add(branch)
	}
	if len(list) == 0 {
		return describe(nil)
	}
	first := slices.MinFunc(list, compareFaults)
	return strings.TrimSpace(formatPointer(first.path[depth:]) + " " + first.detail)
}

// addNumbers appends the numbers in v that are too long to be checked.
func (f *faults) addNumbers(v any, path []string) {
	switch v := v.(type) {
	case json.Number:
		if !checkable(string(v)) {
			*f = append(*f, fault{path: slices.Clone(path), detail: fmt.Sprintf(
				"must have at most %d characters and an exponent from -%d to %d", maxNumber, maxNumber, maxNumber)})
		}
	case map[string]any:
		for name, value := range v {
			f.addNumbers(value, append(path, name))
		}
	case []any:
		for i, value := range v {
			f.addNumbers(value, append(path, strconv.Itoa(i)))
		}
	}
}

// checkable reports whether a number can be computed with cheaply.
func checkable(number string) bool {
	if len(number) > maxNumber {
		return false
	}
	i := strings.IndexAny(number, "eE")
	if i < 0 {
		return true
	}
	exponent, err := strconv.Atoi(number[i+1:])
	return err == nil && -maxNumber <= exponent && exponent <= maxNumber
}

// placeNames finds the members whose names are at fault in v. The library
// tells the name and how deep its object is, but which object only by a slice
// that it writes over while it goes on. If several objects of that depth have
// such a member, the first one is taken.
func (f faults) placeNames(v any) {
	open := map[int]map[string][]int{} // length of path, name: indexes in f
	for i, fault := range f {
		if !fault.misplaced {
			continue
		}
		depth := len(fault.path)
		if open[depth] == nil {
			open[depth] = map[string][]int{}
		}
		name := fault.path[depth-1]
		open[depth][name] = append(open[depth][name], i)
	}
	if len(open) > 0 {
		f.placeNamesIn(v, nil, open)
	}
}

func (f faults) placeNamesIn(v any, path []string, open map[int]map[string][]int) {
	switch v := v.(type) {
	case map[string]any:
		for _, name := range slices.Sorted(maps.Keys(v)) {
			path := append(path, name)
			for _, i := range open[len(path)][name] {
				f[i].path = slices.Clone(path)
			}
			delete(open[len(path)], name)
			f.placeNamesIn(v[name], path, open)
		}
	case []any:
		for i, value := range v {
			f.placeNamesIn(value, append(path, strconv.Itoa(i)), open)
		}
	}
}

// report returns the first faults, each once.
func (f faults) report() []fieldError {
	var list []fieldError
	for _, fault := range f.first(maxFieldErrors) {
		list = append(list, fieldError{
			Pointer: shorten(formatPointer(fault.path), maxPointer),
			Detail:  fault.detail,
		})
	}
	return list
}

// first returns the first n faults in the order of their places: items by their
// number, members by their names. A hostile order has a million faults, and to
// sort them all would take seconds.
func (f faults) first(n int) faults {
	var best faults
	for _, fault := range f {
		if len(best) == n && compareFaults(fault, best[n-1]) >= 0 {
			continue
		}
		if i, found := slices.BinarySearchFunc(best, fault, compareFaults); !found {
			best = slices.Insert(best, i, fault)
			best = best[:min(len(best), n)]
		}
	}
	return best
}

func compareFaults(a, b fault) int {
	return cmp.Or(slices.CompareFunc(a.path, b.path, compareTokens), cmp.Compare(a.detail, b.detail))
}

func compareTokens(a, b string) int {
	i, okA := arrayIndex(a)
	j, okB := arrayIndex(b)
	if okA && okB {
		return cmp.Compare(i, j)
	}
	return cmp.Compare(a, b)
}

var pointerEscaper = strings.NewReplacer("~", "~0", "/", "~1")

// formatPointer returns the JSON Pointer with these tokens.
func formatPointer(path []string) string {
	var b strings.Builder
	for _, token := range path {
		b.WriteByte('/')
		b.WriteString(pointerEscaper.Replace(token))
	}
	return b.String()
}

// describe says in plain words what a value does wrong. The value is the
// subject of the sentence.
func describe(k jsonschema.ErrorKind) string {
	switch k := k.(type) {
	case *kind.FalseSchema:
		return "is not allowed here"
	case *kind.Type:
		return describeType(k)
	case *kind.Const:
		return "must be " + display(k.Want)
	case *kind.Enum:
		var values []string
		for _, value := range k.Want {
			values = append(values, display(value))
		}
		return "must be one of " + shorten(strings.Join(values, ", "), maxPointer)
	case *kind.Format:
		return "must be a valid " + k.Want
	case *kind.Pattern:
		return "must match the pattern " + k.Want
	case *kind.MinLength:
		return fmt.Sprintf("must have at least %s, has %d", count(k.Want, "character"), k.Got)
	case *kind.MaxLength:
		return fmt.Sprintf("must have at most %s, has %d", count(k.Want, "character"), k.Got)
	case *kind.MinItems:
		return fmt.Sprintf("must have at least %s, has %d", count(k.Want, "item"), k.Got)
	case *kind.MaxItems:
		return fmt.Sprintf("must have at most %s, has %d", count(k.Want, "item"), k.Got)
	case *kind.AdditionalItems:
		return fmt.Sprintf("has %s too many", count(k.Count, "item"))
	case *kind.MinProperties:
		return fmt.Sprintf("must have at least %s, has %d", count(k.Want, "member"), k.Got)
	case *kind.MaxProperties:
		return fmt.Sprintf("must have at most %s, has %d", count(k.Want, "member"), k.Got)
	case *kind.UniqueItems:
		return fmt.Sprintf("must not repeat an item: %d and %d are equal", k.Duplicates[0], k.Duplicates[1])
	case *kind.Contains:
		return "must have an item of the required form, has none"
	case *kind.MinContains:
		return fmt.Sprintf("must have at least %s of the required form, has %d", count(k.Want, "item"), len(k.Got))
	case *kind.MaxContains:
		return fmt.Sprintf("must have at most %s of a certain form, has %d", count(k.Want, "item"), len(k.Got))
	case *kind.Minimum:
		return "must be at least " + decimalText(k.Want)
	case *kind.Maximum:
		return "must be at most " + decimalText(k.Want)
	case *kind.ExclusiveMinimum:
		return "must be more than " + decimalText(k.Want)
	case *kind.ExclusiveMaximum:
		return "must be less than " + decimalText(k.Want)
	case *kind.MultipleOf:
		return "must be a multiple of " + decimalText(k.Want)
	case *kind.Not:
		return "is of a form that is not allowed"
	case *kind.OneOf:
		return "fits more than one of the alternatives, must fit one"
	default:
		return "does not satisfy the schema"
	}
}

// typeNames are the types of JSON Schema in the words of a user.
var typeNames = map[string]string{
	"null":    "null",
	"boolean": "true or false",
	"integer": "a whole number",
	"number":  "a number",
	"string":  "a string",
	"array":   "an array",
	"object":  "an object",
}

func describeType(k *kind.Type) string {
	var wanted []string
	for _, name := range k.Want {
		wanted = append(wanted, typeNames[name])
	}
	text := "must be " + strings.Join(wanted, " or ")
	if k.Got == "number" && slices.Contains(k.Want, "integer") {
		return text // "is a number" would help nobody
	}
	return text + ", is " + typeNames[k.Got]
}

// display returns a value of a schema for an error text.
func display(v any) string {
	if s, ok := v.(string); ok {
		return quote(s)
	}
	text, err := json.Marshal(v)
	if err != nil {
		return "the value in the schema"
	}
	return shorten(string(text), maxPointer)
}

func count(n int, thing string) string {
	if n == 1 {
		return "1 " + thing
	}
	return strconv.Itoa(n) + " " + thing + "s"
}

// decimalText returns r with all its decimals: it was written as a decimal.
func decimalText(r *big.Rat) string {
	decimals, _ := r.FloatPrec()
	return shorten(r.FloatString(decimals), maxQuoted)
}
