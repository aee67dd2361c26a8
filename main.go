// Sluice is an order gateway: it answers 202 as fast as clients can submit,
// keeps every accepted order safe, and saves the orders to a slow Backend API
// at the pace that the backend can bear.
//
// This package holds the commands, one file each; serve.go wires the modules.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"sluice/config"
)

// Exit codes.
const (
	exitOK     = 0
	exitFailed = 1   // could not start, or ended by a failure
	exitUsage  = 2   // wrong command line or configuration
	exitSignal = 128 // ended at once by a second signal, whose number is added
)

func main() {
	ctx, stop := untilSignal(context.Background(), os.Exit)
	code := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// run executes one command line and returns its exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	root := newRootCommand(stdout, stderr)
	root.SetArgs(args)
	// What fails before a command has begun is the command line's fault.
	begun := false
	root.PersistentPreRun = func(*cobra.Command, []string) { begun = true }

	cmd, err := root.ExecuteContextC(ctx)
	var faults *config.Error
	switch {
	case err == nil:
		return exitOK
	case errors.As(err, &faults):
		_, _ = fmt.Fprintf(stderr, "sluice: configuration:\n%s\n", faults) // nowhere else to report to
		return exitUsage
	case !begun:
		_, _ = fmt.Fprintf(stderr, "sluice: %s\nSee `%s --help`.\n", strings.TrimSpace(err.Error()), cmd.CommandPath())
		return exitUsage
	default:
		_, _ = fmt.Fprintf(stderr, "sluice: %s\n", oneLine(err))
		return exitFailed
	}
}

func newRootCommand(stdout, stderr io.Writer) *cobra.Command {
	root := &cobra.Command{
		Use:   "sluice",
		Short: "Order gateway: accepts at once, keeps safe, saves at the pace of the backend",
		// run prints errors, on one line and without the usage below them.
		SilenceErrors: true,
		SilenceUsage:  true,
	}
	root.SetOut(stdout)
	root.SetErr(stderr)
	root.CompletionOptions.HiddenDefaultCmd = true
	root.AddCommand(
		serveCommand(),
		devCommand(),
		backendCommand(),
		loadCommand(),
		experimentCommand(),
		readyCommand(),
		keyCommand(),
		configCommand(),
		versionCommand(),
	)
	return root
}

// untilSignal returns a context that the first SIGINT or SIGTERM cancels, which
// is the sign to stop gracefully. The second one calls exit at once with the
// code that shells use for a process ended by that signal. stop gives the
// signals back and waits for the goroutine behind this.
func untilSignal(parent context.Context, exit func(code int)) (ctx context.Context, stop func()) {
	ctx, cancel := context.WithCancel(parent)
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)

	quit, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		select {
		case <-signals:
			cancel()
		case <-quit:
			return
		}
		select {
		case second := <-signals:
			exit(signalCode(second))
		case <-quit:
		}
	}()
	return ctx, func() {
		signal.Stop(signals)
		close(quit)
		<-done
		cancel()
	}
}

func signalCode(s os.Signal) int {
	if number, ok := s.(syscall.Signal); ok {
		return exitSignal + int(number)
	}
	return exitFailed
}

// oneLine joins the lines of an error made of several, so that a failure is one
// line in a log.
func oneLine(err error) string {
	return strings.ReplaceAll(strings.TrimSpace(err.Error()), "\n", "; ")
}
