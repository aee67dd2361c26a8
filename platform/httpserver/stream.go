package httpserver

import (
	"net/http"
	"time"
)

// streamWriter is limitedConn for one stream of HTTP/2. A client can read from
// the connection and yet take nothing of an answer, by granting it no window;
// the stream is reset then, and others go on.
type streamWriter struct {
	http.ResponseWriter
	control *http.ResponseController
	timeout time.Duration
}

func newStreamWriter(w http.ResponseWriter, timeout time.Duration) *streamWriter {
	return &streamWriter{ResponseWriter: w, control: http.NewResponseController(w), timeout: timeout}
}

// Unwrap is for http.ResponseController.
func (w *streamWriter) Unwrap() http.ResponseWriter { return w.ResponseWriter }

func (w *streamWriter) Write(p []byte) (n int, err error) {
	defer w.disarm()
	for {
		w.arm()
		m, err := w.ResponseWriter.Write(p[n:min(len(p), n+writePiece)])
		n += m
		if err != nil || n == len(p) {
			return n, err
		}
	}
}

// FlushError is for http.ResponseController.
func (w *streamWriter) FlushError() error {
	w.arm()
	defer w.disarm()
	return w.control.Flush()
}

// Flush is for handlers and libraries that ask for an http.Flusher.
func (w *streamWriter) Flush() { _ = w.FlushError() } // Flusher has no error

// arm gives the client its time from now on. It fails only where there are no
// deadlines, which is not in HTTP/2.
func (w *streamWriter) arm() { _ = w.control.SetWriteDeadline(time.Now().Add(w.timeout)) }

// disarm leaves a handler that waits for something all the time it wants: in
// HTTP/2 a deadline resets the stream whether something is being written or not.
func (w *streamWriter) disarm() { _ = w.control.SetWriteDeadline(time.Time{}) }
