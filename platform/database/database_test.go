package database_test

import (
	"io/fs"
	"os"
	"path/filepath"
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
