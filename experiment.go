package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"sluice/e2e/load/experiment"
)

// experimentCommand is `sluice experiment`: why there is a queue, measured.
func experimentCommand() *cobra.Command {
	cfg := experiment.DefaultConfig()
	cmd := &cobra.Command{
		Use:   "experiment [" + strings.Join(experiment.PartNames(), "|") + "]...",
		Short: "Measure why there is a queue: what overload does to a gateway with and without one",
		Long: "Experiment runs the gateway, the stand-in backend and the load generator as processes of their own, on free ports of this\n" +
			"machine, and measures what becomes of orders that are answered after the backend has saved them, and before:\n\n" +
			"  overload  up to three times more orders than the backend can save\n" +
			"  original  N orders at once, with a backend that suffers from a crowd, beside the table that this project began with\n" +
			"  stall     a backend that stalls once for three seconds, with clients that try again\n" +
			"  memory    large orders, a slow backend, and a gateway with little memory\n\n" +
			"Without a part it runs all four. Results are CSV files, tables as Markdown (results.md), plots as PNG in two themes, and\n" +
			"report.html, one page with all of it. A run of some parts names these two after them, such as report-overload.html, and\n" +
			"leaves a report of all parts as it is; CSV files and plots of the same part are replaced. The exit code is 1 if an expected shape is not there, or if the machine is too busy.\n\n" +
			"amqp and sql want a broker: SLUICE_PUBSUB_AMQP_URL (default that of the gateway), SLUICE_PUBSUB_SQL_DSN. What the\n" +
			"experiment makes there has names of its own, and is removed.",
	}
	cmd.Args = func(_ *cobra.Command, args []string) error {
		cfg.Parts = args
		return cfg.Validate()
	}
	cmd.ValidArgs = experiment.PartNames()
	flags := cmd.Flags()
	flags.BoolVar(&cfg.Quick, "quick", cfg.Quick, "fewer points for a shorter time: within 3 minutes, and the same checks")
	flags.StringVar(&cfg.Backend, "backend", cfg.Backend, "`broker` of the gateway: gochannel, amqp or sql")
	flags.IntVar(&cfg.Runs, "runs", cfg.Runs, "measure each point so many `times`; tables and checks have the median, plots the range")
	flags.StringVar(&cfg.Out, "out", cfg.Out, "write the results to this `directory`")
	flags.BoolVar(&cfg.Force, "force", cfg.Force, "measure on a machine that is too busy, and mark the results")
	flags.StringVar(&cfg.Arrivals, "arrivals", cfg.Arrivals, "overload: clients arrive `constant`ly or poisson")
	flags.StringVar(&cfg.Service, "service", cfg.Service, "overload: the backend's service times are `constant` or exponential")
	flags.StringVar(&cfg.Cancellation, "cancellation", cfg.Cancellation, "overload: the backend's work for clients who have left goes on (`ignored`) or is given up (honoured)")
	flags.Float64Var(&cfg.TimeScale, "time-scale", cfg.TimeScale, "multiply all durations, to test the plumbing")
	_ = flags.MarkHidden("time-scale") // it is there, two lines above
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		binary, err := os.Executable()
		if err != nil {
			return fmt.Errorf("find the binary: %w", err)
		}
		err = experiment.Run(cmd.Context(), cfg, experiment.Deps{
			Binary: binary, Version: buildVersion(), Environ: os.Environ(), Stdout: cmd.OutOrStdout(), Stderr: cmd.ErrOrStderr(),
			Command: strings.Join(append([]string{"sluice"}, os.Args[1:]...), " "),
		})
		if cmd.Context().Err() != nil && errors.Is(err, context.Canceled) {
			return errors.New("stopped before the end; nothing was written")
		}
		return err
	}
	return cmd
}
