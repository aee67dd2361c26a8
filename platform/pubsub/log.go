package pubsub

import (
	"context"
	"log/slog"

	"github.com/ThreeDotsLabs/watermill"
)

// Logger returns the log of Watermill's router and libraries. Their errors are
// kept. What they say at level info is about their own inner life, some of it
// for every message, and becomes debug. Where debug is off, their lines are
// not even put together: Watermill builds the attributes of each first, several
// times a message.
func Logger(logger *slog.Logger) watermill.LoggerAdapter {
	logger = logger.WithGroup("watermill")
	if logger.Enabled(context.Background(), slog.LevelDebug) { // no request to take a context from
		return watermill.NewSlogLoggerWithLevelMapping(logger, map[slog.Level]slog.Level{slog.LevelInfo: slog.LevelDebug})
	}
	return errorsOnly{watermill.NewSlogLogger(logger)}
}

type errorsOnly struct{ watermill.LoggerAdapter }

func (errorsOnly) Info(string, watermill.LogFields)  {}
func (errorsOnly) Debug(string, watermill.LogFields) {}
func (errorsOnly) Trace(string, watermill.LogFields) {}

func (l errorsOnly) With(fields watermill.LogFields) watermill.LoggerAdapter {
	return errorsOnly{l.LoggerAdapter.With(fields)}
}
