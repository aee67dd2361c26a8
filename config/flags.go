package config

import "github.com/spf13/pflag"

// AddFlags registers one flag for each key: dispatch.max_attempts becomes
// --dispatch-max-attempts. They keep what they are given; Load checks it, so
// that a bad flag is told together with all other faults. In the help, they
// stand in the order of the file.
func AddFlags(flags *pflag.FlagSet) {
	flags.SortFlags = false
	for _, key := range Keys() {
		flags.Var(&flag{text: key.Default, typ: key.Type}, key.Flag, key.Summary())
	}
}

// FromFlags returns the values of the flags that were given, by key.
func FromFlags(flags *pflag.FlagSet) map[string]string {
	given := map[string]string{}
	for _, key := range keys() {
		if f := flags.Lookup(key.Flag); f != nil && f.Changed {
			given[key.Name] = f.Value.String()
		}
	}
	return given
}

// flag is a pflag.Value that takes any text.
type flag struct{ text, typ string }

// String returns the text.
func (f *flag) String() string { return f.text }

// Set takes the text.
func (f *flag) Set(text string) error { f.text = text; return nil }

// Type names the kind of value in the help.
func (f *flag) Type() string { return f.typ }
