package pubsub

import (
	"bytes"
	"io"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// pipedConn is a connection to a peer that has what was written only when it
// reads.
func pipedConn(t *testing.T) (*amqpConn, net.Conn) {
	t.Helper()
	near, peer := net.Pipe()
	c := newAMQPConn(near, &amqpLink{lost: make(chan struct{})})
	t.Cleanup(func() {
		c.cut()
		require.NoError(t, peer.Close())
		c.wait()
	})
	return c, peer
}

func TestAMQPConnWritesTogetherWhatComesDuringAWrite(t *testing.T) {
	c, peer := pipedConn(t)
	var want []byte
	for i := range 100 {
		frame := bytes.Repeat([]byte{byte(i)}, 10)
		want = append(want, frame...)
		n, err := c.Write(frame) // nobody reads yet, and nobody waits for that
		require.NoError(t, err)
		require.Equal(t, len(frame), n)
	}
	var got []byte
	writes := 0
	for buffer := make([]byte, 2*len(want)); len(got) < len(want); writes++ {
		n, err := peer.Read(buffer) // of a pipe: one write
		require.NoError(t, err)
		got = append(got, buffer[:n]...)
	}
	require.Equal(t, want, got)
	require.LessOrEqual(t, writes, 2)
}

func TestAMQPConnHoldsUpWhoWritesMoreThanThePeerReads(t *testing.T) {
	c, _ := pipedConn(t)
	var writers sync.WaitGroup
	for range 8 {
		writers.Go(func() {
			for {
				if _, err := c.Write(make([]byte, mostUnwritten/4)); err != nil {
					require.ErrorIs(t, err, errLinkLost)
					require.True(t, isClosed(c.link.lost), "the link must know first")
					return
				}
				c.mu.Lock()
				require.Less(t, len(c.unwritten), 2*mostUnwritten)
				c.mu.Unlock()
			}
		})
	}
	require.Eventually(t, func() bool {
		c.mu.Lock()
		defer c.mu.Unlock()
		return len(c.unwritten) >= mostUnwritten
	}, 20*time.Second, time.Millisecond)
	c.cut()
	writers.Wait()
}

func TestAMQPConnLetsTheLibraryGoWhenItsFarewellIsWritten(t *testing.T) {
	c, peer := pipedConn(t)
	returned := make(chan struct{})
	go func() {
		defer close(returned)
		_, _ = c.Write([]byte("frames"))
		_, _ = c.Write(closeOK)
	}()
	got := make([]byte, len("frames")+len(closeOK))
	_, err := io.ReadFull(peer, got[:len(got)-1])
	require.NoError(t, err)
	<-c.link.lost // by then Write has been called
	require.False(t, isClosed(returned))
	_, err = io.ReadFull(peer, got[len(got)-1:])
	require.NoError(t, err)
	<-returned
	require.Equal(t, append([]byte("frames"), closeOK...), got)
}

// BenchmarkAMQPConn writes frames of an ack or a small message from many
// goroutines: each by itself, and collected.
func BenchmarkAMQPConn(b *testing.B) {
	frame := make([]byte, 300)
	for name, wrap := range map[string]func(net.Conn) io.Writer{
		"one by one": func(c net.Conn) io.Writer { return c },
		"collected": func(c net.Conn) io.Writer {
			return newAMQPConn(c, &amqpLink{lost: make(chan struct{})})
		},
	} {
		b.Run(name, func(b *testing.B) {
			listener, err := net.Listen("tcp", "127.0.0.1:0")
			require.NoError(b, err)
			near, err := net.Dial("tcp", listener.Addr().String())
			require.NoError(b, err)
			peer, err := listener.Accept()
			require.NoError(b, err)
			var reading sync.WaitGroup
			reading.Go(func() { _, _ = io.CopyN(io.Discard, peer, int64(b.N*len(frame))) })
			w := wrap(near)
			b.ReportAllocs()
			b.SetParallelism(32)
			b.RunParallel(func(pb *testing.PB) {
				for pb.Next() {
					if _, err := w.Write(frame); err != nil {
						b.Error(err)
					}
				}
			})
			reading.Wait()
			for _, c := range []io.Closer{near, peer, listener} {
				require.NoError(b, c.Close())
			}
		})
	}
}
