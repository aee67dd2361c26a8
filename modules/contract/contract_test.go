package contract_test

import (
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/stretchr/testify/require"

	"sluice/modules/contract"
)

var at = time.Date(2026, 1, 2, 3, 4, 5, 678_000_000, time.UTC)

func submitted() contract.Submitted {
	return contract.Submitted{
		OrderID: "01930000-0000-7000-8000-000000000001", OrderNumber: "A-1", Attempt: 3,
		ContentType: "application/json", AcceptedAt: at, Body: []byte(`{"orderNumber": "A-1"}`),
	}
}

func failed() contract.Outcome {
	return contract.Outcome{
		Type: contract.TypeAttemptFailed, OrderID: "01930000-0000-7000-8000-000000000001", OrderNumber: "A-1", Attempt: 3,
		StartedAt: at, Duration: 51 * time.Millisecond, StatusCode: 503, ContentType: "text/plain", Body: []byte("busy"),
		Truncated: true, Error: "backend answered 503 Service Unavailable", Timeout: true, RetryAfter: 2 * time.Second,
	}
}

// What travels between processes of different versions is pinned here, byte for
// byte: changing it needs a new version of the event.
func TestMessagesOnTheWire(t *testing.T) {
	msg := submitted().Message()
	require.Equal(t, `{"orderNumber": "A-1"}`, string(msg.Payload))
	require.Equal(t, message.Metadata{
		"ce_id": "01930000-0000-7000-8000-000000000001.3", "ce_type": "order.submitted.v1", "ce_source": "/sluice/intake",
		"ce_subject": "01930000-0000-7000-8000-000000000001", "ce_time": "2026-01-02T03:04:05.678Z", "ce_specversion": "1.0",
		"ce_datacontenttype": "application/json", "order_number": "A-1", "attempt": "3", "schema_version": "1",
	}, msg.Metadata)
	require.Equal(t, msg.Metadata.Get("ce_id"), msg.UUID)

	msg, err := failed().Message()
	require.NoError(t, err)
	require.Equal(t, `{"orderId":"01930000-0000-7000-8000-000000000001","orderNumber":"A-1","attempt":3,`+
		`"startedAt":"2026-01-02T03:04:05.678Z","durationNanos":51000000,"statusCode":503,"contentType":"text/plain","body":"YnVzeQ==",`+
		`"truncated":true,"error":"backend answered 503 Service Unavailable","timeout":true,"retryAfterNanos":2000000000}`, string(msg.Payload))
	require.Equal(t, message.Metadata{
		"ce_id": "01930000-0000-7000-8000-000000000001.3.order.attempt_failed.v1", "ce_type": "order.attempt_failed.v1", "ce_source": "/sluice/dispatch",
		"ce_subject": "01930000-0000-7000-8000-000000000001", "ce_time": "2026-01-02T03:04:05.729Z", "ce_specversion": "1.0",
		"ce_datacontenttype": "application/json", "order_number": "A-1", "attempt": "3", "schema_version": "1",
	}, msg.Metadata)
}

func TestTheNewsOfADeathComesFromIntake(t *testing.T) {
	out := failed()
	out.Type = contract.TypeDead
	msg, err := out.Message()
	require.NoError(t, err)
	require.Equal(t, "/sluice/intake", msg.Metadata.Get("ce_source"))
}

func TestMessagesComeBackAsTheyWere(t *testing.T) {
	got, err := contract.DecodeSubmitted(submitted().Message())
	require.NoError(t, err)
	require.Equal(t, submitted(), got)
	for _, typ := range []string{contract.TypeSaved, contract.TypeRejected, contract.TypeAttemptFailed, contract.TypeDead} {
		out := failed()
		out.Type = typ
		msg, err := out.Message()
		require.NoError(t, err)
		back, err := contract.DecodeOutcome(msg)
		require.NoError(t, err)
		require.Equal(t, out, back)
	}
}

func TestWhatIsNotOursIsUndecodable(t *testing.T) {
	for name, spoil := range map[string]func(*message.Message){
		"another type": func(m *message.Message) { m.Metadata.Set("ce_type", "order.submitted.v9") },
		"no metadata":  func(m *message.Message) { m.Metadata = message.Metadata{} },
		"no order":     func(m *message.Message) { m.Metadata.Set("ce_subject", "") },
		"no attempt":   func(m *message.Message) { m.Metadata.Set("attempt", "") },
		"attempt zero": func(m *message.Message) { m.Metadata.Set("attempt", "0") },
		"no time":      func(m *message.Message) { m.Metadata.Set("ce_time", "yesterday") },
	} {
		msg := submitted().Message()
		spoil(msg)
		_, err := contract.DecodeSubmitted(msg)
		require.ErrorIs(t, err, contract.ErrUndecodable, name)
	}
	for name, spoil := range map[string]func(*message.Message){
		"another type": func(m *message.Message) { m.Metadata.Set("ce_type", contract.TypeSubmitted) },
		"not JSON":     func(m *message.Message) { m.Payload = []byte("{") },
		"no order":     func(m *message.Message) { m.Payload = []byte(`{"attempt":1}`) },
		"no attempt": func(m *message.Message) {
			m.Payload = []byte(strings.Replace(string(m.Payload), `"attempt":3`, `"attempt":0`, 1))
		},
	} {
		msg, err := failed().Message()
		require.NoError(t, err)
		spoil(msg)
		_, err = contract.DecodeOutcome(msg)
		require.ErrorIs(t, err, contract.ErrUndecodable, name)
	}
}

func TestFinalStates(t *testing.T) {
	var final []contract.Status
	for _, status := range contract.Statuses() {
		if status.Final() {
			final = append(final, status)
		}
	}
	require.Equal(t, []contract.Status{contract.StatusSaved, contract.StatusRejected, contract.StatusDead}, final)
}

func TestAMarkerOnTheWire(t *testing.T) {
	marker := contract.Marker{SentAt: at}
	msg, err := marker.Message()
	require.NoError(t, err)
	require.True(t, contract.IsMarker(msg))
	require.False(t, contract.IsMarker(submitted().Message()))
	require.Equal(t, `{"sentAt":"2026-01-02T03:04:05.678Z"}`, string(msg.Payload))
	require.Equal(t, "intake.marker.v1", msg.Metadata.Get("ce_type"))

	marker.LostBefore = at.Add(-time.Minute)
	msg, err = marker.Message()
	require.NoError(t, err)
	require.Equal(t, `{"sentAt":"2026-01-02T03:04:05.678Z","lostBefore":"2026-01-02T03:03:05.678Z"}`, string(msg.Payload))
	got, err := contract.DecodeMarker(msg)
	require.NoError(t, err)
	require.Equal(t, marker, got)

	msg.Payload = []byte("{")
	_, err = contract.DecodeMarker(msg)
	require.ErrorIs(t, err, contract.ErrUndecodable)
}
