package intake

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/url"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
	"sluice/modules/contract"
	"sluice/platform/database"
)

// tcpProxy stands between a store and its server, and is the network that
// fails.
type tcpProxy struct {
	target   string
	listener net.Listener
	running  sync.WaitGroup

	mu      sync.Mutex
	conns   map[net.Conn]bool
	away    bool // new connections are cut at once
	deaf    bool // the next answer is not handed on: all connections are cut instead
	mute    bool // the same with what is sent next
	stalled bool // nothing is handed on any more
}

// throughProxy returns the DSN of the same database through a proxy.
func throughProxy(t *testing.T, dsn string) (*tcpProxy, string) {
	t.Helper()
	u, err := url.Parse(dsn)
	require.NoError(t, err)
	p := &tcpProxy{target: u.Host, conns: map[net.Conn]bool{}}
	p.listener, err = net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	p.running.Go(p.accept)
	t.Cleanup(func() {
		_ = p.listener.Close()
		p.cut()
		p.running.Wait()
	})
	u.Host = p.listener.Addr().String()
	return p, u.String()
}

func (p *tcpProxy) accept() {
	for {
		client, err := p.listener.Accept()
		if err != nil {
			return
		}
		server, err := net.Dial("tcp", p.target)
		if err != nil {
			_ = client.Close()
			continue
		}
		p.mu.Lock()
		away := p.away
		p.conns[client], p.conns[server] = true, true
		p.mu.Unlock()
		if away {
			p.cut()
		}
		p.running.Go(func() { p.copy(server, client, false) })
		p.running.Go(func() { p.copy(client, server, true) })
	}
}

func (p *tcpProxy) copy(to, from net.Conn, answers bool) {
	defer func() {
		_ = to.Close()
		_ = from.Close()
	}()
	buffer := make([]byte, 1<<16)
	for {
		n, err := from.Read(buffer)
		if err != nil {
			return
		}
		p.mu.Lock()
		swallow, stalled := answers && p.deaf || !answers && p.mute, p.stalled
		p.mu.Unlock()
		switch {
		case stalled:
			continue
		case swallow:
			p.cut()
			return
		}
		if _, err := to.Write(buffer[:n]); err != nil {
			return
		}
	}
}

// cut ends all connections.
func (p *tcpProxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for conn := range p.conns {
		_ = conn.Close()
	}
	clear(p.conns)
	p.deaf, p.mute = false, false
}

func (p *tcpProxy) set(change func(*tcpProxy)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	change(p)
}

func TestPostgresGoesOnWhenTheNetworkIsBack(t *testing.T) {
	dsn := services.Postgres(t)
	proxy, through := throughProxy(t, dsn)
	s := openPostgres(t, through)
	defer func() { require.NoError(t, s.close()) }()
	o := testOrder("A")
	insertOrders(t, s, o)

	// A cut that is over when it is noticed: nobody hears of it.
	proxy.cut()
	insertOrders(t, s, testOrder("B"))
	_, err := s.get(t.Context(), o.ID)
	require.NoError(t, err)

	proxy.set(func(p *tcpProxy) { p.away = true })
	proxy.cut()
	began := time.Now()
	for name, call := range map[string]func() error{
		"write": func() error { return s.write(t.Context(), []*change{{insert: testOrder("C")}}) },
		"get":   func() error { _, err := s.get(t.Context(), o.ID); return err },
		"list":  func() error { _, err := s.list(t.Context(), query{limit: 1}); return err },
		"claim": func() error { _, err := s.claim(t.Context(), now(), now(), 1, 1, skipNone); return err },
		"ping":  func() error { return s.ping(t.Context()) },
		"purge": func() error { _, err := s.purge(t.Context(), now(), 1); return err },
	} {
		err := call()
		require.Error(t, err, name)
		require.NotErrorIs(t, err, errNotFound, name)
	}
	require.Less(t, time.Since(began), 5*time.Second)
	require.Equal(t, int64(2), s.counts()[contract.StatusAccepted], "as it was")

	proxy.set(func(p *tcpProxy) { p.away = false })
	soon(t, func() bool { return s.ping(t.Context()) == nil })
	insertOrders(t, s, testOrder("C"))
	requireTrueCounts(t, dsn, s)
}

// The connection is lost with the answer to a commit, or with the commit itself: the server is asked which of the two it
// was, and then nobody has to know.
func TestPostgresFindsOutWhetherItCommitted(t *testing.T) {
	for name, lose := range map[string]func(*tcpProxy){
		"it did":     func(p *tcpProxy) { p.deaf = true },
		"it did not": func(p *tcpProxy) { p.mute = true },
	} {
		t.Run(name, func(t *testing.T) {
			dsn := services.Postgres(t)
			proxy, through := throughProxy(t, dsn)
			s := openPostgres(t, through)
			defer func() { require.NoError(t, s.close()) }()
			first, second, free := testOrder("A"), testOrder("B"), testOrder("")
			insertOrders(t, s, first, second)
			// The statements are prepared by now, so what is said next after
			// the update's function is the commit.
			update(t, s, first.ID, finishAs(contract.StatusSaved))
			updates := 0
			insert, updated := &change{insert: free}, &change{id: second.ID, update: func(o *order) verdict {
				if updates++; updates == 1 {
					proxy.set(lose)
				}
				return finishAs(contract.StatusSaved)(o)
			}}
			require.NoError(t, s.write(t.Context(), []*change{insert, updated}))
			require.True(t, insert.changed)
			require.True(t, updated.changed)
			require.Equal(t, contract.StatusSaved, updated.found.Status)
			for id, status := range map[uuid.UUID]contract.Status{free.ID: contract.StatusAccepted, second.ID: contract.StatusSaved} {
				o, err := s.get(t.Context(), id)
				require.NoError(t, err)
				require.Equal(t, status, o.Status)
			}
			requireTrueCounts(t, dsn, s)
		})
	}
}

// A server that crashed has lost the transaction, and given its number to another one, which was committed.
func TestPostgresTrustsNoNumberOfATransaction(t *testing.T) {
	dsn := services.Postgres(t)
	s := openPostgres(t, dsn)
	defer func() { require.NoError(t, s.close()) }()
	there, lost := testOrder("A"), testOrder("B")
	insertOrders(t, s, there)
	committed := uint64(askPostgres[int64](t, dsn, `SELECT pg_current_xact_id()::text::bigint`))
	for o, want := range map[*order]bool{there: true, lost: false} {
		got, err := s.fate(t.Context(), committed, []*change{{insert: o, changed: true}})
		require.NoError(t, err)
		require.Equal(t, want, got, o.Number)
	}
	_, err := s.fate(t.Context(), committed, []*change{{id: there.ID}, {insert: lost}})
	require.Error(t, err, "nothing that it inserted")
}

// The commit happens, its answer is lost, and then the server cannot be asked: the error says that nobody knows, and
// whoever repeats the change later finds it.
func TestPostgresSaysWhenACommitIsUncertain(t *testing.T) {
	dsn := services.Postgres(t)
	proxy, through := throughProxy(t, dsn)
	s := openPostgres(t, through)
	defer func() { require.NoError(t, s.close()) }()
	first, second, lost := testOrder("A"), testOrder("B"), testOrder("C")
	insertOrders(t, s, first, second)
	update(t, s, first.ID, finishAs(contract.StatusSaved))
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	err := s.write(ctx, []*change{{insert: lost}, {id: second.ID, update: func(o *order) verdict {
		proxy.set(func(p *tcpProxy) { p.deaf, p.away = true, true })
		return finishAs(contract.StatusSaved)(o)
	}}})
	require.ErrorIs(t, err, database.ErrUncertain)

	proxy.set(func(p *tcpProxy) { p.away = false })
	soon(t, func() bool { return s.ping(t.Context()) == nil })
	repeat := &change{insert: testOrder("C")}
	writeAll(t, s, repeat)
	require.Equal(t, lost.ID, repeat.found.ID)
	o, err := s.get(t.Context(), second.ID)
	require.NoError(t, err)
	require.Equal(t, contract.StatusSaved, o.Status)
	requireTrueCounts(t, dsn, s)
}

// The connection is lost before the commit: nothing has happened, so it is done
// on another one.
func TestPostgresRepeatsWhatWasNotCommitted(t *testing.T) {
	dsn := services.Postgres(t)
	s := openPostgres(t, dsn)
	defer func() { require.NoError(t, s.close()) }()
	o := testOrder("A")
	insertOrders(t, s, o)
	update(t, s, o.ID, func(*order) verdict { return save })
	tries := 0
	c := &change{id: o.ID, update: func(o *order) verdict {
		if tries++; tries == 1 {
			terminatePostgres(t, dsn)
		}
		return finishAs(contract.StatusSaved)(o)
	}}
	writeAll(t, s, c)
	require.Equal(t, 2, tries)
	got, err := s.get(t.Context(), o.ID)
	require.NoError(t, err)
	require.Equal(t, contract.StatusSaved, got.Status)
	requireTrueCounts(t, dsn, s)
}

// terminatePostgres ends all connections of the store, like a restart of the
// server does.
func terminatePostgres(t testing.TB, dsn string) {
	t.Helper()
	askPostgres[int64](t, dsn, `SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity
		WHERE datname = current_database() AND application_name = 'sluice'`)
}

func TestPostgresKeepsWhatItConfirmedWhileConnectionsAreTerminated(t *testing.T) {
	dsn := services.Postgres(t)
	s := openPostgres(t, dsn)
	defer func() { require.NoError(t, s.close()) }()
	var writers sync.WaitGroup
	var confirmed sync.Map
	var failed, stop atomic.Int64
	for w := range 4 {
		writers.Go(func() {
			for i := 0; stop.Load() == 0; i++ {
				o := testOrder(fmt.Sprintf("%d-%d", w, i))
				c := &change{insert: o}
				switch err := s.write(context.Background(), []*change{c}); {
				case err == nil && c.changed:
					confirmed.Store(o.ID, true)
				case err == nil:
					t.Errorf("order %s found %s", o.ID, c.found.ID)
				case errors.Is(err, database.ErrUncertain):
					failed.Add(1)
				default:
					t.Error(err)
				}
			}
		})
	}
	for range 20 {
		wait(t.Context(), 25*time.Millisecond, nil)
		terminatePostgres(t, dsn)
	}
	stop.Store(1)
	writers.Wait()
	n := 0
	confirmed.Range(func(id, _ any) bool {
		n++
		_, err := s.get(t.Context(), id.(uuid.UUID))
		require.NoError(t, err)
		return true
	})
	t.Log("confirmed", n, "uncertain", failed.Load())
	require.NotZero(t, n)
	requireTrueCounts(t, dsn, s)
}

// A network that swallows everything: calls end with their context.
func TestPostgresDoesNotOutstayAContext(t *testing.T) {
	proxy, through := throughProxy(t, services.Postgres(t))
	s := openPostgres(t, through)
	defer func() { require.NoError(t, s.close()) }()
	insertOrders(t, s, testOrder("A"))
	proxy.set(func(p *tcpProxy) { p.stalled = true })
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	began := time.Now()
	_, err := s.get(ctx, uuid.New())
	require.ErrorIs(t, err, context.DeadlineExceeded)
	require.Error(t, s.ping(ctx))
	require.Less(t, time.Since(began), 3*time.Second)
	proxy.cut() // close has nothing to wait for
}
