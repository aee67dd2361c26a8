package telemetry_test

import (
	"context"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/trace"

	"sluice/platform/telemetry"
)

func ExampleTraceID() {
	logger := telemetry.NewLogger(telemetry.DefaultLogConfig(), withoutTime{})
	ctx := trace.ContextWithSpanContext(context.Background(), spanContext)

	logger.Info("order saved", "order_id", "17", "trace_id", telemetry.TraceID(ctx))
	// Output:
	// level=INFO msg="order saved" order_id=17 trace_id=4bf92f3577b34da6a3ce929d0e0e4736
}

var spanContext = trace.NewSpanContext(trace.SpanContextConfig{
	TraceID: trace.TraceID{0x4b, 0xf9, 0x2f, 0x35, 0x77, 0xb3, 0x4d, 0xa6, 0xa3, 0xce, 0x92, 0x9d, 0x0e, 0x0e, 0x47, 0x36},
	SpanID:  trace.SpanID{1},
})

// withoutTime prints lines of the text format without their first field.
type withoutTime struct{}

func (withoutTime) Write(line []byte) (int, error) {
	_, rest, _ := strings.Cut(string(line), " ")
	_, err := os.Stdout.WriteString(rest)
	return len(line), err
}

func TestLogConfigValidate(t *testing.T) {
	require.NoError(t, telemetry.DefaultLogConfig().Validate())
	for _, level := range []string{"debug", "info", "warn", "error"} {
		for _, format := range []string{"text", "json"} {
			require.NoError(t, telemetry.LogConfig{Level: level, Format: format}.Validate())
		}
	}
	require.EqualError(t, telemetry.LogConfig{Level: "loud", Format: "xml"}.Validate(),
		`log.level: must be debug, info, warn or error, is "loud"`+"\n"+
			`log.format: must be text or json, is "xml"`)
	require.EqualError(t, telemetry.LogConfig{Level: "INFO", Format: "text"}.Validate(),
		`log.level: must be debug, info, warn or error, is "INFO"`)
}

func TestLogLevels(t *testing.T) {
	all := []string{"debug", "info", "warn", "error"}
	for i, level := range all {
		var logs logbook
		logger := telemetry.NewLogger(telemetry.LogConfig{Level: level, Format: "json"}, &logs)
		logger.Debug("debug")
		logger.Info("info")
		logger.Warn("warn")
		logger.Error("error")

		var written []string
		for line := range strings.Lines(logs.String()) {
			var entry struct{ Msg string }
			require.NoError(t, json.Unmarshal([]byte(line), &entry))
			written = append(written, entry.Msg)
		}
		require.Equal(t, all[i:], written)
	}
}

func TestLogText(t *testing.T) {
	var logs logbook
	telemetry.NewLogger(telemetry.DefaultLogConfig(), &logs).Info("order saved", "order_id", "17")
	require.Regexp(t, `^time=\S+ level=INFO msg="order saved" order_id=17\n$`, logs.String())
}

func TestTraceID(t *testing.T) {
	require.Empty(t, telemetry.TraceID(t.Context()))
	require.Equal(t, "4bf92f3577b34da6a3ce929d0e0e4736",
		telemetry.TraceID(trace.ContextWithSpanContext(t.Context(), spanContext)))
}
