package experiment

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"time"
)

// lastLines is how much of its log a process that dies is quoted with.
const lastLines = 12

// process is a running command of the binary.
type process struct {
	name   string
	cmd    *exec.Cmd
	stdout bytes.Buffer  // to be read after done
	done   chan struct{} // closed when it has ended
	err    error         // of Wait, after done

	mu    sync.Mutex
	lines []string      // the last ones of its log
	addrs []string      // every line so far that tells an address
	heard chan struct{} // closed and replaced at every line
}

// start runs a command of the binary, which ends with ctx at the latest. Who starts it must call stop.
func start(ctx context.Context, binary string, environ []string, args ...string) (*process, error) {
	p := &process{name: "sluice " + args[0], done: make(chan struct{}), heard: make(chan struct{})}
	p.cmd = exec.CommandContext(ctx, binary, args...)
	p.cmd.Env = environ
	p.cmd.Stdout = &p.stdout
	p.cmd.WaitDelay = 5 * time.Second
	dieWithUs(p.cmd)
	logs, err := p.cmd.StderrPipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", p.name, err)
	}
	go func() {
		defer close(p.done)
		lines := bufio.NewScanner(logs)
		lines.Buffer(nil, 1<<20)
		for lines.Scan() {
			p.note(lines.Text())
		}
		p.err = p.cmd.Wait()
	}()
	return p, nil
}

func (p *process) note(line string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lines = append(p.lines, line)
	p.lines = p.lines[max(0, len(p.lines)-lastLines):]
	if strings.Contains(line, "addr=") {
		p.addrs = append(p.addrs, line)
	}
	close(p.heard)
	p.heard = make(chan struct{})
}

// stop ends the process at once and waits until it has ended. Its data is thrown away, so it need not be asked nicely.
func (p *process) stop() {
	_ = p.cmd.Process.Kill() // it may have ended by itself
	<-p.done
}

// died is the error of a process that has ended when it should not have.
func (p *process) died() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return fmt.Errorf("%s has ended (%s); its last lines:\n%s", p.name, p.cmd.ProcessState, strings.Join(p.lines, "\n"))
}

// attributes waits for a line of the log (in slog's text format) that tells addresses and has that message, and returns
// attributes of it.
func (p *process) attributes(ctx context.Context, message string, names ...string) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	for {
		p.mu.Lock()
		lines, heard := p.addrs, p.heard
		p.mu.Unlock()
		for _, line := range lines {
			if strings.Contains(line, " msg="+message+" ") {
				return pick(line, names), nil
			}
		}
		select {
		case <-heard:
		case <-p.done:
			return nil, p.died()
		case <-ctx.Done():
			return nil, fmt.Errorf("%s does not say %s: %w; its last lines:\n%s", p.name, message, context.Cause(ctx), p.log())
		}
	}
}

// pick returns the values of attributes that have no spaces in them.
func pick(line string, names []string) []string {
	values := make([]string, len(names))
	for _, word := range strings.Fields(line) {
		name, value, _ := strings.Cut(word, "=")
		if i := slices.Index(names, name); i >= 0 {
			values[i] = value
		}
	}
	return values
}

func (p *process) log() string {
	p.mu.Lock()
	defer p.mu.Unlock()
	return strings.Join(p.lines, "\n")
}

// startTimeout is how long a process may take until it does its work.
const startTimeout = 30 * time.Second
