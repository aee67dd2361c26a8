package intake

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/alecthomas/units"

	"sluice/platform/database"
)

// Names of the store drivers.
const (
	DriverMemory   = "memory"
	DriverSQLite   = "sqlite"
	DriverPostgres = "postgres"
)

// Config says which orders are taken in, and how. Its keys are intake.*.
type Config struct {
	// Schema is the file of a JSON Schema 2020-12 that every order must
	// satisfy. Empty means the built-in one.
	Schema string `koanf:"schema"`
	// OrderNumberPointer is the JSON Pointer (RFC 6901) of the order's natural
	// key, by which duplicates are detected. Empty means that there is none.
	OrderNumberPointer string `koanf:"order_number_pointer"`
	// MaxBody is the largest order in bytes.
	MaxBody units.Base2Bytes `koanf:"max_body"`
	// MaxBacklog is how many orders may wait; beyond it new ones are refused
	// with 503. 0 means no limit.
	MaxBacklog int `koanf:"max_backlog"`
	// MaxWait caps the time that a client may hold a request with
	// "Prefer: wait".
	MaxWait time.Duration `koanf:"max_wait"`
	// SyncLimit bounds the concurrent POST /orders/sync; beyond it they are
	// refused with 503. 0 means no limit.
	SyncLimit int `koanf:"sync_limit"`
}

// DefaultConfig returns the settings that hold where nothing else is said.
func DefaultConfig() Config {
	return Config{
		OrderNumberPointer: "/orderNumber",
		MaxBody:            1 * units.MiB,
		MaxWait:            30 * time.Second,
	}
}

// Validate returns all faults at once, each beginning with its key.
func (c Config) Validate() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, fmt.Errorf(format, args...)) }
	if c.Schema != "" {
		if _, err := compileSchema(c.Schema); err != nil {
			fault("intake.schema: %w", err)
		}
	}
	if _, err := parsePointer(c.OrderNumberPointer); err != nil {
		fault("intake.order_number_pointer: %w", err)
	}
	if c.MaxBody < 1 {
		fault("intake.max_body: must be at least 1B, is %v", c.MaxBody)
	}
	if c.MaxBacklog < 0 {
		fault("intake.max_backlog: must not be negative, is %d", c.MaxBacklog)
	}
	if c.MaxWait < 0 {
		fault("intake.max_wait: must not be negative, is %v", c.MaxWait)
	}
	if c.SyncLimit < 0 {
		fault("intake.sync_limit: must not be negative, is %d", c.SyncLimit)
	}
	return errors.Join(faults...)
}

// StoreConfig says where orders are kept. Its keys are store.*.
type StoreConfig struct {
	// Driver is DriverMemory, DriverSQLite or DriverPostgres.
	Driver string `koanf:"driver"`
	// DSN is the database file for sqlite and a postgres:// URL for postgres;
	// memory ignores it. It may hold a password.
	DSN string `koanf:"dsn"`
	// Retention is how long finished orders are kept. At least a second.
	Retention time.Duration `koanf:"retention"`
}

// DefaultStoreConfig returns the settings that hold where nothing else is said.
func DefaultStoreConfig() StoreConfig {
	return StoreConfig{Driver: DriverSQLite, DSN: "data/sluice.db", Retention: 720 * time.Hour}
}

// Validate returns all faults at once, each beginning with its key.
func (c StoreConfig) Validate() error {
	var faults []error
	switch c.Driver {
	case DriverMemory:
	case DriverSQLite:
		if strings.TrimSpace(c.DSN) == "" {
			faults = append(faults, errors.New("store.dsn: must name a file when store.driver is sqlite"))
		}
	case DriverPostgres:
		if err := database.CheckPostgresDSN(c.DSN); err != nil {
			faults = append(faults, fmt.Errorf("store.dsn: %w", err))
		}
	default:
		faults = append(faults, errUnknownDriver(c.Driver))
	}
	if c.Retention < time.Second {
		faults = append(faults, fmt.Errorf("store.retention: must be at least 1s, is %v", c.Retention))
	}
	return errors.Join(faults...)
}

func errUnknownDriver(name string) error {
	return fmt.Errorf("store.driver: unknown driver %q, want %s, %s or %s", name, DriverMemory, DriverSQLite, DriverPostgres)
}

// RetryConfig is the schedule of attempts. Its keys are dispatch.*, because
// that is where a reader of the configuration looks for them; intake owns the
// schedule, so that a waiting order holds no slot of dispatch.
type RetryConfig struct {
	// MaxAttempts is how often an order is tried before it is dead. At most
	// 1,000: an order remembers all of them, and each outcome writes them anew.
	MaxAttempts int `koanf:"max_attempts"`
	// RetryInitial is the upper end of the first pause; it doubles with every
	// further one.
	RetryInitial time.Duration `koanf:"retry_initial"`
	// RetryMax caps the doubling.
	RetryMax time.Duration `koanf:"retry_max"`
}

// attemptsMost bounds what an order remembers of its attempts, some two hundred
// bytes of each. With the default pauses they take nearly two days.
const attemptsMost = 1000

// DefaultRetryConfig returns the settings that hold where nothing else is said.
func DefaultRetryConfig() RetryConfig {
	return RetryConfig{MaxAttempts: 10, RetryInitial: time.Second, RetryMax: 5 * time.Minute}
}

// Validate returns all faults at once, each beginning with its key.
func (c RetryConfig) Validate() error {
	var faults []error
	if c.MaxAttempts < 1 {
		faults = append(faults, fmt.Errorf("dispatch.max_attempts: must be at least 1, is %d", c.MaxAttempts))
	}
	if c.MaxAttempts > attemptsMost {
		faults = append(faults, fmt.Errorf("dispatch.max_attempts: must be at most %d, is %d", attemptsMost, c.MaxAttempts))
	}
	if c.RetryInitial <= 0 {
		faults = append(faults, fmt.Errorf("dispatch.retry_initial: must be more than 0s, is %v", c.RetryInitial))
	}
	if c.RetryMax < c.RetryInitial {
		faults = append(faults, fmt.Errorf("dispatch.retry_max: must be at least dispatch.retry_initial (%v), is %v", c.RetryInitial, c.RetryMax))
	}
	return errors.Join(faults...)
}
