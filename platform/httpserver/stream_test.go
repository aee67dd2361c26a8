package httpserver_test

import (
	"bytes"
	"crypto/tls"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"sluice/platform/httpserver"
)

// A client of HTTP/2 that asks and grants no window for the answer is cut off
// from it, be it short, long or flushed, and other streams go on.
func TestAStreamThatTakesNothingIsReset(t *testing.T) {
	cert, key, roots := keyPair(t)
	cfg := httpserver.DefaultConfig()
	cfg.TLSCert, cfg.TLSKey, cfg.WriteTimeout = cert, key, short
	mux := http.NewServeMux()
	ended := make(chan struct{}, 3)
	mux.HandleFunc("GET /short", func(w http.ResponseWriter, _ *http.Request) {
		defer func() { ended <- struct{}{} }()
		_, _ = io.WriteString(w, "x") // what becomes of it is the test
	})
	mux.HandleFunc("GET /long", func(w http.ResponseWriter, _ *http.Request) {
		defer func() { ended <- struct{}{} }()
		_, _ = w.Write(make([]byte, 1<<20)) // likewise
	})
	mux.HandleFunc("GET /flushed", func(w http.ResponseWriter, _ *http.Request) {
		defer func() { ended <- struct{}{} }()
		_, _ = io.WriteString(w, "x") // likewise
		_ = http.NewResponseController(w).Flush()
	})
	server := serve(t, cfg, httpserver.Handler(mux, quiet()))

	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: patience}, "tcp", server.Addr(), &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12, NextProtos: []string{"h2"}})
	require.NoError(t, err)
	defer func() { require.NoError(t, conn.Close()) }()
	require.NoError(t, conn.SetDeadline(time.Now().Add(patience)))
	_, err = io.WriteString(conn, http2.ClientPreface)
	require.NoError(t, err)
	framer := http2.NewFramer(conn, conn)
	require.NoError(t, framer.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}))
	var header bytes.Buffer
	encoder := hpack.NewEncoder(&header)
	for i, path := range []string{"/short", "/long", "/flushed"} {
		header.Reset()
		for _, field := range [][2]string{{":method", "GET"}, {":scheme", "https"}, {":authority", "x"}, {":path", path}} {
			require.NoError(t, encoder.WriteField(hpack.HeaderField{Name: field[0], Value: field[1]}))
		}
		require.NoError(t, framer.WriteHeaders(http2.HeadersFrameParam{StreamID: uint32(2*i + 1), BlockFragment: header.Bytes(), EndStream: true, EndHeaders: true}))
	}
	for reset := map[uint32]bool{}; len(reset) < 3; {
		frame, err := framer.ReadFrame()
		require.NoError(t, err)
		if end, ok := frame.(*http2.RSTStreamFrame); ok {
			reset[end.StreamID] = true
		}
	}
	for range 3 {
		<-ended
	}
	client := newClientTrusting(t, roots)
	require.Equal(t, http.StatusOK, do(t, client, "GET", "https://"+server.Addr()+"/short", nil).StatusCode)
}

// The time counts while something is written, not while a handler waits, and
// not for an answer as a whole.
func TestAStreamMayLastLongerThanTheWriteTimeout(t *testing.T) {
	cfg := httpserver.DefaultConfig()
	cfg.WriteTimeout = 5 * short
	client, server := serveTLS(t, cfg, route("GET /", func(w http.ResponseWriter, _ *http.Request) {
		for _, part := range []string{"a", "b"} {
			_, _ = io.WriteString(w, part) // the client reads
			_ = http.NewResponseController(w).Flush()
			<-time.After(7 * short)
		}
		_, _ = io.WriteString(w, strings.Repeat("c", 1<<20))
	}))
	got := do(t, client, "GET", "https://"+server.Addr(), nil)
	require.Equal(t, 2, got.ProtoMajor)
	require.Equal(t, "ab"+strings.Repeat("c", 1<<20), got.body)
}
