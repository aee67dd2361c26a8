package main

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// version is set by the linker (see the Makefile). A plain `go build` leaves it
// empty, and buildVersion falls back to what the toolchain recorded.
var version string

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print build information",
		Args:  cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return printVersion(cmd.OutOrStdout())
		},
	}
}

// buildVersion returns the version of this binary, "devel" when nobody gave it
// one.
func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "devel"
}

func printVersion(w io.Writer) error {
	text := "sluice " + buildVersion() + "\n"
	if commit := buildCommit(); commit != "" {
		text += "commit " + commit + "\n"
	}
	text += fmt.Sprintf("%s %s/%s\n", runtime.Version(), runtime.GOOS, runtime.GOARCH)
	if _, err := io.WriteString(w, text); err != nil {
		return fmt.Errorf("print version: %w", err)
	}
	return nil
}

// buildCommit returns the commit that the toolchain stamped into the binary,
// with its time, or "" for a build outside of a repository.
func buildCommit() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return ""
	}
	settings := make(map[string]string, len(info.Settings))
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	commit := settings["vcs.revision"]
	if commit == "" {
		return ""
	}
	if at := settings["vcs.time"]; at != "" {
		commit += " of " + at
	}
	if settings["vcs.modified"] == "true" {
		commit += ", with uncommitted changes"
	}
	return commit
}
