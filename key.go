package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"sluice/platform/httpserver"
)

func keyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "key NAME",
		Short: "Make an API key for a client",
		Long: "Key makes a random API key for the client of that name. It prints the key, which the client sends as\n" +
			"`Authorization: Bearer <key>`, and the entry of http.api_keys that lets it in. Nothing is stored: the gateway\n" +
			"knows a key only by its hash, so a key that is lost is replaced by another one.",
		Args: cobra.ExactArgs(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			key, entry, err := httpserver.NewAPIKey(args[0])
			if err != nil {
				return err
			}
			if _, err := fmt.Fprintf(cmd.OutOrStdout(), "key:   %s\nentry: %s\n", key, entry); err != nil {
				return fmt.Errorf("print the key: %w", err)
			}
			return nil
		},
	}
}
