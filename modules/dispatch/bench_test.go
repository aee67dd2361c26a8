package dispatch_test

import (
	"bufio"
	"bytes"
	"net"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/stretchr/testify/require"

	"sluice/modules/contract"
	"sluice/modules/dispatch"
)

// BenchmarkAttempt is one attempt after the other, at 64 orders at a time, by
// the client that small orders take and the one that large ones take. The other
// side costs next to nothing: what is measured is the client, and the kernel.
func BenchmarkAttempt(b *testing.B) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(b, err)
	var servers sync.WaitGroup
	servers.Go(func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			servers.Go(func() { answerAll(conn) })
		}
	})
	for _, size := range []int{500, 17 << 10} {
		b.Run(strconv.Itoa(size)+" bytes", func(b *testing.B) {
			client, err := dispatch.NewClient(dispatch.BackendConfig{URL: "http://" + listener.Addr().String(), Timeout: patience}, dispatch.DefaultConfig(), quietDeps())
			require.NoError(b, err)
			defer client.Close()
			order := newOrder()
			order.Body = []byte(`"` + strings.Repeat("x", size-2) + `"`)
			b.SetParallelism(32)
			b.ReportAllocs()
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if outcome, err := client.Attempt(b.Context(), order); err != nil || outcome.Type != contract.TypeSaved {
						b.Error(outcome.Error, err)
					}
				}
			})
		})
	}
	require.NoError(b, listener.Close())
	servers.Wait()
}

// answerAll answers every request on a connection, until its end.
func answerAll(conn net.Conn) {
	defer func() { _ = conn.Close() }()
	answer := []byte("HTTP/1.1 201 Created\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n{\"saved\": true }")
	reader := bufio.NewReaderSize(conn, 32<<10)
	for {
		length := 0
		for {
			line, err := reader.ReadSlice('\n')
			if err != nil {
				return
			}
			if value, ok := bytes.CutPrefix(line, []byte("Content-Length: ")); ok {
				length, _ = strconv.Atoi(string(bytes.TrimSpace(value)))
			}
			if len(line) == 2 {
				break
			}
		}
		if _, err := reader.Discard(length); err != nil {
			return
		}
		if _, err := conn.Write(answer); err != nil {
			return
		}
	}
}
