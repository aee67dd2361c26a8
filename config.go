package main

import (
	"fmt"
	"io"
	"text/tabwriter"

	"github.com/spf13/cobra"

	"sluice/config"
)

func configCommand() *cobra.Command {
	var file string
	var keys bool
	cmd := &cobra.Command{
		Use:   "config",
		Short: "Print the effective configuration, secrets hidden",
		Long: "Config prints what the file, the environment and the flags come to, as a file that can be loaded again.\n" +
			"Passwords, the values of headers and the hashes of API keys show as <secret>.",
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if keys {
				return printKeys(cmd.OutOrStdout())
			}
			cfg, err := loadConfig(cmd, file)
			if err != nil {
				return err
			}
			return printConfig(cmd.OutOrStdout(), cfg)
		},
	}
	cmd.Flags().BoolVar(&keys, "keys", false, "print every key with its environment variable and default instead")
	cmd.Flags().StringVar(&file, "config", "", "YAML `file` with settings")
	config.AddFlags(cmd.Flags())
	return cmd
}

func printConfig(w io.Writer, cfg config.Config) error {
	text, err := cfg.YAML()
	if err != nil {
		return err
	}
	if _, err := w.Write(text); err != nil {
		return fmt.Errorf("print the configuration: %w", err)
	}
	return nil
}

func printKeys(w io.Writer) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	_, _ = fmt.Fprintln(table, "KEY\tENVIRONMENT\tDEFAULT\tMEANING") // Flush reports what went wrong
	for _, key := range config.Keys() {
		_, _ = fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", key.Name, key.Env, key.Default, key.Summary())
	}
	if err := table.Flush(); err != nil {
		return fmt.Errorf("print the keys: %w", err)
	}
	return nil
}
