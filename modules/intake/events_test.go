package intake

import (
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"sluice/modules/contract"
)

// told is one event of a stream.
type told struct {
	id, name string
	data     map[string]any
}

// parseEvents reads a stream as the standard says, as far as it is used here.
func parseEvents(t *testing.T, text string) []told {
	t.Helper()
	var all []told
	for block := range strings.SplitSeq(text, "\n\n") {
		var e told
		for line := range strings.SplitSeq(block, "\n") {
			switch name, value, _ := strings.Cut(line, ": "); name {
			case "id":
				e.id = value
			case "event":
				e.name = value
			case "data":
				require.NoError(t, json.Unmarshal([]byte(value), &e.data))
			}
		}
		if e.data != nil {
			all = append(all, e)
		}
	}
	return all
}

func TestEventsOfAnOrder(t *testing.T) {
	m, _, _ := testModule(t, 0)
	o := submit(t, m, "A-1")
	streams := make(chan string, 1)
	follow := func(header ...string) {
		go func() { streams <- ask(m, http.MethodGet, location(o)+"/events", header...).Body.String() }()
		soon(t, func() bool { return m.waiters.waiting() == 1 })
	}
	end := func(kind string, attempt int) {
		out := outcome(kind, attempt)
		out.OrderID = o.ID.String()
		project(t, m, out)
	}
	names := func(events []told) (all []string) {
		for _, e := range events {
			require.Equal(t, e.name, e.data["status"])
			all = append(all, e.id+" "+e.name)
		}
		return all
	}
	follow()
	end(contract.TypeAttemptFailed, 1)
	end(contract.TypeAttemptFailed, 2) // no change of status
	end(contract.TypeAttemptFailed, 3)
	text := <-streams
	require.True(t, strings.HasPrefix(text, "retry: "), text)
	require.Equal(t, []string{"0-accepted accepted", "0-retrying retrying", "0-dead dead"}, names(parseEvents(t, text)))

	// A client that has the final event is told not to come back.
	require.Equal(t, http.StatusNoContent, ask(m, http.MethodGet, location(o)+"/events", "Last-Event-ID", "0-dead").Code)
	require.Equal(t, []string{"0-dead dead"}, names(parseEvents(t, ask(m, http.MethodGet, location(o)+"/events", "Last-Event-ID", "0-retrying").Body.String())))

	c := &change{id: o.ID, update: func(o *order) verdict { return o.replay(now()) }}
	require.NoError(t, m.writer.do(t.Context(), c))
	follow("Last-Event-ID", "0-dead")
	end(contract.TypeSaved, 4)
	require.Equal(t, []string{"3-retrying retrying", "3-saved saved"}, names(parseEvents(t, <-streams)))
	require.Equal(t, []string{"3-saved saved"}, names(parseEvents(t, ask(m, http.MethodGet, location(o)+"/events", "Last-Event-ID", "nonsense").Body.String())))
	require.Zero(t, m.waiters.waiting())
}

func TestEventsAreNotRepeatedToWhoHasThem(t *testing.T) {
	m, _, _ := testModule(t, 0)
	o := submit(t, m, "A-1")
	streams := make(chan string, 1)
	go func() {
		streams <- ask(m, http.MethodGet, location(o)+"/events", "Last-Event-ID", "0-accepted").Body.String()
	}()
	soon(t, func() bool { return m.waiters.waiting() == 1 })
	out := outcome(contract.TypeSaved, 1)
	out.OrderID = o.ID.String()
	project(t, m, out)
	events := parseEvents(t, <-streams)
	require.Len(t, events, 1)
	require.Equal(t, "0-saved", events[0].id)
}

func TestAQuietStreamHasComments(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := &Module{outlook: newForecast(newMemoryStore().counts)}
		o := testOrder("A-1")
		s := &stream{m: m, watch: m.waiters.watch(o.ID), order: o, lastID: eventID(o)}
		w := httptest.NewRecorder()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			s.run(w, httptest.NewRequest(http.MethodGet, "/", nil))
		}()
		<-time.After(3*eventComment + time.Second)
		saved := *o
		saved.Status = contract.StatusSaved
		m.waiters.notify(o.ID, &saved)
		<-ended
		require.Equal(t, 3, strings.Count(w.Body.String(), "\n\n:\n\n")+strings.Count(w.Body.String(), ":\n\n:\n\n"), w.Body.String())
	})
}

// slowWriter notes the deadlines that it is given.
type slowWriter struct {
	*httptest.ResponseRecorder
	deadline time.Time
	written  []time.Time // the deadline of each write
	fails    error
}

func (w *slowWriter) SetWriteDeadline(at time.Time) error { w.deadline = at; return nil }

func (w *slowWriter) Write(p []byte) (int, error) {
	w.written = append(w.written, w.deadline)
	if w.fails != nil {
		return 0, w.fails
	}
	return w.ResponseRecorder.Write(p)
}

func TestAClientThatDoesNotReadLosesItsStream(t *testing.T) {
	w := &slowWriter{ResponseRecorder: httptest.NewRecorder()}
	began := time.Now()
	require.True(t, send(w, http.NewResponseController(w), []byte("x")))
	require.WithinRange(t, w.written[0], began.Add(eventPatience), time.Now().Add(eventPatience))
	require.Zero(t, w.deadline, "between events there is no limit")

	m, _, _ := testModule(t, 0)
	o := submit(t, m, "A-1")
	w.fails = os.ErrDeadlineExceeded
	mux := http.NewServeMux()
	m.Routes(mux)
	mux.ServeHTTP(w, httptest.NewRequest(http.MethodGet, location(o)+"/events", nil)) // returns
	require.Zero(t, m.waiters.waiting())
}

func TestWhatIsNoStreamOfEvents(t *testing.T) {
	m, _, _ := testModule(t, 0)
	o := submit(t, m, "A-1")
	path := location(o) + "/events"
	a := ask(m, http.MethodHead, path)
	require.Equal(t, http.StatusOK, a.Code)
	require.Equal(t, "text/event-stream", a.Header().Get("Content-Type"))
	require.Equal(t, "no-store", a.Header().Get("Cache-Control"))
	require.Equal(t, "no", a.Header().Get("X-Accel-Buffering"))
	require.Empty(t, a.Body.String())
	require.Equal(t, http.StatusNotFound, ask(m, http.MethodGet, "/orders/"+newTestID().String()+"/events").Code)
	require.Equal(t, http.StatusNotFound, ask(m, http.MethodGet, "/orders/x/events").Code)
	require.Equal(t, http.StatusNotAcceptable, ask(m, http.MethodGet, path, "Accept", "application/json").Code)
	require.Zero(t, m.waiters.waiting())
	for accept, want := range map[string]bool{
		"": true, "*/*": true, "text/*;q=0.5": true, "text/event-stream": true, "application/json, text/event-stream;q=0.1": true,
		"application/json": false, "text/html": false, "text/event-stream;q=0, */*": false, "*/*;q=0": false, "text/event-stream;q=x": false,
	} {
		require.Equal(t, want, acceptsEvents(accept), accept)
	}
}
