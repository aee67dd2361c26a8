package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"strings"

	"github.com/alecthomas/units"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"sluice/e2e/load"
)

// loadCommand is `sluice load`, the load generator.
func loadCommand() *cobra.Command {
	cfg, opts := load.DefaultConfig(), loadOptions{}
	var faults []error
	cmd := &cobra.Command{
		Use:   "load [flags] URL",
		Short: "Send orders at a given rate, whatever becomes of them, and measure what does",
		Long: "Load POSTs orders to URL as planned (open loop), and prints rates, latencies from the intended time of each order,\n" +
			"and how far it was behind its own plan. A plan is a rate with a duration, or phases with commas between them:\n\n" +
			"  sluice load --rate 500 --duration 30s http://localhost:8080/orders\n" +
			"  sluice load --plan '500/s:30s, 100/s-1000/s:60s, burst 5000, 0/s:10s' http://localhost:8080/orders\n" +
			"  sluice load --closed 1000 --orders 5000 http://localhost:8080/orders\n\n" +
			"500/s:30s holds a rate (steps are several of these), 100/s-1000/s:60s changes it evenly, and a burst comes at once.\n" +
			"The third line is a closed loop: 1000 clients, each of which waits for its answer before it sends the next order.\n\n" +
			"Ctrl-C ends it early; what is in flight is cut, and the result is printed. It exits with 1 if not one order got\n" +
			"to the server.",
		// As in backendCommand: wrong values are faults of the command line.
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				cfg.URL = args[0]
			}
			if err := cobra.ExactArgs(1)(cmd, args); err != nil {
				return errors.Join(append(faults, errors.New("one URL must be given, such as http://localhost:8080/orders"))...)
			}
			return errors.Join(append(faults, opts.apply(&cfg), cfg.Validate())...)
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			return runLoad(cmd.Context(), cfg, opts, cmd.OutOrStdout(), cmd.ErrOrStderr())
		},
	}
	flags := cmd.Flags()
	loadFlags(flags, &cfg)
	flags.Var(&opts.size, "size", "pad orders to this `size`, such as 16KiB")
	flags.StringVar(&opts.body, "body", "", "send this `file` as the order, with {{number}} replaced by the order number")
	flags.StringArrayVar(&opts.header, "header", nil, "send this `line`, such as 'Authorization: Bearer key', with every order; may be repeated")
	flags.BoolVar(&opts.json, "json", false, "print the result as one JSON object")
	flags.BoolVar(&opts.progress, "progress", false, "print a line every second on standard error, also if that is no terminal")
	flags.VisitAll(func(f *pflag.Flag) {
		if f.Value.Type() != "bool" { // a wrong boolean ends the parsing: wrapped, it would want a value
			f.Value = lenientValue{f.Value, f.Name, &faults}
		}
	})
	return cmd
}

func loadFlags(flags *pflag.FlagSet, cfg *load.Config) {
	flags.Float64Var(&cfg.Rate, "rate", cfg.Rate, "`number` of orders a second, for --duration")
	flags.DurationVar(&cfg.Duration, "duration", cfg.Duration, "for how long, with --rate or --closed")
	flags.Var((*planValue)(&cfg.Plan), "plan", "when orders arrive: `phases` such as 500/s:30s, 100/s-1000/s:60s, burst 5000")
	flags.StringVar(&cfg.Arrivals, "arrivals", cfg.Arrivals, "`kind` of arrivals, constant or poisson")
	flags.IntVar(&cfg.Closed, "closed", cfg.Closed, "closed loop: this `number` of clients without a pause")
	flags.IntVar(&cfg.Orders, "orders", cfg.Orders, "end the closed loop after this `number` of orders")
	flags.DurationVar(&cfg.Warmup, "warmup", cfg.Warmup, "send for this `time` before the measured window begins")
	flags.DurationVar(&cfg.Deadline, "deadline", cfg.Deadline, "a client leaves after this `time`; 0 = only after 30s")
	flags.IntVar(&cfg.Retries, "retries", cfg.Retries, "further `attempts` after a timeout, a failed connection, 429 or 5xx")
	flags.DurationVar(&cfg.RetryPause, "retry-pause", cfg.RetryPause, "`time` before the first of them, doubled for each, ±50 %; 0 = at once")
	flags.DurationVar(&cfg.RetryPauseMax, "retry-pause-max", cfg.RetryPauseMax, "the pause is doubled up to this `time`; 0 = without end")
	flags.IntVar(&cfg.Connections, "connections", cfg.Connections, "most open connections, 0 = as many as it takes")
	flags.StringVar(&cfg.Prefix, "prefix", cfg.Prefix, "`text` that order numbers begin with; default drawn for every run")
	flags.Uint64Var(&cfg.Seed, "seed", cfg.Seed, "`number` that makes poisson arrivals repeatable; 0 = drawn for every run")
}

// loadOptions is what the command does beside a run.
type loadOptions struct {
	size     sizeValue
	body     string
	header   []string
	json     bool
	progress bool
}

// apply puts into cfg what takes more than a flag.
func (o loadOptions) apply(cfg *load.Config) error {
	cfg.Size = int(o.size)
	cfg.Header = http.Header{}
	for _, line := range o.header {
		name, value, ok := strings.Cut(line, ":")
		if !ok || name == "" {
			return fmt.Errorf("header: %q is not a line such as 'Authorization: Bearer key'", line)
		}
		cfg.Header.Add(name, strings.TrimSpace(value))
	}
	if o.body == "" {
		return nil
	}
	body, err := os.ReadFile(o.body)
	if err != nil {
		return fmt.Errorf("body: %w", err)
	}
	cfg.Body = body
	return nil
}

// runLoad prints the result of a run to stdout, also of one that got nowhere.
func runLoad(ctx context.Context, cfg load.Config, opts loadOptions, stdout, stderr io.Writer) error {
	if err := load.Reach(ctx, cfg.URL); err != nil {
		return err
	}
	var deps load.Deps
	if opts.progress || isTerminal(stderr) {
		deps.Progress = func(p load.Progress) { _, _ = fmt.Fprintln(stderr, p) } // nowhere else to report to
	}
	result, err := load.Run(ctx, cfg, deps)
	if err != nil {
		return err
	}
	if opts.json {
		err = json.NewEncoder(stdout).Encode(result)
	} else {
		_, err = fmt.Fprint(stdout, result)
	}
	if err != nil {
		return fmt.Errorf("print the result: %w", err)
	}
	if err := result.Unreached(); err != nil {
		return fmt.Errorf("no order reached %s: %w", cfg.URL, err)
	}
	return nil
}

func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// planValue is a flag that takes a plan.
type planValue load.Plan

// String returns the plan as it is written.
func (v *planValue) String() string { return load.Plan(*v).String() }

// Type names the kind of value in the help.
func (v *planValue) Type() string { return "plan" }

// Set reads the plan.
func (v *planValue) Set(text string) error {
	plan, err := load.ParsePlan(text)
	if err != nil {
		return err
	}
	*v = planValue(plan)
	return nil
}

// sizeValue is a flag that takes a size in bytes.
type sizeValue int64

// String returns the size with its unit.
func (v *sizeValue) String() string { return units.Base2Bytes(*v).String() }

// Type names the kind of value in the help.
func (v *sizeValue) Type() string { return "size" }

// Set reads the size.
func (v *sizeValue) Set(text string) error {
	size, err := units.ParseStrictBytes(text)
	if err != nil {
		return fmt.Errorf("%q is not a size such as 16KiB", text)
	}
	*v = sizeValue(size)
	return nil
}
