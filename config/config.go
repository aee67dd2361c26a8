// Package config puts the configuration of Sluice together: the Config of every
// package that has one, filled from the defaults, a YAML file, the environment
// and flags, in this order.
//
// Each key exists once, as a field of the package that it belongs to; the names
// in the file, of the environment variable and of the flag follow from it, and
// its description is the comment in sluice.yaml. A configuration that cannot be
// used is refused as a whole, with all of its faults, never repaired.
//
// The commands of package main use it. Modules and platform packages do not:
// they are handed their own Config.
package config

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"sluice/modules/dispatch"
	"sluice/modules/intake"
	"sluice/platform/httpserver"
	"sluice/platform/pubsub"
	"sluice/platform/telemetry"
)

// Config is the whole configuration. sluice.yaml describes every key.
type Config struct {
	HTTP     httpserver.Config      `koanf:"http"`
	Store    intake.StoreConfig     `koanf:"store"`
	PubSub   pubsub.Config          `koanf:"pubsub"`
	Intake   intake.Config          `koanf:"intake"`
	Dispatch DispatchConfig         `koanf:"dispatch"`
	Backend  dispatch.BackendConfig `koanf:"backend"`
	Log      telemetry.LogConfig    `koanf:"log"`
}

// DispatchConfig is the section "dispatch". For the reader of a configuration,
// concurrency and retries belong together; in the code, the module dispatch
// makes the attempts and the module intake schedules them.
type DispatchConfig struct {
	dispatch.Config    `koanf:",squash"`
	intake.RetryConfig `koanf:",squash"`
}

// Default returns the configuration that holds where nothing else is said.
func Default() Config {
	return Config{
		HTTP:     httpserver.DefaultConfig(),
		Store:    intake.DefaultStoreConfig(),
		PubSub:   pubsub.DefaultConfig(),
		Intake:   intake.DefaultConfig(),
		Dispatch: DispatchConfig{dispatch.DefaultConfig(), intake.DefaultRetryConfig()},
		Backend:  dispatch.DefaultBackendConfig(),
		Log:      telemetry.DefaultLogConfig(),
	}
}

// derive fills in what follows from other keys: one database can be the store
// and the broker.
func (c *Config) derive() {
	if c.PubSub.Backend == pubsub.BackendSQL && c.PubSub.SQL.DSN == "" && pubsub.IsPostgres(c.Store.DSN) {
		c.PubSub.SQL.DSN = c.Store.DSN
	}
}

// Validate returns all faults of the values at once, joined, each beginning
// with its key.
func (c Config) Validate() error {
	return errors.Join(
		c.HTTP.Validate(),
		c.Store.Validate(),
		c.PubSub.Validate(),
		c.Intake.Validate(),
		c.Dispatch.Config.Validate(),
		c.Dispatch.RetryConfig.Validate(),
		c.Backend.Validate(),
		c.Log.Validate(),
	)
}

// Names of the modules.
const (
	ModuleIntake   = "intake"
	ModuleDispatch = "dispatch"
)

// Modules lists every module, in the order of an order's way.
func Modules() []string { return []string{ModuleIntake, ModuleDispatch} }

// CheckModules reports whether a process can run only these modules with this
// configuration. Its error is an *Error.
func (c Config) CheckModules(modules []string) error {
	var faults []error
	for _, name := range modules {
		if !slices.Contains(Modules(), name) {
			faults = append(faults, fmt.Errorf("modules: unknown module %q, want some of %s", name, strings.Join(Modules(), ", ")))
		}
	}
	missing := slices.DeleteFunc(Modules(), func(name string) bool { return slices.Contains(modules, name) })
	switch {
	case len(modules) == 0:
		faults = append(faults, fmt.Errorf("modules: names none, want some of %s", strings.Join(Modules(), ", ")))
	case len(missing) > 0 && c.PubSub.Backend == pubsub.BackendGoChannel:
		faults = append(faults, fmt.Errorf("pubsub.backend: %s cannot leave the process, so it needs the modules %s in it, without %s",
			pubsub.BackendGoChannel, strings.Join(Modules(), ", "), strings.Join(missing, ", ")))
	}
	if len(faults) > 0 {
		return &Error{Faults: faults}
	}
	return nil
}
