package database_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"testing/fstest"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"

	"sluice/platform/database"
)

func TestMain(m *testing.M) {
	// database/sql ends this goroutine without waiting for it.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("database/sql.(*DB).connectionOpener"))
}

func TestGroupFlushesALoneItemAtOnce(t *testing.T) {
	var got []int
	g := database.NewGroup(10, 1, func(_ context.Context, items []int) error {
		got = append(got, items...)
		return nil
	})
	defer g.Close()
	require.NoError(t, g.Do(t.Context(), 7))
	require.Equal(t, []int{7}, got)
}

func TestGroupCollectsWhileItFlushes(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	var sizes []int
	g := database.NewGroup(4, 1, func(_ context.Context, items []int) error {
		sizes = append(sizes, len(items)) // one flusher, so no lock is needed: -race would tell
		if len(sizes) == 1 {
			close(entered)
			<-leave
		}
		return nil
	})
	var calls sync.WaitGroup
	calls.Go(func() { require.NoError(t, g.Do(t.Context(), 0)) })
	<-entered
	// Items join in the order of the calls; a cancelled caller's item stays.
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	for i := range 10 {
		require.ErrorIs(t, g.Do(gone, i), context.Canceled)
	}
	close(leave)
	calls.Wait()
	g.Close()
	require.Equal(t, []int{1, 4, 4, 2}, sizes)
}

func TestGroupSharesAnErrorWithItsBatchOnly(t *testing.T) {
	broken := errors.New("disk full")
	g := database.NewGroup(1, 2, func(_ context.Context, items []int) error {
		if items[0] == 1 {
			return broken
		}
		return nil
	})
	defer g.Close()
	var calls sync.WaitGroup
	for i := range 20 {
		calls.Go(func() {
			err := g.Do(context.Background(), i%2)
			if i%2 == 1 {
				require.ErrorIs(t, err, broken)
			} else {
				require.NoError(t, err)
			}
		})
	}
	calls.Wait()
}

func TestGroupFlushesEveryItemOnceUnderLoad(t *testing.T) {
	const callers, each = 32, 200
	var seen [callers * each]atomic.Int32
	var running, most atomic.Int32
	g := database.NewGroup(16, 3, func(_ context.Context, items []int) error {
		n := running.Add(1)
		for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
		}
		for _, i := range items {
			seen[i].Add(1)
		}
		running.Add(-1)
		return nil
	})
	var calls sync.WaitGroup
	for c := range callers {
		calls.Go(func() {
			for i := range each {
				require.NoError(t, g.Do(context.Background(), c*each+i))
			}
		})
	}
	calls.Wait()
	g.Close()
	for i := range seen {
		require.Equal(t, int32(1), seen[i].Load())
	}
	require.LessOrEqual(t, most.Load(), int32(3))
}

func TestGroupRefusesItemsAfterClose(t *testing.T) {
	g := database.NewGroup(1, 1, func(context.Context, []int) error { return nil })
	g.Close()
	g.Close()
	require.ErrorIs(t, g.Do(t.Context(), 1), database.ErrClosed)
}

func migrations(t *testing.T) fs.FS {
	t.Helper()
	return fstest.MapFS{"00001_t.sql": {Data: []byte("-- +goose Up\nCREATE TABLE t (v TEXT);\n-- +goose Down\nDROP TABLE t;\n")}}
}

func TestSQLiteKeepsWhatWasCommitted(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a dir", "t.db") // made, spaces and all
	db, err := database.OpenSQLite(t.Context(), path, migrations(t))
	require.NoError(t, err)
	_, err = db.Write.ExecContext(t.Context(), "INSERT INTO t VALUES ('x')")
	require.NoError(t, err)
	_, err = db.Read.ExecContext(t.Context(), "INSERT INTO t VALUES ('y')")
	require.ErrorContains(t, err, "readonly")
	var mode, sync string
	require.NoError(t, db.Write.QueryRowContext(t.Context(), "PRAGMA journal_mode").Scan(&mode))
	require.NoError(t, db.Write.QueryRowContext(t.Context(), "PRAGMA synchronous").Scan(&sync))
	require.Equal(t, "wal", mode)
	require.Equal(t, "2", sync, "FULL: a commit is on disk when it returns")
	require.NoError(t, db.Close())

	db, err = database.OpenSQLite(t.Context(), path, migrations(t))
	require.NoError(t, err)
	defer func() { require.NoError(t, db.Close()) }()
	var v string
	require.NoError(t, db.Read.QueryRowContext(t.Context(), "SELECT v FROM t").Scan(&v))
	require.Equal(t, "x", v)
}

func TestSQLiteRefusesASecondUser(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t.db")
	db, err := database.OpenSQLite(t.Context(), path, migrations(t))
	require.NoError(t, err)
	_, err = database.OpenSQLite(t.Context(), path, migrations(t))
	require.ErrorContains(t, err, "another process has it open")
	require.NoError(t, db.Close())
	db, err = database.OpenSQLite(t.Context(), path, migrations(t))
	require.NoError(t, err)
	require.NoError(t, db.Close())
}

func TestSQLiteRefusesADamagedFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "t.db")
	require.NoError(t, os.WriteFile(path, []byte("this is a letter, not a database, and long enough to be taken for neither"), 0o600))
	_, err := database.OpenSQLite(t.Context(), path, migrations(t))
	require.ErrorContains(t, err, path)
	require.ErrorContains(t, err, "damaged")
	require.NotContains(t, err.Error(), "\n")
}

func TestSQLiteNamesADirectoryThatCannotBeMade(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	require.NoError(t, os.WriteFile(file, nil, 0o600))
	_, err := database.OpenSQLite(t.Context(), filepath.Join(file, "t.db"), migrations(t))
	require.ErrorContains(t, err, file)
}
