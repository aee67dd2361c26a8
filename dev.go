package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"time"

	"github.com/spf13/cobra"

	"sluice/config"
	"sluice/e2e/backend"
	"sluice/modules/intake"
	"sluice/platform/telemetry"
)

// devHint is printed once both are up. Its verbs are the gateway's, the admin
// and the stand-in's address, and what becomes of the orders.
const devHint = `
Sluice takes orders on %[1]s and saves them to a stand-in backend that takes 50 ms for each.

  Submit an order:
    curl -i %[1]s/orders -H 'Content-Type: application/json' \
      -d '{"orderNumber":"A-1001","customerId":"c-7","currency":"EUR","items":[{"sku":"tea","quantity":2,"unitPrice":4.5}]}'
  Look at what became of it, and at all of them:
    curl -s '%[1]s/orders?orderNumber=A-1001'
    curl -s %[1]s/orders
  See an order refused by the backend (its number ends in -REJECT):
    curl -s %[1]s/orders -H 'Content-Type: application/json' -H 'Prefer: wait=5' \
      -d '{"orderNumber":"A-1002-REJECT","customerId":"c-7","currency":"EUR","items":[{"sku":"tea","quantity":2,"unitPrice":4.5}]}'
  Let the backend fail for a while, and watch orders being tried again:
    curl -s -X PUT %[3]s/control -d '{"failNext": 3}'
  Look at the gateway and at the backend:
    curl -s %[2]s/admin/status
    curl -s %[3]s/stats

Ctrl-C stops it. %[4]s

`

func devCommand() *cobra.Command {
	backendAddr := "localhost:9090"
	cmd := &cobra.Command{
		Use:   "dev",
		Short: "Run the gateway and a stand-in backend, and print what to try",
		Long:  "Dev runs the gateway on the embedded default (SQLite in ./data, Go channels) and the stand-in backend in one process. No server is needed.",
		Args:  cobra.NoArgs,
	}
	cmd.Flags().StringVar(&backendAddr, "backend-addr", backendAddr, "`address` of the stand-in backend")
	config.AddFlags(cmd.Flags())
	cmd.RunE = func(cmd *cobra.Command, _ []string) error {
		cfg, err := loadConfig(cmd, "")
		if err != nil {
			return err
		}
		return dev(cmd.Context(), cfg, backendAddr, cmd.OutOrStdout(), cmd.ErrOrStderr())
	}
	return cmd
}

// dev runs both until ctx ends. The stand-in stops last, so that calls in
// flight get their answers.
func dev(ctx context.Context, cfg config.Config, backendAddr string, stdout, stderr io.Writer) (err error) {
	standIn, err := backend.New(backend.DefaultConfig())
	if err != nil {
		return err
	}
	defer standIn.Close()
	listener, err := net.Listen("tcp", backendAddr)
	if err != nil {
		return fmt.Errorf("listen on %s for the stand-in backend (--backend-addr): %w", backendAddr, err)
	}
	server := &http.Server{Handler: standIn, ReadHeaderTimeout: 5 * time.Second}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	defer func() {
		stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), cfg.HTTP.ShutdownTimeout)
		defer cancel()
		err = errors.Join(err, server.Shutdown(stop))
		if served := <-done; !errors.Is(served, http.ErrServerClosed) {
			err = errors.Join(err, served)
		}
	}()

	backendURL := localURL(listener.Addr().String())
	cfg.Backend.URL = backendURL + "/orders"
	return serve(ctx, cfg, config.Modules(), telemetry.NewLogger(cfg.Log, stderr), telemetry.Start, func(public, admin string) {
		kept := "The orders stay in " + cfg.Store.DSN + " and are there again after the next start."
		if cfg.Store.Driver == intake.DriverMemory {
			kept = "The orders are gone then, since store.driver is memory."
		}
		_, _ = fmt.Fprintf(stdout, devHint, localURL(public), localURL(admin), backendURL, kept) // only a hint
	})
}

// localURL returns the URL by which this machine reaches a bound address.
func localURL(addr string) string {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		return addr
	}
	if ip := net.ParseIP(host); host == "" || ip.IsUnspecified() || ip.IsLoopback() {
		host = "localhost"
	}
	return (&url.URL{Scheme: "http", Host: net.JoinHostPort(host, port)}).String()
}
