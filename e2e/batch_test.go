package e2e

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// lineAnswer is the answer to one line of a batch.
type lineAnswer struct {
	Line       int
	Status     int
	ID         string
	Location   string
	Replayed   bool
	RetryAfter int
	Problem    *problem
}

// refused checks that the line has a problem, and returns it.
func (a lineAnswer) refused(t testing.TB, status int, name string) problem {
	t.Helper()
	require.NotNil(t, a.Problem, "%+v", a)
	require.Equal(t, "/problems/"+name, a.Problem.Type)
	require.Equal(t, status, a.Status)
	require.Equal(t, status, a.Problem.Status)
	require.NotEmpty(t, a.Problem.Title)
	require.Equal(t, "/orders/batch", a.Problem.Instance)
	require.Empty(t, a.ID)
	require.Equal(t, status == http.StatusServiceUnavailable, a.RetryAfter > 0, "%+v", a)
	return *a.Problem
}

// accepted checks that the line's order is promised.
func (a lineAnswer) accepted(t testing.TB, line int) lineAnswer {
	t.Helper()
	require.Equal(t, lineAnswer{Line: line, Status: http.StatusAccepted, ID: a.ID, Location: "/orders/" + a.ID, Replayed: a.Replayed}, a)
	require.NotEmpty(t, a.ID)
	return a
}

// batchCall is a batch under way: lines are sent while answers are read.
type batchCall struct {
	lines   *io.PipeWriter
	res     *http.Response
	answers *bufio.Reader
}

// batches has no time limit for a whole request, as a client must not.
var batches = &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}

// startBatch sends the first lines and reads the header of the answer.
func (g *gateway) startBatch(t testing.TB, first string, header ...string) *batchCall {
	t.Helper()
	body, lines := io.Pipe()
	t.Cleanup(func() { _ = lines.Close() }) // or the sender of the body waits for ever
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, g.url+"/orders/batch", body)
	require.NoError(t, err)
	req.Header.Set("Content-Type", "application/x-ndjson")
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	go func() { _, _ = io.WriteString(lines, first) }() // fails with the request
	res, err := batches.Do(req)
	require.NoError(t, err)
	t.Cleanup(func() { _ = res.Body.Close() }) // it may be broken
	require.Equal(t, http.StatusOK, res.StatusCode)
	require.Equal(t, "application/x-ndjson", res.Header.Get("Content-Type"))
	return &batchCall{lines, res, bufio.NewReader(res.Body)}
}

func (b *batchCall) send(t testing.TB, text string) {
	t.Helper()
	_, err := io.WriteString(b.lines, text)
	require.NoError(t, err)
}

// next reads one answer.
func (b *batchCall) next() (lineAnswer, error) {
	var a lineAnswer
	text, err := b.answers.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(text, &a)
	}
	return a, err
}

func (b *batchCall) answer(t testing.TB) lineAnswer {
	t.Helper()
	a, err := b.next()
	require.NoError(t, err)
	return a
}

// ended checks that there are no more answers.
func (b *batchCall) ended(t testing.TB) {
	t.Helper()
	_, err := b.next()
	require.ErrorIs(t, err, io.EOF)
}

// lineAnswers decodes a whole answer.
func lineAnswers(t testing.TB, body []byte) []lineAnswer {
	t.Helper()
	var all []lineAnswer
	for line := range strings.Lines(string(body)) {
		var a lineAnswer
		require.NoError(t, json.Unmarshal([]byte(line), &a), line)
		all = append(all, a)
	}
	return all
}

// batch sends a whole batch and returns all answers.
func (g *gateway) batch(t testing.TB, lines string) []lineAnswer {
	t.Helper()
	a := do(t, http.MethodPost, g.url+"/orders/batch", lines, map[string]string{"Content-Type": "application/x-ndjson"})
	require.Equal(t, http.StatusOK, a.status, string(a.body))
	return lineAnswers(t, a.body)
}

func TestEachLineOfABatchStandsForItself(t *testing.T) {
	eachHome(t, testEachLineOfABatchStandsForItself)
}

func testEachLineOfABatchStandsForItself(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, h, fast(b, "intake.max_body", "64KiB"))
	const traceID = "4bf92f3577b34da6a3ce929d0e0e4736"
	call := g.startBatch(t, "\uFEFF"+body("A-1")+"\n", "Traceparent", "00-"+traceID+"-00f067aa0ba902b7-01")
	first := call.answer(t).accepted(t, 1)
	require.False(t, first.Replayed)

	sent := []string{
		2:  "",
		3:  body("A-2") + "\r",
		4:  " \t\r",
		5:  strings.Replace(body("A-1"), ",", " , ", 1), // the same value
		6:  strings.Replace(body("A-1"), "EUR", "USD", 1),
		7:  `{"orderNumber":"A-3"`,
		8:  strings.Replace(body("A-4"), "tea", "te\xff", 1),
		9:  `{"orderNumber":"A-5","customerId":"c"}`,
		10: padded("A-6", 64<<10),
		11: padded("A-7", 64<<10+1),
		12: padded("A-8", 1<<20),
		13: padded("A-9", 40<<10) + "\r",
		14: body("A-10") + body("A-11"),
		15: "\uFEFF" + body("A-12"),
		16: body("A-13"), // no end of line
	}
	call.send(t, strings.Join(sent[2:], "\n"))
	require.NoError(t, call.lines.Close())
	stored := map[string]string{"A-1": first.ID}
	stored["A-2"] = call.answer(t).accepted(t, 3).ID
	require.Equal(t, lineAnswer{Line: 5, Status: 202, ID: first.ID, Location: first.Location, Replayed: true}, call.answer(t))
	require.Equal(t, first.Location, call.answer(t).refused(t, http.StatusConflict, "duplicate-order-number").Order)
	require.Contains(t, call.answer(t).refused(t, http.StatusBadRequest, "malformed-json").Detail, "column 21: ")
	call.answer(t).refused(t, http.StatusBadRequest, "malformed-json")
	require.Len(t, call.answer(t).refused(t, http.StatusUnprocessableEntity, "invalid-order").Errors, 2)
	stored["A-6"] = call.answer(t).accepted(t, 10).ID
	for line := 11; line <= 12; line++ {
		a := call.answer(t)
		require.Equal(t, line, a.Line)
		a.refused(t, http.StatusRequestEntityTooLarge, "body-too-large")
	}
	stored["A-9"] = call.answer(t).accepted(t, 13).ID
	for range 2 {
		call.answer(t).refused(t, http.StatusBadRequest, "malformed-json")
	}
	stored["A-13"] = call.answer(t).accepted(t, 16).ID
	call.ended(t)

	g.drained(t, patience)
	requireSaved(t, stored, g.all(t))
	require.Equal(t, traceID, g.get(t, first.ID).TraceID)
	require.Equal(t, traceID, g.get(t, stored["A-13"]).TraceID)
	require.Equal(t, backendStats{Requests: 5, Orders: 5, MaxInFlight: b.stats(t).MaxInFlight}, b.stats(t))
}

func TestABatchThatIsNoneIsRefusedAsAWhole(t *testing.T) {
	g := serve(t, true, embedded(t.TempDir()), fast(backend(t)))
	post := func(body string, header ...string) answer {
		h := jsonHeader(header...)
		return do(t, http.MethodPost, g.url+"/orders/batch", body, h)
	}
	post(body("A-1")).problem(t, http.StatusUnsupportedMediaType, "unsupported-media-type")
	post(body("A-1"), "Content-Type", "application/x-ndjson; charset=latin1").problem(t, http.StatusUnsupportedMediaType, "unsupported-media-type")
	post(body("A-1"), "Content-Type", "application/x-ndjson", "Idempotency-Key", `"k"`).problem(t, http.StatusBadRequest, "malformed-header")
	require.Empty(t, g.all(t))

	none := post("", "Content-Type", "application/x-ndjson; charset=utf-8")
	require.Equal(t, http.StatusOK, none.status)
	require.Empty(t, none.body)
	require.Empty(t, g.batch(t, "\n\r\n \n"))
}

func TestABatchIsAnsweredWhileItIsBeingSentAndForAsLongAsItGoesOn(t *testing.T) {
	g := serve(t, true, embedded(t.TempDir()), fast(backend(t), "http.read_header_timeout", "1s", "http.read_timeout", "1s", "http.write_timeout", "1s"))
	call := g.startBatch(t, body("A-1")+"\n")
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	line := 1
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); <-tick.C {
		a := call.answer(t).accepted(t, line)
		require.Equal(t, fmt.Sprintf("A-%d", line), *g.get(t, a.ID).OrderNumber, "it is stored when it is answered")
		line += 2
		call.send(t, "\n"+body(fmt.Sprintf("A-%d", line))+"\n") // an empty line is a sign of life
	}
	call.answer(t).accepted(t, line)
	call.send(t, `{"orderNumber":`) // and stands still
	a := call.answer(t)
	a.refused(t, http.StatusRequestTimeout, "request-timeout")
	require.Equal(t, line+1, a.Line)
	call.ended(t)
}

func TestAStopEndsABatchAfterWhatWasTaken(t *testing.T) {
	b, h := backend(t), embedded(t.TempDir())
	g := serve(t, true, h, fast(b))
	call := g.startBatch(t, body("A-1")+"\n")
	stored := map[string]string{"A-1": call.answer(t).accepted(t, 1).ID}
	call.send(t, body("A-2")+"\n"+`{"orderNumber":`)
	stored["A-2"] = call.answer(t).accepted(t, 2).ID
	require.NoError(t, g.cmd.Process.Signal(syscall.SIGTERM))
	a := call.answer(t)
	a.refused(t, http.StatusServiceUnavailable, "batch-unfinished")
	require.Equal(t, 3, a.Line)
	call.ended(t)
	require.Zero(t, g.exit(t))

	g = serve(t, true, h, fast(b))
	g.drained(t, patience)
	requireSaved(t, stored, g.all(t))
}

// Lines that are in memory already wait for the rate limit, a second each.
func TestAStopDoesNotWaitForTheRateLimit(t *testing.T) {
	g := serve(t, true, embedded(t.TempDir()), fast(backend(t), "http.rate_limit", "1"))
	var lines strings.Builder
	for i := range 120 {
		lines.WriteString(body(fmt.Sprintf("A-%d", i)) + "\n")
	}
	call := g.startBatch(t, lines.String())
	require.Equal(t, `"default";q=1;w=1`, call.res.Header.Get("RateLimit-Policy"))
	call.answer(t).accepted(t, 1)
	require.NoError(t, g.cmd.Process.Signal(syscall.SIGTERM))
	for n := 2; ; n++ {
		a := call.answer(t)
		require.Equal(t, n, a.Line)
		if a.Status != http.StatusAccepted {
			a.refused(t, http.StatusServiceUnavailable, "batch-unfinished")
			break
		}
	}
	call.ended(t)
	require.Zero(t, g.exit(t))
}

// More of them than there is room for, if each kept what it takes.
func TestLongBlankLinesOfABatchKeepNoRoom(t *testing.T) {
	g := serve(t, true, embedded(t.TempDir()), fast(backend(t)))
	long := strings.Replace(body("A-1"), "{", "{"+strings.Repeat(" ", 40<<10), 1)
	blank := strings.Repeat(" ", 40<<10) + "\n"
	answers := g.batch(t, strings.Repeat(blank, 300)+long)
	require.Len(t, answers, 1)
	answers[0].accepted(t, 301)
	g.await(t, g.accept(t, "A-2").ID, "saved")
	require.Equal(t, http.StatusAccepted, g.post(t, strings.Replace(long, "A-1", "A-3", 1)).status)
}

func TestABatchStopsAtTheLimitOfTheBacklog(t *testing.T) {
	g := serve(t, true, embedded(t.TempDir()), settings{"backend.url": backend(t, "--latency", "10m").ordersURL(), "intake.max_backlog": "100"})
	var lines strings.Builder
	for i := range 300 {
		lines.WriteString(body(fmt.Sprintf("A-%d", i)) + "\n")
	}
	for i, a := range g.batch(t, lines.String()) {
		if i < 100 {
			a.accepted(t, i+1)
			continue
		}
		a.refused(t, http.StatusServiceUnavailable, "backlog-full")
	}
	require.Equal(t, 100, g.status(t).Backlog)
}

func TestLinesThatCannotBeStoredAreToldAndNoOthers(t *testing.T) {
	b, dir := backend(t, "--latency", "1ms"), t.TempDir()
	file := filepath.Join(dir, "sluice.db")
	s := fast(b, "store.dsn", file+"?_pragma=max_page_count(250)", "http.shutdown_timeout", "2s")
	g := serve(t, true, embedded(dir), s)
	call := g.startBatch(t, "\n")
	promised, failed := map[string]string{}, 0
	for i := 2; failed < 20; i++ {
		require.Less(t, i, 5000, "the database does not become full")
		number := fmt.Sprintf("A-%d", i)
		call.send(t, padded(number, 2000)+"\n")
		a := call.answer(t)
		require.Equal(t, i, a.Line)
		if a.Status == http.StatusAccepted { // a smaller row may fit where a larger one did not
			promised[number] = a.accepted(t, i).ID
			continue
		}
		a.refused(t, http.StatusServiceUnavailable, "storage-unavailable")
		failed++
	}
	require.NoError(t, call.lines.Close())
	call.ended(t)
	require.Less(t, strings.Count(g.log(), "the store failed lines of a batch"), 20, "once in a row")
	g.terminate(t) // whose outcomes could not be stored is unfinished business, so the code may be 1

	s["store.dsn"] = file
	g = serve(t, true, embedded(dir), s)
	g.drained(t, patience)
	requireSaved(t, promised, g.all(t))
}

// batchHead is the start of a batch by hand.
const batchHead = "POST /orders/batch HTTP/1.1\r\nHost: x\r\nContent-Type: application/x-ndjson\r\n"

func chunk(text string) string { return fmt.Sprintf("%x\r\n%s\r\n", len(text), text) }

func TestBatchesOfAllKindsOfClients(t *testing.T) {
	g := serve(t, true, embedded(t.TempDir()), settings{"backend.url": backend(t, "--latency", "10m").ordersURL()})
	two := func(name string) string { return body(name+"-1") + "\n" + body(name+"-2") + "\n" }
	accepted := func(t *testing.T, a answer, n int) {
		require.Equal(t, http.StatusOK, a.status)
		answers := lineAnswers(t, a.body)
		require.Len(t, answers, n)
		for i := range answers {
			answers[i].accepted(t, i+1)
		}
	}
	t.Run("one that closes its side when it has sent everything", func(t *testing.T) {
		c := g.dial(t)
		c.send(t, batchHead+fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(two("half")), two("half")))
		require.NoError(t, c.Conn.(*net.TCPConn).CloseWrite())
		accepted(t, c.receive(t), 2)
	})
	t.Run("one that closes its side too early", func(t *testing.T) {
		c := g.dial(t)
		c.send(t, batchHead+"Transfer-Encoding: chunked\r\n\r\n"+chunk(two("early"))+chunk(body("early-3")))
		require.NoError(t, c.Conn.(*net.TCPConn).CloseWrite())
		answers := lineAnswers(t, c.receive(t).body)
		require.Len(t, answers, 3)
		answers[2].refused(t, http.StatusBadRequest, "incomplete-body")
		require.Equal(t, 3, answers[2].Line)
		require.Empty(t, g.numbered(t, "early-3"), "nobody knows whether that was all of the line")
	})
	t.Run("one that has nothing for us but a header", func(t *testing.T) {
		c := g.dial(t)
		c.send(t, batchHead+"Content-Length: 10\r\n\r\n")
		require.NoError(t, c.Conn.(*net.TCPConn).CloseWrite())
		c.receive(t).problem(t, http.StatusBadRequest, "incomplete-body")
	})
	t.Run("HTTP/1.0", func(t *testing.T) {
		c := g.dial(t)
		c.send(t, strings.Replace(batchHead, "HTTP/1.1", "HTTP/1.0", 1)+fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(two("old")), two("old")))
		a := c.receive(t)
		require.Empty(t, a.header.Get("Transfer-Encoding"))
		accepted(t, a, 2)
		require.Zero(t, c.remains(t))
	})
	t.Run("one that wants to be asked to go on", func(t *testing.T) {
		c := g.dial(t)
		c.send(t, batchHead+fmt.Sprintf("Expect: 100-continue\r\nContent-Length: %d\r\n\r\n", len(two("ask"))))
		line, err := c.in.ReadString('\n')
		require.NoError(t, err)
		require.Equal(t, "HTTP/1.1 100 Continue\r\n", line)
		_, err = c.in.ReadString('\n')
		require.NoError(t, err)
		c.send(t, two("ask"))
		accepted(t, c.receive(t), 2)
		// The connection goes on.
		c.send(t, batchHead+fmt.Sprintf("Content-Length: %d\r\n\r\n%s", len(two("ask")), two("ask")))
		accepted(t, c.receive(t), 2)

		c = g.dial(t)
		c.send(t, strings.Replace(batchHead, "x-ndjson", "json", 1)+"Expect: 100-continue\r\nContent-Length: 10\r\n\r\n")
		c.receive(t).problem(t, http.StatusUnsupportedMediaType, "unsupported-media-type")
	})
	t.Run("curl", func(t *testing.T) {
		path, err := exec.LookPath("curl")
		if err != nil {
			t.Skip("there is no curl")
		}
		const n = 300
		var lines strings.Builder
		for i := range n {
			lines.WriteString(body(fmt.Sprintf("curl-%d", i)) + "\n")
		}
		file := filepath.Join(t.TempDir(), "orders.ndjson")
		require.NoError(t, os.WriteFile(file, []byte(lines.String()), 0o600))
		for _, how := range [][]string{{"--data-binary", "@" + file}, {"-X", "POST", "-T", "-"}, {"-X", "POST", "-T", file}} {
			cmd := exec.CommandContext(t.Context(), path, append([]string{"-sS", "-H", "Content-Type: application/x-ndjson", g.url + "/orders/batch"}, how...)...)
			cmd.Stdin = strings.NewReader(lines.String())
			out, err := cmd.Output()
			require.NoError(t, err)
			accepted(t, answer{status: http.StatusOK, body: out}, n)
		}
	})
}

func TestAClientThatDoesNotReadItsAnswersHasNoMoreReadOfIt(t *testing.T) {
	g := serve(t, true, embedded(t.TempDir()), settings{"backend.url": backend(t, "--latency", "10m").ordersURL(), "http.write_timeout": "2s"})
	before := g.connections(t)
	c := g.dial(t)
	c.send(t, batchHead+"Transfer-Encoding: chunked\r\n\r\n")
	const most = 64 << 20
	line := chunk(strings.Repeat(`{"pad":"`+padding[:1000]+"\"}\n", 100))
	sent := 0
	for ; sent < most; sent += len(line) {
		require.NoError(t, c.SetDeadline(time.Now().Add(patience))) // a busy server may take longer for all of it
		if _, err := io.WriteString(c, line); err != nil {
			require.NotErrorIs(t, err, os.ErrDeadlineExceeded)
			break
		}
	}
	t.Logf("cut off after %.1f MiB were sent", mib(int64(sent)))
	require.Less(t, sent, most)
	eventually(t, patience, func() bool { return g.connections(t) <= before }, "who does not read holds a connection for ever")
	require.Less(t, residentMemory(t, g.process), int64(512<<20))
	g.accept(t, "A-0")
}

func TestAClientThatReadsItsAnswersSlowlyGetsThemAll(t *testing.T) {
	g := serve(t, true, embedded(t.TempDir()), fast(backend(t), "http.write_timeout", "1s", "http.read_header_timeout", "1s", "http.read_timeout", "1s"))
	const n = 60_000
	c := g.dial(t)
	sent := make(chan error, 1)
	go func() {
		_, err := io.WriteString(c, batchHead+fmt.Sprintf("Content-Length: %d\r\n\r\n", 3*n)+strings.Repeat("{}\n", n))
		sent <- err
	}()
	res, err := http.ReadResponse(c.in, nil)
	require.NoError(t, err)
	defer res.Body.Close()
	require.NoError(t, c.SetDeadline(time.Now().Add(time.Minute)))
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	answers := bufio.NewReader(res.Body)
	for read := range n {
		text, err := answers.ReadString('\n')
		require.NoError(t, err)
		require.True(t, strings.HasPrefix(text, fmt.Sprintf(`{"line":%d,"status":422,`, read+1)), text)
		if read%1000 == 0 {
			<-tick.C
		}
	}
	require.NoError(t, <-sent)
	_, err = answers.ReadByte()
	require.ErrorIs(t, err, io.EOF)
}

func TestSoManyBatchesAtOnceAndNoMore(t *testing.T) {
	const most = 128
	g := serve(t, true, embedded(t.TempDir()), fast(backend(t)))
	calls := make([]*wire, most)
	for i := range calls {
		calls[i] = g.dial(t)
		calls[i].send(t, batchHead+"Transfer-Encoding: chunked\r\n\r\n"+chunk("\n"))
		_, err := calls[i].in.Peek(1) // the header: it is under way
		require.NoError(t, err)
	}
	a := do(t, http.MethodPost, g.url+"/orders/batch", "\n", map[string]string{"Content-Type": "application/x-ndjson"})
	a.problem(t, http.StatusServiceUnavailable, "batch-limit-reached")
	require.NotEmpty(t, a.header.Get("Retry-After"))
	g.accept(t, "A-0")
	for _, c := range calls {
		c.send(t, chunk(body("A-0"))+"0\r\n\r\n")
		lineAnswers(t, c.receive(t).body)[0].accepted(t, 2)
	}
	require.Empty(t, g.batch(t, "\n"))
}

// batchSize is how many lines the large batches have: E2E_BATCH, if it is set.
func batchSize(t testing.TB) int { return sizeFrom(t, "E2E_BATCH", 20_000) }

// sizeFrom returns the number in an environment variable, or the one for every
// day.
func sizeFrom(t testing.TB, variable string, everyDay int) int {
	t.Helper()
	text := os.Getenv(variable)
	if text == "" {
		return everyDay
	}
	n, err := strconv.Atoi(text)
	require.NoError(t, err)
	return n
}

// pump sends the orders with these numbers, until the batch breaks off.
func (b *batchCall) pump(first, end int) error {
	out := bufio.NewWriterSize(b.lines, 32<<10)
	for i := first; i < end; i++ {
		if _, err := out.WriteString(body(lineNumber(i)) + "\n"); err != nil {
			return err
		}
	}
	return out.Flush()
}

func lineNumber(i int) string { return fmt.Sprintf("B-%07d", i) }

// The same with a million lines:
//
//	E2E_BATCH=1000000 go test -v -count=1 -timeout 30m -run ABatchOfAnyLength ./e2e
func TestABatchOfAnyLengthTakesTheSameMemory(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("resident memory is read from /proc, which only Linux has")
	}
	n := batchSize(t)
	few := n / 2
	if n > 100_000 {
		few = 20_000
	}
	b := backend(t, "--latency", "10m")
	g := serve(t, false, embedded(t.TempDir()), settings{"backend.url": b.ordersURL(), "backend.timeout": "10m", "http.read_timeout": "2m"})
	call := g.startBatch(t, "\n")
	ids := make([]string, 0, n)
	stretch := func(end int) (peak int64) {
		sent := make(chan error, 1)
		go func() { sent <- call.pump(len(ids), end) }()
		for len(ids) < end {
			ids = append(ids, call.answer(t).accepted(t, len(ids)+2).ID)
			if len(ids)%1000 == 0 {
				peak = max(peak, residentMemory(t, g.process))
			}
		}
		require.NoError(t, <-sent)
		return peak
	}
	firstPeak := stretch(few)
	small := g.memoryAtRest(t)
	began := time.Now()
	peak := stretch(n)
	took := time.Since(began)
	large := g.memoryAtRest(t)
	require.NoError(t, call.lines.Close())
	call.ended(t)
	t.Logf("%d lines in %v, %.0f/s", n-few, took.Round(time.Millisecond), float64(n-few)/took.Seconds())
	t.Logf("resident memory: %.1f MiB after %d lines (at most %.1f before), %.1f MiB after %d lines (at most %.1f before): %.3f times as much",
		mib(small), few, mib(firstPeak), mib(large), n, mib(peak), float64(large)/float64(small))
	require.LessOrEqual(t, float64(large)/float64(small), 1.25)
	require.LessOrEqual(t, float64(peak)/float64(firstPeak), 1.5, "a running process has garbage besides")
	require.Equal(t, n, g.status(t).Backlog)
	orders := g.all(t)
	require.Len(t, orders, n)
	for i, id := range ids {
		if orders[lineNumber(i)].ID != id {
			require.Equal(t, id, orders[lineNumber(i)].ID, "line %d", i)
		}
	}
}

// The same with a million lines:
//
//	E2E_BATCH=1000000 go test -v -count=1 -timeout 60m -run KillInTheMiddle ./e2e
func TestAKillInTheMiddleOfABatchLosesNoAnsweredLine(t *testing.T) {
	eachHome(t, testAKillInTheMiddleOfABatchLosesNoAnsweredLine)
}

func testAKillInTheMiddleOfABatchLosesNoAnsweredLine(t *testing.T, h home) {
	// What one batch has read and not answered, and as many answers as may be
	// lost on their way: those that the server has sent and the client, who
	// reads all the time, has not got yet when the connection is reset.
	const unanswered, onTheirWay = 1024, 8192
	n := batchSize(t)
	b := backend(t, "--latency", "10m")
	s := settings{"backend.url": b.ordersURL(), "backend.timeout": "10m"}
	g := serve(t, false, h, s)
	call := g.startBatch(t, body(lineNumber(0))+"\n")
	sent := make(chan error, 1)
	go func() { sent <- call.pump(1, n*3/4) }() // the rest would have come later, however long the kill takes
	var ids []string
	killed := make(chan struct{})
	for {
		a, err := call.next()
		if err != nil {
			break
		}
		ids = append(ids, a.accepted(t, len(ids)+1).ID)
		if len(ids) == n/2 {
			go func() { g.kill(); close(killed) }() // and the answers are read on
		}
	}
	<-killed
	_ = call.lines.CloseWithError(errors.New("the gateway is gone"))
	t.Logf("sending ended with %v; all of a short one may have been on its way", <-sent)

	g = serve(t, false, h, s)
	orders := g.all(t)
	last := 0
	for i := range n {
		switch o, ok := orders[lineNumber(i)]; {
		case i < len(ids):
			if o.ID != ids[i] {
				require.Equal(t, ids[i], o.ID, "line %d was answered", i+1)
			}
		case ok:
			last = i
		}
	}
	extra := len(orders) - len(ids)
	t.Logf("killed after %d of %d lines were answered; %d more are there, the last one is line %d", len(ids), n, extra, last+1)
	require.LessOrEqual(t, extra, unanswered+onTheirWay)
	require.LessOrEqual(t, last, len(ids)+unanswered+onTheirWay)

	// Who was interrupted sends it all again.
	call = g.startBatch(t, body(lineNumber(0))+"\n")
	go func() { sent <- errors.Join(call.pump(1, n), call.lines.Close()) }()
	replayed := 0
	for i := range n {
		a := call.answer(t).accepted(t, i+1)
		known, ok := orders[lineNumber(i)]
		if a.Replayed != ok || ok && a.ID != known.ID {
			require.Equal(t, known.ID, a.ID, "line %d, replayed %t", i+1, a.Replayed)
		}
		if ok {
			replayed++
		}
	}
	call.ended(t)
	require.NoError(t, <-sent)
	require.Equal(t, len(orders), replayed)
	require.Equal(t, n, g.status(t).Backlog)
}
