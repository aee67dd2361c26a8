package main

import (
	"bytes"
	"testing"

	"github.com/stretchr/testify/require"
)

func TestExperimentTellsAllFaultsOfItsCommandLine(t *testing.T) {
	var stdout, stderr bytes.Buffer
	require.Equal(t, exitUsage, run(t.Context(), []string{"experiment", "everything", "--backend", "kafka", "--runs", "0"}, &stdout, &stderr))
	require.Empty(t, stdout.String())
	for _, fault := range []string{
		`part: must be one of overload, original, stall, memory, is "everything"`,
		`backend: must be one of gochannel, amqp, sql, is "kafka"`,
		`runs: must be 1 or more, is 0`,
	} {
		require.Contains(t, stderr.String(), fault)
	}
}

func TestExperimentIsExplained(t *testing.T) {
	var stdout, stderr bytes.Buffer
	require.Equal(t, exitOK, run(t.Context(), []string{"experiment", "--help"}, &stdout, &stderr))
	require.Contains(t, stdout.String(), "sluice experiment [overload|original|stall|memory]...")
	require.Contains(t, stdout.String(), "--quick")
	require.Contains(t, stdout.String(), "report-overload.html")
	require.NotContains(t, stdout.String(), "time-scale")
}
