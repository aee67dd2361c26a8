package main

import (
	"encoding/json"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spf13/cobra"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"sluice/config"
)

// composeFile is a compose file, as far as a change elsewhere can break it.
type composeFile struct {
	Services map[string]composeService `yaml:"services"`
	Volumes  map[string]any            `yaml:"volumes"`
}

type composeService struct {
	Build       struct{ Context, Dockerfile string }  `yaml:"build"` // set for Sluice itself
	Command     []string                              `yaml:"command"`
	Environment map[string]string                     `yaml:"environment"`
	Ports       []string                              `yaml:"ports"`
	Volumes     []string                              `yaml:"volumes"`
	DependsOn   map[string]struct{ Condition string } `yaml:"depends_on"`
	Healthcheck map[string]any                        `yaml:"healthcheck"`
}

func (s composeService) environ() []string {
	var environ []string
	for name, value := range s.Environment {
		environ = append(environ, name+"="+value)
	}
	return environ
}

func TestComposeFilesSayWhatIsThere(t *testing.T) {
	files, err := filepath.Glob("docker/compose*.yaml")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	var variables []string
	for _, key := range config.Keys() {
		variables = append(variables, key.Env)
	}
	for _, path := range files {
		text, err := os.ReadFile(path)
		require.NoError(t, err)
		var file composeFile
		require.NoError(t, yaml.Unmarshal(text, &file), path)
		require.NotEmpty(t, file.Services, path)
		for name, service := range file.Services {
			t.Run(filepath.Base(path)+"/"+name, func(t *testing.T) {
				for variable := range service.Environment {
					if strings.HasPrefix(variable, "SLUICE_") {
						require.True(t, slices.Contains(variables, variable), "%s is no key of the configuration", variable)
					}
				}
				if service.Build.Context != "" {
					context := filepath.Join("docker", service.Build.Context)
					require.FileExists(t, filepath.Join(context, service.Build.Dockerfile))
					cmd := knownCommand(t, service.Command)
					if cmd.Name() == "serve" {
						requireServes(t, cmd, service.environ())
					}
				}
				for _, volume := range service.Volumes {
					source, _, _ := strings.Cut(volume, ":")
					if strings.HasPrefix(source, ".") {
						require.FileExists(t, filepath.Join("docker", source))
					} else {
						require.Contains(t, file.Volumes, source)
					}
				}
				for _, port := range service.Ports {
					require.True(t, strings.HasPrefix(port, "127.0.0.1:"), "%s is open to other machines", port)
				}
				for other, dependency := range service.DependsOn {
					require.Contains(t, file.Services, other)
					if dependency.Condition == "service_healthy" {
						require.NotEmpty(t, file.Services[other].Healthcheck, "%s has no health check", other)
					}
				}
			})
		}
	}
}

// knownCommand returns the command that a command line in a container calls,
// which must be one of ours with flags that it has.
func knownCommand(t *testing.T, args []string) *cobra.Command {
	t.Helper()
	if len(args) == 0 {
		args = []string{"serve"} // the image's CMD
	}
	root := newRootCommand(io.Discard, io.Discard)
	cmd, args, err := root.Find(args)
	require.NoError(t, err)
	require.NotSame(t, root, cmd)
	require.NoError(t, cmd.ParseFlags(args))
	require.NoError(t, cmd.ValidateArgs(cmd.Flags().Args()))
	return cmd
}

// requireServes fails unless this `sluice serve` would take its configuration.
func requireServes(t *testing.T, cmd *cobra.Command, environ []string) {
	t.Helper()
	cfg, err := config.Load("", environ, config.FromFlags(cmd.Flags()))
	require.NoError(t, err)
	modules, err := cmd.Flags().GetStringSlice("modules")
	require.NoError(t, err)
	require.NoError(t, cfg.CheckModules(modules))
}

func TestTheImageIsBuiltOfWhatIsThere(t *testing.T) {
	text, err := os.ReadFile("docker/Dockerfile")
	require.NoError(t, err)
	dockerfile := string(text)

	gomod, err := os.ReadFile("go.mod")
	require.NoError(t, err)
	release := regexp.MustCompile(`(?m)^go (\d+\.\d+)`).FindStringSubmatch(string(gomod))
	require.NotNil(t, release)
	require.Contains(t, dockerfile, " golang:"+release[1]+"-", "go.mod wants another Go")

	commands := regexp.MustCompile(`(?m)\bCMD (\[.*\])$`).FindAllStringSubmatch(dockerfile, -1)
	require.Len(t, commands, 2, "the health check and the default")
	for _, command := range commands {
		var args []string
		require.NoError(t, json.Unmarshal([]byte(command[1]), &args))
		if args[0] == "/sluice" { // the health check has no entry point before it
			args = args[1:]
		}
		knownCommand(t, args)
	}

	ignore, err := os.ReadFile(".dockerignore")
	require.NoError(t, err)
	sent := map[string]bool{}
	for _, p := range listPackages(t) {
		directory, _, _ := strings.Cut(p.path(), "/")
		if directory != "" {
			sent["!"+directory] = true
		}
	}
	require.Subset(t, strings.Fields(string(ignore)), slices.Collect(maps.Keys(sent)), "the builder does not get every package")
}
