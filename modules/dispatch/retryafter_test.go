package dispatch

import (
	"math/big"
	"net/http"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// noon is Sunday, 22 November 2026, 12:00:00 GMT.
var noon = time.Date(2026, time.November, 22, 12, 0, 0, 0, time.UTC)

func TestParseRetryAfter(t *testing.T) {
	for _, tc := range []struct {
		name, value string
		want        time.Duration
	}{
		{"absent", "", 0},
		{"none", "0", 0},
		{"seconds", "120", 2 * time.Minute},
		{"leading zeros", "007", 7 * time.Second},
		{"space around", " \t30 ", 30 * time.Second},
		{"longest", "86400", maxRetryAfter},
		{"beyond longest", "86401", maxRetryAfter},
		{"beyond 64 bits", "99999999999999999999999999", maxRetryAfter},
		{"seconds that overflow a duration", "9223372037", maxRetryAfter},
		{"negative", "-1", 0},
		{"signed", "+1", 0},
		{"fraction", "1.5", 0},
		{"unit", "5s", 0},
		{"other digits", "٣", 0},
		{"preferred date", "Sun, 22 Nov 2026 12:00:30 GMT", 30 * time.Second},
		{"date in the past", "Sun, 22 Nov 2026 11:59:59 GMT", 0},
		{"date beyond longest", "Tue, 24 Nov 2026 12:00:00 GMT", maxRetryAfter},
		{"far date", "Fri, 31 Dec 9999 23:59:59 GMT", maxRetryAfter},
		{"date of RFC 850", "Sunday, 22-Nov-26 12:00:30 GMT", 30 * time.Second},
		{"date of RFC 850 less than 50 years ahead", "Saturday, 22-Nov-75 12:00:00 GMT", maxRetryAfter},
		{"date of RFC 850 more than 50 years ahead", "Monday, 22-Nov-77 12:00:00 GMT", 0},
		{"date of asctime", "Sun Nov 22 12:00:30 2026", 30 * time.Second},
		{"date in another zone", "Sun, 22 Nov 2026 12:00:30 PST", 0},
		{"other format of dates", "2026-11-22T12:00:30Z", 0},
		{"no date", "Sun, 31 Feb 2026 12:00:30 GMT", 0},
		{"words", "soon", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			require.Equal(t, tc.want, parseRetryAfter(tc.value, noon))
		})
	}
}

func TestRetryAfterDateIsMeasuredByTheBackendsClock(t *testing.T) {
	answer := http.Header{}
	answer.Set("Retry-After", "Sun, 22 Nov 2026 12:00:30 GMT")
	require.Equal(t, 30*time.Second, retryAfter(answer, noon), "without a Date, ours counts")

	answer.Set("Date", "Sun, 22 Nov 2026 12:00:20 GMT")
	require.Equal(t, 10*time.Second, retryAfter(answer, noon.Add(-time.Hour)))

	answer.Set("Date", "yesterday")
	require.Equal(t, 30*time.Second, retryAfter(answer, noon))
}

func FuzzParseRetryAfter(f *testing.F) {
	for _, seed := range []string{
		"", "0", "120", "86400", "86401", "9223372037", "99999999999999999999", "-1", "+1", "1.5", " 7 ", "0x10", "1_000", "٣",
		"Sun, 22 Nov 2026 12:00:30 GMT", "Sunday, 22-Nov-26 12:00:30 GMT", "Sunday, 22-Nov-99 12:00:30 GMT", "Sun Nov 22 12:00:30 2026",
		"Fri, 31 Dec 9999 23:59:59 GMT", "Sat, 01 Jan 0000 00:00:00 GMT", "Tuesday, 29-Feb-00 00:00:00 GMT", "Sun, 22 Nov 2026 12:00:30 UTC",
	} {
		f.Add(seed, noon.Unix())
	}
	f.Fuzz(func(t *testing.T, value string, unix int64) {
		// Any moment from 1970 to 9999: what a clock can say, and a Date header.
		now := time.Unix(((unix%253402300800)+253402300800)%253402300800, 0).UTC()

		got := parseRetryAfter(value, now)

		require.GreaterOrEqual(t, got, time.Duration(0))
		require.LessOrEqual(t, got, maxRetryAfter)
		if date, err := time.Parse(http.TimeFormat, value); err == nil {
			require.Equal(t, min(max(date.Sub(now), 0), maxRetryAfter), got)
		}
		if seconds, ok := new(big.Int).SetString(value, 10); ok && isDigits(value) {
			want := maxRetryAfter
			if limit := big.NewInt(int64(maxRetryAfter / time.Second)); seconds.Cmp(limit) < 0 {
				want = time.Duration(seconds.Int64()) * time.Second
			}
			require.Equal(t, want, got)
		}
	})
}
