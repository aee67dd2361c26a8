package dispatch

import (
	"net/http"
	"strconv"
	"strings"
	"time"
)

// maxRetryAfter is the longest pause that a backend can ask for. A larger one
// is more likely a mistake (milliseconds taken for seconds, a date in the wrong
// century) than a plan, and would park orders out of sight.
const maxRetryAfter = 24 * time.Hour

// httpDates are the layouts of RFC 9110 section 5.6.7: the preferred one, and
// the two that recipients must still accept. All are in GMT.
var httpDates = []string{http.TimeFormat, "Monday, 02-Jan-06 15:04:05 GMT", time.ANSIC}

// retryAfter reads the pause that an answer asks for (RFC 9110 section
// 10.2.3), between 0 and maxRetryAfter; 0 when it asks for none, or not in a
// way that can be read. A date is measured against the answer's own Date where
// there is one, so that a backend whose clock is wrong gets the pause it meant.
func retryAfter(answer http.Header, now time.Time) time.Duration {
	if answer.Get("Retry-After") == "" {
		return 0
	}
	if date, ok := parseHTTPDate(answer.Get("Date"), now); ok {
		now = date
	}
	return parseRetryAfter(answer.Get("Retry-After"), now)
}

func parseRetryAfter(value string, now time.Time) time.Duration {
	value = strings.Trim(value, " \t")
	if isDigits(value) {
		seconds, err := strconv.ParseInt(value, 10, 64)
		if err != nil || seconds > int64(maxRetryAfter/time.Second) {
			return maxRetryAfter // the only error that digits leave is a number out of range
		}
		return time.Duration(seconds) * time.Second
	}
	date, ok := parseHTTPDate(value, now)
	if !ok {
		return 0
	}
	return min(max(date.Sub(now), 0), maxRetryAfter)
}

func isDigits(s string) bool {
	return s != "" && strings.Trim(s, "0123456789") == ""
}

func parseHTTPDate(value string, now time.Time) (time.Time, bool) {
	for i, layout := range httpDates {
		date, err := time.Parse(layout, value)
		if err != nil {
			continue
		}
		if i == 1 {
			date = inCentury(date, now)
		}
		return date, true
	}
	return time.Time{}, false
}

// inCentury places a date with a two-digit year as RFC 9110 section 5.6.7 asks:
// in the present century, or the one before where that would be more than 50
// years ahead. The time package has a fixed rule instead (69 and up is 19xx).
func inCentury(date, now time.Time) time.Time {
	date = date.AddDate(now.UTC().Year()/100*100-date.Year()/100*100, 0, 0)
	if date.After(now.AddDate(50, 0, 0)) {
		return date.AddDate(-100, 0, 0)
	}
	return date
}
