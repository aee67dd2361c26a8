package intake

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"iter"
	"log/slog"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"

	"sluice/platform/httpserver"
)

// A batch is one request with any number of orders, which takes a bounded piece
// of memory: so much of it is read as can be answered, and a client that does
// not read its answers has nothing more read of it.
const (
	// maxBatches is how many batches may be under way at once.
	maxBatches = 128
	// batchWindow bounds what of one batch has been read and is not answered:
	// the bytes of the lines and of the problems in their answers.
	batchWindow = 512 << 10
	// lineCost is what a line takes of the window beside that. It bounds their
	// number, to a group of the writer: a single order has to wait for no more.
	lineCost = batchWindow / groupSize
	// answerBuffer is how much of the answer goes out at once.
	answerBuffer = 16 << 10
)

// batch is a request under way. One goroutine reads lines and submits orders,
// another one waits for them in turn and writes the answers.
type batch struct {
	m       *Module
	stream  *httpserver.Duplex
	lines   lines
	outline order           // of every order: they are of one trace
	path    string          // the instance of problems
	pacing  context.Context // ends when the server drains: what waits for the rate limit waits no more

	window    *semaphore.Weighted
	taken     chan line   // read and not answered, in their order
	abandoned atomic.Bool // nobody reads the answers
	failing   bool        // the store has failed the last line
}

// line is a line that has been read. It has either a change, which was
// submitted, or a text, which is its answer.
type line struct {
	number    int
	change    *change
	submitted submission
	err       error // of looking for what it repeats, or of submitting it
	place     bool  // it has a place in the backlog
	text      []byte
	cost      int64 // of the window
	held      room  // for a line that is long
}

// postBatch is POST /orders/batch.
func (m *Module) postBatch(w http.ResponseWriter, r *http.Request) {
	if got := r.Header.Get("Content-Type"); !isMediaType(got, "application/x-ndjson") {
		httpserver.WriteProblem(w, r, problemBatchMediaType(got))
		return
	}
	if len(r.Header.Values("Idempotency-Key")) > 0 {
		httpserver.WriteProblem(w, r, problemHeader("Idempotency-Key", errors.New("a batch has none: its orders are told apart by their numbers")))
		return
	}
	if !m.batches.TryAcquire(1) {
		m.refuse(w, r, problemBatchLimit())
		return
	}
	defer m.batches.Release(1)
	stream, err := httpserver.NewDuplex(w, r)
	if err != nil {
		m.logger.ErrorContext(r.Context(), "cannot take a batch", "error", err)
		httpserver.WriteProblem(w, r, httpserver.Problem{Type: "internal-error", Title: "Internal error"})
		return
	}
	defer stream.Close()

	b := newBatch(m, r, stream)
	// Until something has come the answer is one like all others.
	if _, err := b.lines.in.Peek(1); err != nil && !errors.Is(err, io.EOF) {
		m.refuse(w, r, problemBroken(err))
		return
	}
	w.Header().Set("Content-Type", "application/x-ndjson")
	w.Header().Set("Cache-Control", "no-store")
	httpserver.DescribeRate(w, r)
	w.WriteHeader(http.StatusOK)
	// When a client that has sent everything closes its side, the context of
	// the request ends, and the client is still there.
	ctx := context.WithoutCancel(r.Context())
	pacing, cancel := context.WithCancel(ctx)
	defer cancel()
	b.pacing = pacing
	b.run(ctx, cancel, httpserver.Draining(r.Context()))
}

func newBatch(m *Module, r *http.Request, stream *httpserver.Duplex) *batch {
	b := &batch{
		m: m, stream: stream, outline: m.outline(r, "application/json"), path: r.URL.EscapedPath(),
		window: semaphore.NewWeighted(batchWindow), taken: make(chan line, batchWindow/lineCost),
	}
	b.lines = lines{
		in: bufio.NewReaderSize(stream, lineBuffer), limit: int(m.cfg.MaxBody),
		// Each line has the time that the body of a single order has.
		begin: stream.Progress, skip: stream.Progress,
	}
	return b
}

func (b *batch) run(ctx context.Context, hurry context.CancelFunc, draining <-chan struct{}) {
	var answering sync.WaitGroup
	defer answering.Wait()
	defer close(b.taken)
	ended := make(chan struct{})
	defer close(ended)
	answering.Go(func() {
		select {
		case <-draining:
			hurry()
		case <-ended:
		}
	})
	answering.Go(func() { b.answer(ctx) })
	b.read(ctx)
}

// read takes lines until there are no more, or the stream breaks off.
func (b *batch) read(ctx context.Context) {
	held := room{bodies: b.m.bodies} // of the line in hand
	defer func() { held.release() }()
	b.lines.grow = func() error {
		held.release() // of a line before it that was blank
		err := held.take(ctx, int64(b.m.cfg.MaxBody))
		b.stream.Progress() // that was our time
		if err != nil {
			return errNoRoom
		}
		return nil
	}
	for more := true; more && !b.abandoned.Load(); {
		text, err := b.lines.next()
		if errors.Is(err, io.EOF) {
			return
		}
		held.shrink(int64(len(text)))
		if err == nil {
			err = b.pace()
		}
		l := line{number: b.lines.number}
		switch {
		case err == nil:
			b.accept(ctx, &l, text)
		case errors.Is(err, errLineTooLong):
			l.text = b.refusal(l.number, problemTooLarge(b.m.cfg.MaxBody))
		case errors.Is(err, errNoRoom):
			l.text = b.refusal(l.number, problemOverloaded())
		default:
			l.text = b.refusal(l.number, problemBroken(err))
			more = false
		}
		l.held, held = held, room{bodies: b.m.bodies}
		b.pass(ctx, l)
	}
}

// pace waits until the client may send another order.
func (b *batch) pace() error {
	if httpserver.WaitRate(b.pacing, 1) != nil {
		return httpserver.ErrDraining
	}
	b.stream.Progress() // that was our time
	return nil
}

// accept makes an order of the text that is to be submitted, or refuses it.
func (b *batch) accept(ctx context.Context, l *line, text []byte) {
	if !b.lines.kept {
		text = bytes.Clone(text)
	}
	o, problem := b.m.build(ctx, b.outline, text)
	if problem != nil {
		// In a document of one line that line's number says nothing.
		problem.Detail = strings.TrimPrefix(problem.Detail, "line 1, ")
		l.text = b.refusal(l.number, *problem)
		return
	}
	if l.place = b.enter(ctx); !l.place {
		var repeats bool
		if repeats, l.err = b.m.repeats(ctx, o); l.err == nil && !repeats {
			l.text = b.refusal(l.number, problemBacklogFull(b.m.cfg.MaxBacklog))
			return
		}
	}
	o.PublishAt = o.AcceptedAt
	l.change = &change{insert: o}
}

// enter keeps a place in the backlog for an order. Near its limit, lines are
// waited for that may turn out to need none.
func (b *batch) enter(ctx context.Context) bool {
	if b.m.backlog.enter(1) {
		return true
	}
	if b.window.Acquire(ctx, batchWindow) == nil { // ctx does not end
		b.window.Release(batchWindow)
	}
	return b.m.backlog.enter(1)
}

// pass waits for room in the window, submits the order if there is one, and
// hands the line over to be answered.
func (b *batch) pass(ctx context.Context, l line) {
	size := len(l.text)
	if l.change != nil {
		size = l.change.insert.Size
	}
	l.cost = min(int64(lineCost+size), batchWindow)
	_ = b.window.Acquire(ctx, l.cost) // ctx does not end
	if l.change != nil && l.err == nil {
		l.submitted, l.err = b.m.writer.submit(ctx, l.change)
	}
	b.taken <- l // has place for all that the window has
}

// answer writes the answers in turn, each when what it says is durable.
func (b *batch) answer(ctx context.Context) {
	out := answers{stream: b.stream, text: bufio.NewWriterSize(b.stream, answerBuffer), unsent: true} // the header
	var text []byte
	for l := range b.upcoming(&out) {
		text = append(text[:0], l.text...)
		if l.change != nil {
			text = b.outcome(ctx, text, l, &out)
		}
		if l.place {
			b.m.backlog.leave(1)
		}
		l.held.release()
		if err := out.write(text); err != nil {
			b.abandon()
		}
		b.window.Release(l.cost)
	}
	if err := out.flush(); err != nil {
		b.abandon()
	}
}

// upcoming returns the lines to be answered. Before it has to wait for one it
// sends the answers that there are.
func (b *batch) upcoming(out *answers) iter.Seq[line] {
	return func(yield func(line) bool) {
		for {
			if len(b.taken) == 0 {
				if err := out.flush(); err != nil {
					b.abandon()
				}
			}
			l, ok := <-b.taken
			if !ok || !yield(l) {
				return
			}
		}
	}
}

// abandon ends the reading when the answers reach nobody. What has been
// submitted is stored all the same.
func (b *batch) abandon() {
	b.abandoned.Store(true)
	b.stream.Stop()
}

// outcome waits for the commit of a line's order and appends the answer.
func (b *batch) outcome(ctx context.Context, text []byte, l line, out *answers) []byte {
	err := l.err
	if err == nil {
		if !l.submitted.Ready() && out.flush() != nil {
			b.abandon()
		}
		err = l.submitted.Wait(ctx)
	}
	if b.failed(ctx, err) {
		return append(text, b.refusal(l.number, problemStorage(err))...)
	}
	c := l.change
	o, repeated := c.insert, false
	if !c.changed {
		if c.found.Hash != o.Hash {
			return append(text, b.refusal(l.number, problemDuplicate(c.found))...)
		}
		o, repeated = c.found, true
	} else if b.m.logger.Enabled(ctx, slog.LevelDebug) {
		b.m.logger.Debug("order accepted", "order_id", o.ID, "trace_id", o.traceID())
	}
	text = appendAnswer(text, l.number, http.StatusAccepted)
	text = append(text, `,"id":"`...)
	text = append(text, o.ID.String()...)
	text = append(text, `","location":"`...)
	text = append(text, location(o)...)
	text = append(text, '"')
	if repeated {
		text = append(text, `,"replayed":true`...)
	}
	return append(text, "}\n"...)
}

// failed reports whether there is an error, and logs the first one in a row.
func (b *batch) failed(ctx context.Context, err error) bool {
	if err != nil && !b.failing {
		b.m.logger.ErrorContext(ctx, "the store failed lines of a batch", "operation", "store an order", "error", err)
	}
	b.failing = err != nil
	return b.failing
}

// refusal returns the answer to a line that was not accepted.
func (b *batch) refusal(number int, p httpserver.Problem) []byte {
	p.Instance = b.path
	text := appendAnswer(nil, number, p.Status)
	if p.Status == http.StatusServiceUnavailable {
		text = append(text, `,"retryAfter":`...)
		text = strconv.AppendInt(text, seconds(b.m.outlook.patience(time.Now())), 10)
	}
	text = append(text, `,"problem":`...)
	text = append(text, p.JSON()...)
	return append(text, "}\n"...)
}

func appendAnswer(text []byte, number, status int) []byte {
	text = append(text, `{"line":`...)
	text = strconv.AppendInt(text, int64(number), 10)
	text = append(text, `,"status":`...)
	return strconv.AppendInt(text, int64(status), 10)
}

// problemBroken says why no more of a batch is read.
func problemBroken(err error) httpserver.Problem {
	if errors.Is(err, httpserver.ErrDraining) {
		return problemUnfinished()
	}
	p, _ := httpserver.ReadProblem(err) // knows all but io.EOF
	p.Detail = strings.TrimSuffix(p.Detail, ".") + "; this line and those after it were not taken."
	return p
}

// answers is the answer as far as it has not been sent.
type answers struct {
	stream *httpserver.Duplex
	text   *bufio.Writer
	unsent bool
}

func (a *answers) write(text []byte) error {
	a.unsent = true
	_, err := a.text.Write(text)
	return err
}

func (a *answers) flush() error {
	if !a.unsent {
		return nil
	}
	a.unsent = false
	return errors.Join(a.text.Flush(), a.stream.Flush())
}
