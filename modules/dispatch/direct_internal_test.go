package dispatch

import (
	"net"
	"net/http"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"
)

// Time is what this is about, and a real connection has none that can be turned.
func TestIdleConnectionsExpire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &direct{others: &http.Transport{}, most: 2}
		var connections []*connection
		for range 3 {
			conn, other := net.Pipe()
			t.Cleanup(func() { _ = other.Close() })
			connections = append(connections, &connection{conn: conn})
		}
		isCut := func(i int) bool { return connections[i].conn.SetDeadline(time.Time{}) != nil }

		d.keep(connections[0])
		<-time.After(idleTimeout / 2)
		d.keep(connections[1])
		d.keep(connections[2])
		require.True(t, isCut(2), "no more are kept than may be")
		<-time.After(idleTimeout/2 - 1)
		require.False(t, isCut(0))
		<-time.After(1)
		synctest.Wait()
		require.True(t, isCut(0), "after the time limit")
		require.False(t, isCut(1))
		<-time.After(idleTimeout / 2)
		synctest.Wait()
		require.True(t, isCut(1))
		require.Nil(t, d.take())
		require.Nil(t, d.expiry, "nothing is left to wait for")

		d.CloseIdleConnections()
	})
}
