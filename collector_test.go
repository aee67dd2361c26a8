package main

import (
	"testing"

	"github.com/stretchr/testify/require"
)

func TestGarbageIsBoundedByWhatIsInUse(t *testing.T) {
	for use, want := range map[uint64]int{0: 400, 16 << 20: 400, 32 << 20: 200, 64 << 20: 100, 100 << 20: 60, 1 << 30: 50} {
		require.Equal(t, want, garbagePercentFor(use), use)
	}
}
