package intake

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"time"

	"golang.org/x/sync/semaphore"

	"sluice/platform/httpserver"
)

// Bodies come from strangers, so their memory is bounded, however many
// connections there are and however slowly they send. Nearly all orders are
// small and pass through without waiting for anything: somebody who holds up
// all the room there is for large bodies holds up large bodies, and nobody
// else.
const (
	// smallBody is as much of a body as is read, decoded and checked without
	// asking for room. Every connection may take so much, so it is to be of the
	// size of what a connection costs anyway.
	smallBody = 8 << 10
	// maxBodies bounds the bytes of larger bodies, from the first byte until
	// the order is stored.
	maxBodies = 256 << 20
	// bodyPatience is how long a larger body waits for room.
	bodyPatience = 5 * time.Second
	// maxChecks is how many larger bodies are decoded and checked at once: of
	// one MiB, a nasty one takes a second and 300 MiB.
	maxChecks = 2
)

// room is one request's part of maxBodies, nothing at first.
type room struct {
	bodies *semaphore.Weighted
	size   int64
}

// take waits for more room, for a while.
func (r *room) take(ctx context.Context, size int64) error {
	ctx, cancel := context.WithTimeout(ctx, bodyPatience)
	defer cancel()
	if err := r.bodies.Acquire(ctx, size); err != nil {
		return err
	}
	r.size += size
	return nil
}

// shrink gives back what is beyond size.
func (r *room) shrink(size int64) {
	if size < r.size {
		r.bodies.Release(r.size - size)
		r.size = size
	}
}

// release gives the room back. It may be called more than once.
func (r *room) release() {
	if r.size == 0 {
		return
	}
	r.bodies.Release(r.size)
	r.size = 0
}

// readBody reads the whole body; what is beyond smallBody takes room, which
// the caller releases. When it returns false, the request has been answered.
func (m *Module) readBody(w http.ResponseWriter, r *http.Request, held *room) ([]byte, bool) {
	limit := int64(m.cfg.MaxBody)
	if r.ContentLength > limit {
		httpserver.WriteProblem(w, r, problemTooLarge(m.cfg.MaxBody))
		return nil, false
	}
	size := limit
	if r.ContentLength >= 0 {
		size = r.ContentLength
	}
	source := http.MaxBytesReader(w, r.Body, limit)
	body, err := readAll(io.LimitReader(source, smallBody), min(r.ContentLength, smallBody))
	if err == nil && len(body) == smallBody && size >= smallBody {
		if err := held.take(r.Context(), size); err != nil {
			m.refuse(w, r, problemOverloaded())
			return nil, false
		}
		body, err = readAll(io.MultiReader(bytes.NewReader(body), source), r.ContentLength)
	}
	if err == nil {
		return body, true
	}
	var tooLarge *http.MaxBytesError
	problem, known := httpserver.ReadProblem(err)
	switch {
	case errors.As(err, &tooLarge):
		problem = problemTooLarge(m.cfg.MaxBody)
	case !known:
		problem = problemMalformed(err)
	}
	httpserver.WriteProblem(w, r, problem)
	return nil, false
}

// readAll is io.ReadAll with a buffer of the right size where that is known.
func readAll(r io.Reader, size int64) ([]byte, error) {
	if size < 0 {
		return io.ReadAll(r)
	}
	body := make([]byte, size)
	n, err := io.ReadFull(r, body)
	return body[:n], err
}

// check decodes the body and holds it against the schema.
func (m *Module) check(ctx context.Context, body []byte) (document, *httpserver.Problem) {
	refused := func(p httpserver.Problem) (document, *httpserver.Problem) { return document{}, &p }
	if len(body) > smallBody {
		if err := m.checks.Acquire(ctx, 1); err != nil {
			return refused(problemOverloaded()) // the client has left
		}
		defer m.checks.Release(1)
	}
	doc, err := decodeDocument(body)
	if err != nil {
		return refused(problemMalformed(err))
	}
	if faults := m.schema.validate(doc.value); len(faults) > 0 {
		return refused(problemInvalid(faults))
	}
	return doc, nil
}
