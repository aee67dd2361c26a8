//go:build unix

package services

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"syscall"
	"testing"
	"time"

	amqp "github.com/rabbitmq/amqp091-go"
	"github.com/stretchr/testify/require"
)

// rabbitMQStart bounds how long a node may take to start or to answer.
const rabbitMQStart = 60 * time.Second

// RabbitMQ is a broker of one test, which may stop, block and kill it.
type RabbitMQ struct {
	URL string

	tb      testing.TB
	dir     string
	sbin    string
	env     []string
	process *exec.Cmd
	exited  chan struct{}
}

// OwnRabbitMQ starts a RabbitMQ on free ports, with its data in a directory of
// its own, and ends it with the test. It needs the installed server.
func OwnRabbitMQ(tb testing.TB) *RabbitMQ {
	tb.Helper()
	sbin := sbinRabbitMQ()
	if sbin == "" {
		if os.Getenv("CI") != "" {
			require.FailNow(tb, "rabbitmq-server is not installed, and CI must not skip what needs it")
		}
		tb.Skip("rabbitmq-server is not installed")
	}
	dir, err := os.MkdirTemp("", "sluice-rabbitmq-") //nolint:usetesting // a short path, whose end names the node
	require.NoError(tb, err)
	port, dist := freePort(tb), freePort(tb)
	r := &RabbitMQ{URL: "amqp://guest:guest@127.0.0.1:" + port + "/", tb: tb, dir: dir, sbin: sbin}
	config := filepath.Join(dir, "rabbitmq.conf")
	require.NoError(tb, os.WriteFile(config, []byte("listeners.tcp.1 = 127.0.0.1:"+port+"\n"), 0o600))
	r.env = append(os.Environ(),
		"HOME="+dir, // for the cookie: no other node may talk to this one
		"RABBITMQ_NODENAME="+filepath.Base(dir)+"@localhost",
		"RABBITMQ_NODE_PORT="+port,
		"RABBITMQ_DIST_PORT="+dist,
		"RABBITMQ_MNESIA_BASE="+dir,
		"RABBITMQ_LOG_BASE="+dir,
		"RABBITMQ_LOGS="+filepath.Join(dir, "rabbit.log"),
		"RABBITMQ_PID_FILE="+filepath.Join(dir, "pid"),
		"RABBITMQ_CONFIG_FILE="+config,
		"RABBITMQ_ENABLED_PLUGINS_FILE="+filepath.Join(dir, "plugins"),
		"RABBITMQ_CONF_ENV_FILE="+filepath.Join(dir, "none"),
		"ERL_EPMD_ADDRESS=127.0.0.1",
	)
	tb.Cleanup(func() {
		r.Kill()
		require.NoError(tb, os.RemoveAll(dir))
	})
	r.Start()
	return r
}

// Start starts the node, also again after Kill, and waits until it serves.
func (r *RabbitMQ) Start() {
	r.tb.Helper()
	log, err := os.Create(filepath.Join(r.dir, "console.log"))
	require.NoError(r.tb, err)
	r.process = exec.Command(filepath.Join(r.sbin, "rabbitmq-server"))
	r.process.Env, r.process.Stdout, r.process.Stderr = r.env, log, log
	r.process.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // the script starts the node as a child
	require.NoError(r.tb, r.process.Start())
	r.exited = make(chan struct{})
	go func() {
		defer close(r.exited)
		_ = r.process.Wait()
		_ = log.Close()
	}()
	require.Eventually(r.tb, func() bool {
		conn, err := amqp.DialConfig(r.URL, amqp.Config{Dial: amqp.DefaultDial(5 * time.Second)})
		return err == nil && conn.Close() == nil
	}, rabbitMQStart, 100*time.Millisecond, "RabbitMQ does not start, see %s", r.dir)
}

// Kill ends the node like a power cut.
func (r *RabbitMQ) Kill() {
	_ = syscall.Kill(-r.process.Process.Pid, syscall.SIGKILL)
	<-r.exited
}

// Control runs rabbitmqctl: stop_app, start_app, set_vm_memory_high_watermark 0.
func (r *RabbitMQ) Control(arguments ...string) {
	r.tb.Helper()
	ctx, cancel := context.WithTimeout(context.WithoutCancel(r.tb.Context()), rabbitMQStart)
	defer cancel()
	command := exec.CommandContext(ctx, filepath.Join(r.sbin, "rabbitmqctl"), arguments...)
	command.Env = r.env
	out, err := command.CombinedOutput()
	require.NoError(r.tb, err, "rabbitmqctl %v: %s", arguments, out)
}

// sbinRabbitMQ finds the scripts of the server themselves. Those in the path are
// wrappers, which change to the user of the system's node.
func sbinRabbitMQ() string {
	for _, pattern := range []string{"/usr/lib/rabbitmq/bin", "/opt/rabbitmq/sbin", "/usr/local/opt/rabbitmq/sbin", "/opt/homebrew/opt/rabbitmq/sbin"} {
		if info, err := os.Stat(filepath.Join(pattern, "rabbitmqctl")); err == nil && !info.IsDir() {
			if resolved, err := filepath.EvalSymlinks(filepath.Join(pattern, "rabbitmqctl")); err == nil {
				return filepath.Dir(resolved)
			}
		}
	}
	return ""
}

func freePort(tb testing.TB) string {
	tb.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(tb, err)
	defer listener.Close() //nolint:errcheck // only its number is wanted
	address, ok := listener.Addr().(*net.TCPAddr)
	require.True(tb, ok, fmt.Sprint(listener.Addr()))
	return strconv.Itoa(address.Port)
}
