package telemetry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"

	"go.opentelemetry.io/otel/trace"
)

// LogConfig is the section "log".
type LogConfig struct {
	// Level is the least level that is written: debug, info, warn or error.
	// Default info.
	Level string `koanf:"level"`

	// Format is text (key=value) or json (one object a line). Default text.
	Format string `koanf:"format"`
}

// DefaultLogConfig returns the configuration that is used when nothing is set.
func DefaultLogConfig() LogConfig {
	return LogConfig{Level: "info", Format: "text"}
}

// Validate returns every fault at once, each with its full key.
func (c LogConfig) Validate() error {
	var faults []error
	if _, ok := levels[c.Level]; !ok {
		faults = append(faults, fmt.Errorf("log.level: must be debug, info, warn or error, is %q", c.Level))
	}
	if c.Format != "text" && c.Format != "json" {
		faults = append(faults, fmt.Errorf("log.format: must be text or json, is %q", c.Format))
	}
	return errors.Join(faults...)
}

var levels = map[string]slog.Level{
	"debug": slog.LevelDebug,
	"info":  slog.LevelInfo,
	"warn":  slog.LevelWarn,
	"error": slog.LevelError,
}

// NewLogger returns a logger that writes to w, one Write for each line. cfg is
// valid; with anything else the level is info and the format text.
func NewLogger(cfg LogConfig, w io.Writer) *slog.Logger {
	options := &slog.HandlerOptions{Level: levels[cfg.Level]} // info is the zero level
	if cfg.Format == "json" {
		return slog.New(slog.NewJSONHandler(w, options))
	}
	return slog.New(slog.NewTextHandler(w, options))
}

// TraceID is the id of ctx's trace as 32 hexadecimal digits, or "". It is what a
// log line has as trace_id.
func TraceID(ctx context.Context) string {
	if id := trace.SpanContextFromContext(ctx).TraceID(); id.IsValid() {
		return id.String()
	}
	return ""
}
