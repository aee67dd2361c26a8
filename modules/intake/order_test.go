package intake

import (
	"encoding/json"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"sluice/modules/contract"
)

var (
	t0       = time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	threeTry = RetryConfig{MaxAttempts: 3, RetryInitial: time.Second, RetryMax: 10 * time.Second}
)

func outcome(typ string, attempt int) contract.Outcome {
	return contract.Outcome{Type: typ, Attempt: attempt, StartedAt: t0, Duration: 51 * time.Millisecond}
}

func TestApplySaved(t *testing.T) {
	o := testOrder("A-1")
	out := outcome(contract.TypeSaved, 1)
	out.StatusCode, out.Body = 201, []byte(`{"ok":true}`)
	require.Equal(t, save, o.apply(out, t0, threeTry))
	require.Equal(t, contract.StatusSaved, o.Status)
	require.Equal(t, t0, o.FinishedAt)
	require.True(t, o.PublishAt.IsZero())
	require.False(t, o.NumberReleased)
	require.Equal(t, 201, o.BackendStatus)
	require.Equal(t, []attempt{{Number: 1, StartedAt: t0, Duration: "51ms", Status: 201}}, o.History)
}

func TestApplyRejectedKeepsTheBackendsProblemAndFreesTheNumber(t *testing.T) {
	o := testOrder("A-1")
	out := outcome(contract.TypeRejected, 1)
	out.StatusCode, out.ContentType, out.Body = 400, "application/problem+json; charset=utf-8", []byte(`{"title":"no such customer","x":1}`)
	require.Equal(t, save, o.apply(out, t0, threeTry))
	require.Equal(t, contract.StatusRejected, o.Status)
	require.True(t, o.NumberReleased)
	require.JSONEq(t, `{"title":"no such customer","x":1}`, string(o.Problem))
}

func TestApplyRejectedWithoutAUsableProblemGetsOurs(t *testing.T) {
	for name, out := range map[string]contract.Outcome{
		"text":          {ContentType: "text/plain", Body: []byte("no")},
		"not an object": {ContentType: "application/problem+json", Body: []byte(`null`)},
		"cut off":       {ContentType: "application/problem+json", Body: []byte(`{}`), Truncated: true},
		"broken":        {ContentType: "application/problem+json", Body: []byte(`{"title"`)},
	} {
		t.Run(name, func(t *testing.T) {
			o := testOrder("A-1")
			out.Type, out.Attempt, out.StatusCode, out.Error = contract.TypeRejected, 1, 404, "backend answered 404 Not Found"
			require.Equal(t, save, o.apply(out, t0, threeTry))
			var problem map[string]any
			require.NoError(t, json.Unmarshal(o.Problem, &problem))
			require.Equal(t, "/problems/rejected-by-backend", problem["type"])
			require.Equal(t, "backend answered 404 Not Found", problem["detail"])
		})
	}
}

func TestApplyFailuresRetryThenDieThenReplay(t *testing.T) {
	o := testOrder("A-1")
	for n := 1; n <= 2; n++ {
		require.Equal(t, save, o.apply(outcome(contract.TypeAttemptFailed, n), t0, threeTry))
		require.Equal(t, contract.StatusRetrying, o.Status)
		require.False(t, o.PublishAt.Before(t0))
		require.LessOrEqual(t, o.PublishAt.Sub(t0), time.Duration(n)*time.Second)
		require.NotNil(t, o.History[n-1].NextAttemptAt)
	}
	out := outcome(contract.TypeAttemptFailed, 3)
	out.Error = "connection refused"
	require.Equal(t, save, o.apply(out, t0, threeTry))
	require.Equal(t, contract.StatusDead, o.Status)
	require.True(t, o.due(t0), "the news of the death wants publishing")
	require.False(t, o.NumberReleased)
	require.Contains(t, string(o.Problem), "connection refused")
	require.Equal(t, 3, o.dead().Attempt)

	require.Equal(t, save, o.replay(t0))
	require.Equal(t, contract.StatusRetrying, o.Status)
	require.Nil(t, o.Problem)
	require.True(t, o.FinishedAt.IsZero())
	require.Equal(t, 4, o.submitted().Attempt)
	require.Equal(t, leave, o.replay(t0))
	for n := 4; n <= 6; n++ {
		require.Equal(t, save, o.apply(outcome(contract.TypeAttemptFailed, n), t0, threeTry))
	}
	require.Equal(t, contract.StatusDead, o.Status, "three more attempts, not fewer")
}

func TestApplyIgnoresWhatItHasSeenExceptASave(t *testing.T) {
	o := testOrder("A-1")
	require.Equal(t, save, o.apply(outcome(contract.TypeAttemptFailed, 1), t0, threeTry))
	before := *o
	require.Equal(t, leave, o.apply(outcome(contract.TypeAttemptFailed, 1), t0, threeTry))
	require.Equal(t, leave, o.apply(outcome(contract.TypeRejected, 1), t0, threeTry))
	require.Equal(t, leave, o.apply(outcome(contract.TypeDead, 1), t0, threeTry))
	require.Equal(t, before, *o)
	require.Equal(t, save, o.apply(outcome(contract.TypeSaved, 1), t0, threeTry), "the backend has it, whatever a twin reported")
	require.Equal(t, contract.StatusSaved, o.Status)
	require.Equal(t, leave, o.apply(outcome(contract.TypeAttemptFailed, 9), t0, threeTry))
	require.Equal(t, leave, o.apply(outcome(contract.TypeSaved, 9), t0, threeTry))
}

func TestApplyASaveRevivesTheDead(t *testing.T) {
	o := testOrder("A-1")
	for n := 1; n <= 3; n++ {
		o.apply(outcome(contract.TypeAttemptFailed, n), t0, threeTry)
	}
	require.Equal(t, leave, o.apply(outcome(contract.TypeRejected, 3), t0, threeTry))
	require.Equal(t, save, o.apply(outcome(contract.TypeSaved, 3), t0, threeTry))
	require.Equal(t, contract.StatusSaved, o.Status)
	require.True(t, o.PublishAt.IsZero())
	require.Nil(t, o.Problem)
}

func TestAHistoryIsOfAllAttemptsSinceTheLastReplayAndOtherwiseBounded(t *testing.T) {
	o := testOrder("A-1")
	most := historyLimit + 50
	fail := func(n int) {
		o.apply(outcome(contract.TypeAttemptFailed, n), t0, RetryConfig{MaxAttempts: most, RetryInitial: 1, RetryMax: 1})
	}
	history := func(first, last int) {
		t.Helper()
		require.Len(t, o.History, last-first+1)
		require.Equal(t, first, o.History[0].Number)
		require.Equal(t, last, o.History[len(o.History)-1].Number)
	}
	for n := 1; n <= most; n++ {
		fail(n)
	}
	require.Equal(t, contract.StatusDead, o.Status)
	history(1, most)
	require.Equal(t, save, o.replay(t0))
	fail(most + 1)
	history(most+2-historyLimit, most+1)
	for n := most + 2; n <= 2*most; n++ {
		fail(n)
	}
	require.Equal(t, contract.StatusDead, o.Status)
	history(most+1, 2*most)
}

func TestPauseIsExponentialJitteredCappedAndObeysTheBackend(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		cfg := RetryConfig{
			RetryInitial: time.Duration(rapid.Int64Range(1, int64(time.Hour)).Draw(t, "initial")),
			RetryMax:     time.Duration(rapid.Int64Range(1, int64(100*time.Hour)).Draw(t, "max")),
		}
		tries := rapid.IntRange(1, 1000).Draw(t, "tries")
		asked := time.Duration(rapid.Int64Range(0, int64(time.Hour)).Draw(t, "asked"))
		ceiling := cfg.RetryMax
		for d, n := cfg.RetryInitial, 1; d < cfg.RetryMax; d, n = 2*d, n+1 {
			if n == tries {
				ceiling = d
				break
			}
		}
		got := pause(tries, asked, cfg)
		if got < asked || got > max(ceiling, asked) {
			t.Fatalf("pause is %v, want %v to %v", got, asked, max(ceiling, asked))
		}
	})
}

func TestPauseUsesTheWholeRange(t *testing.T) {
	low, high := false, false
	for range 1000 {
		d := pause(3, 0, threeTry) // up to 4 s
		low, high = low || d < time.Second, high || d > 3*time.Second
	}
	require.True(t, low && high, "full jitter")
}

func TestTraceIDComesFromTheTraceparent(t *testing.T) {
	o := order{TraceParent: "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}
	require.Equal(t, "4bf92f3577b34da6a3ce929d0e0e4736", o.traceID())
	require.Empty(t, (&order{}).traceID())
}
