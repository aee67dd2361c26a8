package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"sluice/config"
)

// readyTimeout bounds the question. The gateway bounds its own checks by less.
const readyTimeout = 5 * time.Second

// readyCommand is `sluice ready`, the health check of an image that has neither
// a shell nor curl.
func readyCommand() *cobra.Command {
	var file string
	cmd := &cobra.Command{
		Use:   "ready",
		Short: "Ask a running gateway whether it is ready; exit 1 if it is not",
		Long: "Ready asks GET /readyz of http.admin_addr, which it knows from the same sources as `sluice serve`:\n" +
			"give it the same file, environment and flags. It exits with 0 if the gateway is ready, and with 1 and one\n" +
			"line on standard error if it is not. A broker that is out of reach is told, and does not make it unready.",
		Args: cobra.NoArgs,
	}
	cmd.Flags().StringVar(&file, "config", "", "YAML `file` with settings")
	config.AddFlags(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := loadConfig(cmd, file)
		if err != nil {
			return err
		}
		// No name to look up: without a host, as in ":8081", it is this machine that is dialled.
		return ready(cmd.Context(), "http://"+cfg.HTTP.AdminAddr+"/readyz", cmd.OutOrStdout())
	}
	return cmd
}

// readiness is what /readyz answers, as far as it is told here.
type readiness struct {
	Status string `json:"status"`
	Checks map[string]struct {
		Error string `json:"error"`
	} `json:"checks"`
}

// ready prints that the gateway is ready, or returns why it is not.
func ready(ctx context.Context, url string, stdout io.Writer) error {
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
	if err != nil {
		return fmt.Errorf("ask whether the gateway is ready: %w", err)
	}
	// Without the proxy that the environment may name for the backend.
	client := &http.Client{Timeout: readyTimeout, Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("ask whether the gateway is ready: %w", err)
	}
	defer func() { _ = response.Body.Close() }() // what matters was read

	var answer readiness
	if err := json.NewDecoder(io.LimitReader(response.Body, 1<<20)).Decode(&answer); err != nil || answer.Status == "" {
		return fmt.Errorf("GET %s: %s, and not the answer of a gateway", url, response.Status)
	}
	if response.StatusCode != http.StatusOK {
		return errors.New("not ready: " + answer.String())
	}
	if _, err := fmt.Fprintln(stdout, answer); err != nil {
		return fmt.Errorf("print the answer: %w", err)
	}
	return nil
}

// String is the status with every check that fails, on one line.
func (r readiness) String() string {
	parts := []string{r.Status}
	for _, name := range slices.Sorted(maps.Keys(r.Checks)) {
		if message := r.Checks[name].Error; message != "" {
			parts = append(parts, name+": "+strings.ReplaceAll(message, "\n", "; "))
		}
	}
	return strings.Join(parts, "; ")
}
