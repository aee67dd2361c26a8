package middleware_test

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/metric"
	"go.opentelemetry.io/otel/metric/noop"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"

	"sluice/platform/middleware"
)

func TestMetrics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		reader := sdkmetric.NewManualReader()
		provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
		mw, err := middleware.Metrics(provider.Meter("test"), "dispatch")
		require.NoError(t, err)
		handle := func(h message.HandlerFunc) {
			_, _ = middleware.Chain(h, middleware.Recover(discard()), mw)(newMessage("1")) // the metric tells
		}
		after := func(d time.Duration, err error) message.HandlerFunc {
			return func(*message.Message) ([]*message.Message, error) {
				<-time.After(d)
				return nil, err
			}
		}
		handle(after(50*time.Millisecond, nil))
		handle(after(2*time.Second, nil))
		handle(after(time.Second, context.DeadlineExceeded))
		handle(after(0, context.Canceled))
		handle(after(0, errHandler))
		handle(panicking)

		var got metricdata.ResourceMetrics
		require.NoError(t, reader.Collect(t.Context(), &got))
		m := got.ScopeMetrics[0].Metrics[0]
		require.Equal(t, "messaging.process.duration", m.Name)
		require.Equal(t, "s", m.Unit)
		counts, sums := make(map[string]uint64), make(map[string]float64)
		for _, point := range m.Data.(metricdata.Histogram[float64]).DataPoints {
			handler, _ := point.Attributes.Value("sluice.handler")
			require.Equal(t, "dispatch", handler.AsString())
			errorType, _ := point.Attributes.Value("error.type")
			counts[errorType.AsString()] = point.Count
			sums[errorType.AsString()] = point.Sum
		}
		require.Equal(t, map[string]uint64{"": 2, "timeout": 1, "canceled": 1, "_OTHER": 1, "panic": 1}, counts)
		require.InDelta(t, 2.05, sums[""], 1e-9)
		require.InDelta(t, 1, sums["timeout"], 1e-9)
		require.NoError(t, provider.Shutdown(t.Context()))
	})
}

func TestMetricsReportsAMeterThatRefuses(t *testing.T) {
	_, err := middleware.Metrics(brokenMeter{}, "dispatch")
	require.ErrorIs(t, err, errHandler)
	require.ErrorContains(t, err, "create histogram of handler dispatch")
}

type brokenMeter struct{ noop.Meter }

func (brokenMeter) Float64Histogram(string, ...metric.Float64HistogramOption) (metric.Float64Histogram, error) {
	return nil, errHandler
}
