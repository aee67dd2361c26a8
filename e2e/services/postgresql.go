//go:build unix

package services

import (
	"database/sql"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// PostgreSQL is a server of one test, which may stop and kill it.
type PostgreSQL struct {
	DSN string

	tb      testing.TB
	bin     string
	dir     string
	port    string
	as      *syscall.SysProcAttr
	process *exec.Cmd
	exited  chan struct{}
}

// postgresStart bounds how long a server may take to start, stop or recover.
const postgresStart = 60 * time.Second

// OwnPostgreSQL starts a PostgreSQL on a free port, with its data in a directory
// of its own, and ends it with the test. It needs the installed server.
func OwnPostgreSQL(tb testing.TB) *PostgreSQL {
	tb.Helper()
	bin := binPostgreSQL()
	if bin == "" {
		if os.Getenv("CI") != "" {
			require.FailNow(tb, "the PostgreSQL server is not installed, and CI must not skip what needs it")
		}
		tb.Skip("the PostgreSQL server is not installed")
	}
	dir, err := os.MkdirTemp("", "sluice-postgresql-") //nolint:usetesting // short, since the path of a socket has a limit, and of another user
	require.NoError(tb, err)
	p := &PostgreSQL{tb: tb, bin: bin, dir: dir, port: freePort(tb)}
	p.DSN = "postgres://postgres@127.0.0.1:" + p.port + "/postgres?sslmode=disable"
	tb.Cleanup(func() {
		p.Kill()
		require.NoError(tb, os.RemoveAll(dir))
	})
	// The server refuses to be run by root.
	if os.Geteuid() == 0 {
		p.as = p.unprivileged()
	}
	data := filepath.Join(dir, "data")
	initdb := exec.Command(filepath.Join(bin, "initdb"), "--pgdata="+data, "--username=postgres", "--auth=trust", "--encoding=UTF8", "--no-sync")
	initdb.SysProcAttr, initdb.Dir = p.as, dir
	out, err := initdb.CombinedOutput()
	require.NoError(tb, err, "initdb: %s", out)
	p.Start()
	return p
}

// unprivileged hands the directory to the system's user of PostgreSQL.
func (p *PostgreSQL) unprivileged() *syscall.SysProcAttr {
	p.tb.Helper()
	account, err := user.Lookup("postgres")
	require.NoError(p.tb, err)
	uid, err := strconv.ParseUint(account.Uid, 10, 32)
	require.NoError(p.tb, err)
	gid, err := strconv.ParseUint(account.Gid, 10, 32)
	require.NoError(p.tb, err)
	require.NoError(p.tb, os.Chown(p.dir, int(uid), int(gid)))
	return &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}}
}

// Start starts the server, also again after Stop or Kill, and waits until it
// answers.
func (p *PostgreSQL) Start() {
	p.tb.Helper()
	log, err := os.OpenFile(filepath.Join(p.dir, "log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	require.NoError(p.tb, err)
	p.process = exec.Command(filepath.Join(p.bin, "postgres"), "-D", filepath.Join(p.dir, "data"), "-k", p.dir, "-p", p.port,
		"-c", "listen_addresses=127.0.0.1", "-c", "max_connections=200")
	p.process.SysProcAttr, p.process.Dir = p.as, p.dir
	p.process.Stdout, p.process.Stderr = log, log
	require.NoError(p.tb, p.process.Start())
	exited := make(chan struct{})
	p.exited = exited
	process := p.process
	go func() {
		defer close(exited)
		_ = process.Wait()
		_ = log.Close()
	}()
	db, err := sql.Open("pgx", p.DSN)
	require.NoError(p.tb, err)
	defer db.Close() //nolint:errcheck // nothing was written
	require.Eventually(p.tb, func() bool { return db.Ping() == nil }, postgresStart, 50*time.Millisecond, "PostgreSQL does not start, see %s", p.dir)
}

// Stop ends the server as an operator does who does not wait for clients.
func (p *PostgreSQL) Stop() { p.end(syscall.SIGINT) }

// Kill ends the server at once; it recovers at the next Start.
func (p *PostgreSQL) Kill() { p.end(syscall.SIGQUIT) }

func (p *PostgreSQL) end(signal syscall.Signal) {
	if p.process == nil {
		return
	}
	_ = p.process.Process.Signal(signal) // it may have ended
	<-p.exited
}

// binPostgreSQL finds the newest server. Debian keeps it out of the path.
func binPostgreSQL() string {
	found, _ := filepath.Glob("/usr/lib/postgresql/*/bin/initdb") // the pattern is right
	slices.Sort(found)
	if n := len(found); n > 0 {
		return filepath.Dir(found[n-1])
	}
	if path, err := exec.LookPath("initdb"); err == nil {
		return filepath.Dir(path)
	}
	return ""
}
