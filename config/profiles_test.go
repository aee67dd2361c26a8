package config_test

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"sluice/config"
)

func TestProfiles(t *testing.T) {
	profiles := map[string]struct{ broker, store string }{
		"gochannel.yaml":     {"gochannel", "sqlite"},
		"amqp.yaml":          {"amqp", "sqlite"},
		"amqp-postgres.yaml": {"amqp", "postgres"},
		"sql.yaml":           {"sql", "postgres"},
	}
	entries, err := os.ReadDir("profiles")
	require.NoError(t, err)
	require.Len(t, entries, len(profiles))
	defaults := map[string]string{}
	for _, key := range config.Keys() {
		defaults[key.Name] = key.Default
	}
	for name, want := range profiles {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join("profiles", name)
			cfg, err := config.Load(path, nil, nil)
			require.NoError(t, err)
			require.Equal(t, want.broker, cfg.PubSub.Backend)
			require.Equal(t, want.store, cfg.Store.Driver)
			require.NoError(t, cfg.CheckModules(config.Modules()))

			text, err := os.ReadFile(path)
			require.NoError(t, err)
			var sections map[string]map[string]string
			require.NoError(t, yaml.Unmarshal(text, &sections))
			for section, values := range sections {
				for key, value := range values {
					if key = section + "." + key; key != "pubsub.backend" { // what a profile is about
						require.NotEqual(t, defaults[key], value, "%s is the default; a profile names what differs", key)
					}
				}
			}
		})
	}
}
