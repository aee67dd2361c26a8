package config_test

import (
	"fmt"
	"math"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/units"
	"github.com/spf13/pflag"
	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	"pgregory.net/rapid"

	"sluice/config"
	"sluice/modules/dispatch"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func ExampleLoad() {
	cfg, err := config.Load("", []string{"SLUICE_DISPATCH_CONCURRENCY=8"}, map[string]string{"backend.timeout": "250ms"})
	fmt.Println(cfg.Dispatch.Concurrency, cfg.Backend.Timeout, err)

	_, err = config.Load("", []string{"SLUICE_DISPATCH_CONCURENCY=8"}, map[string]string{"backend.timeout": "250"})
	fmt.Println(err)
	// Output:
	// 8 250ms <nil>
	// SLUICE_DISPATCH_CONCURENCY: unknown environment variable, did you mean SLUICE_DISPATCH_CONCURRENCY?
	// backend.timeout: "250" is not a duration such as 250ms, 30s or 5m (flag --backend-timeout)
}

func TestTheDefaultsAreValid(t *testing.T) {
	require.NoError(t, config.Default().Validate())
	require.NoError(t, config.Default().CheckModules(config.Modules()))
}

func TestTheReferenceEqualsTheDefaults(t *testing.T) {
	cfg, err := config.Load("sluice.yaml", nil, nil)
	require.NoError(t, err)
	want := config.Default()
	want.Backend.Headers = dispatch.Headers{} // written out as {}
	require.Equal(t, want, cfg)
}

func TestTheReferenceHasEveryKeyAsItIsPrintedWithAComment(t *testing.T) {
	text, err := os.ReadFile("sluice.yaml")
	require.NoError(t, err)
	var uncommented []string
	for line := range strings.Lines(string(text)) {
		if line = strings.TrimRight(line, "\n"); line != "" && !strings.HasPrefix(strings.TrimSpace(line), "#") {
			uncommented = append(uncommented, line)
		}
	}
	printed, err := config.Default().YAML()
	require.NoError(t, err)
	written := strings.Join(uncommented, "\n") + "\n"
	written = strings.ReplaceAll(written, "//guest:guest@", "//guest:<secret>@") // a password, though everybody knows it
	require.Equal(t, string(printed), written)

	for _, key := range config.Keys() {
		require.NotEmpty(t, key.Description, "%s has no comment in sluice.yaml", key.Name)
		require.LessOrEqual(t, len(key.Summary()), 110, "the help of %s is one line: end its first sentence earlier", key.Name)
	}
}

func TestNamesOfKeysAreDerivedAndUnique(t *testing.T) {
	seen := map[string]bool{}
	for _, key := range config.Keys() {
		require.Equal(t, "SLUICE_"+strings.ToUpper(strings.ReplaceAll(key.Name, ".", "_")), key.Env)
		require.Equal(t, strings.NewReplacer(".", "-", "_", "-").Replace(key.Name), key.Flag)
		require.Contains(t, []string{"string", "int", "duration", "size", "map", "list"}, key.Type, "%s has a type that Load cannot read", key.Name)
		for _, name := range []string{key.Name, key.Env, key.Flag} {
			require.False(t, seen[name], "%s stands for two things", name)
			seen[name] = true
		}
	}
}

// The contract with users names these; they are not renamed or removed.
func TestTheKeysOfTheContractExist(t *testing.T) {
	defaults := map[string]string{}
	for _, key := range config.Keys() {
		defaults[key.Name] = key.Default
	}
	for name, value := range map[string]string{
		"http.addr": ":8080", "http.admin_addr": "127.0.0.1:8081", "http.tls_cert": "", "http.tls_key": "", "http.api_keys": "", "http.shutdown_timeout": "30s",
		"store.driver": "sqlite", "store.dsn": "data/sluice.db", "store.retention": "720h",
		"pubsub.backend": "gochannel", "pubsub.gochannel.window": "10000",
		"pubsub.sql.dsn": "", "pubsub.sql.prefix": "sluice", "pubsub.sql.timeout": "10s",
		"intake.schema": "", "intake.order_number_pointer": "/orderNumber", "intake.max_body": "1MiB",
		"intake.max_backlog": "0", "intake.max_wait": "30s", "intake.sync_limit": "0",
		"dispatch.concurrency": "64", "dispatch.max_response": "64KiB",
		"dispatch.max_attempts": "10", "dispatch.retry_initial": "1s", "dispatch.retry_max": "5m",
		"backend.url": "http://localhost:9090/orders", "backend.timeout": "10s", "backend.headers": "",
		"log.level": "info", "log.format": "text",
	} {
		require.Contains(t, defaults, name)
		require.Equal(t, value, defaults[name], name)
	}
}

func TestWhatIsPrintedCanBeLoadedAgain(t *testing.T) {
	file := write(t, "")
	keys := config.Keys()
	rapid.Check(t, func(t *rapid.T) {
		flags := map[string]string{}
		for _, key := range keys {
			switch {
			case key.Name == "http.addr", key.Name == "store.dsn":
				flags[key.Name] = rapid.SampledFrom([]string{":0", "1:2", "[::1]:80", "host:99"}).Draw(t, key.Name)
			case key.Type == "duration":
				flags[key.Name] = time.Duration(rapid.Int64Range(int64(time.Minute), math.MaxInt64).Draw(t, key.Name)).String()
			case key.Name == "intake.max_body":
				flags[key.Name] = units.Base2Bytes(rapid.Int64Range(1, 1<<50).Draw(t, key.Name)).String()
			case key.Name == "http.rate_limit":
				flags[key.Name] = fmt.Sprint(rapid.IntRange(0, 1000).Draw(t, key.Name))
			case key.Name == "http.rate_burst":
				flags[key.Name] = fmt.Sprint(rapid.IntRange(1000, 1e9).Draw(t, key.Name))
			case key.Type == "int":
				flags[key.Name] = fmt.Sprint(rapid.IntRange(1, math.MaxInt).Draw(t, key.Name))
			}
		}
		cfg, err := config.Load("", nil, flags)
		if err != nil {
			t.Skip("limits of one key depend on another") // retry_max and retry_initial, for one
		}
		text, err := cfg.YAML()
		require.NoError(t, err)
		require.NoError(t, os.WriteFile(file, text, 0o600))
		again, err := config.Load(file, nil, nil)
		require.NoError(t, err, string(text))
		again.Backend.Headers = nil
		again.PubSub.AMQP.URL = cfg.PubSub.AMQP.URL // was printed without its password
		require.Equal(t, cfg, again)
	})
}

func TestSecretsAreNotPrinted(t *testing.T) {
	cfg, err := config.Load("", nil, map[string]string{
		"backend.headers": "Authorization:Bearer hunter2,X-Tenant:hunter2",
		"backend.url":     "https://sluice:hunter2@backend.example/orders?a=b@c",
		"store.dsn":       "file:x.db?password=hunter2&mode=rw",
		"pubsub.amqp.url": "amqps://sluice:hunter2@rabbit.example/orders",
		"http.api_keys":   "shop:" + strings.Repeat("0b", 32) + ",pos:" + strings.Repeat("0c", 32),
	})
	require.NoError(t, err)
	text, err := cfg.YAML()
	require.NoError(t, err)
	require.NotContains(t, string(text), "hunter2")
	require.NotContains(t, string(text), "0b0b")
	for _, shown := range []string{
		"api_keys:\n    - shop:<secret>\n    - pos:<secret>\n",
		"Authorization: <secret>\n", "X-Tenant: <secret>\n",
		"url: https://sluice:<secret>@backend.example/orders?a=b@c\n",
		"dsn: file:x.db?password=<secret>&mode=rw\n",
		"url: amqps://sluice:<secret>@rabbit.example/orders\n",
	} {
		require.Contains(t, string(text), shown)
	}
}

func TestThePasswordOfADatabaseIsNotPrinted(t *testing.T) {
	cfg, err := config.Load("", nil, map[string]string{
		"store.driver": "postgres", "store.dsn": "postgres://sluice:hunter%2F2@db.example:5432/orders?sslmode=require&sslpassword=hunter%2F2",
	})
	require.NoError(t, err)
	text, err := cfg.YAML()
	require.NoError(t, err)
	require.NotContains(t, string(text), "hunter")
	require.Contains(t, string(text), "dsn: postgres://sluice:<secret>@db.example:5432/orders?sslmode=require&sslpassword=<secret>\n")
}

func TestAFaultyDSNIsRefusedWithoutRepeatingIt(t *testing.T) {
	for name, dsn := range map[string]string{
		"a file":                       "data/hunter2.db",
		"no URL":                       "host=db user=sluice password=hunter2",
		"another database":             "mysql://sluice:hunter2@db/orders",
		"a slash in the password":      "postgres://sluice:hun/ter2@db/orders",
		"a percent sign in it":         "postgres://sluice:hunter2%@db/orders",
		"an unknown value":             "postgres://sluice:hunter2@db/orders?sslmode=hunter2",
		"a port that is not a number":  "postgres://sluice:hunter2@db:hunter2/orders",
		"nothing":                      "",
		"a timeout that is not a time": "postgres://sluice:hunter2@db/orders?connect_timeout=soon",
	} {
		t.Run(name, func(t *testing.T) {
			_, err := config.Load("", nil, map[string]string{"store.driver": "postgres", "store.dsn": dsn})
			require.ErrorContains(t, err, "store.dsn: ")
			require.NotContains(t, err.Error(), "ter2")
			require.NotContains(t, err.Error(), "hun")
			require.NotContains(t, err.Error(), "\n")
		})
	}
}

func TestTheBrokersDatabaseIsTheStoresUnlessItIsNamed(t *testing.T) {
	const store, own = "postgres://sluice:hunter2@store/orders", "postgresql://sluice:hunter2@broker/messages"
	tests := []struct {
		name  string
		flags map[string]string
		want  string
	}{
		{"the store's", map[string]string{"pubsub.backend": "sql", "store.dsn": store}, store},
		{"its own", map[string]string{"pubsub.backend": "sql", "store.dsn": store, "pubsub.sql.dsn": own}, own},
		{"none for another broker", map[string]string{"store.dsn": store}, ""},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			cfg, err := config.Load("", nil, test.flags)
			require.NoError(t, err)
			require.Equal(t, test.want, cfg.PubSub.SQL.DSN)
			text, err := cfg.YAML()
			require.NoError(t, err)
			require.NotContains(t, string(text), "hunter2")
		})
	}

	_, err := config.Load("", nil, map[string]string{"pubsub.backend": "sql", "pubsub.sql.prefix": "Sluice-1"})
	require.EqualError(t, err, "pubsub.sql.dsn: must be an address such as postgres://user:password@host:5432/database; it can stay empty where store.dsn is one\n"+
		`pubsub.sql.prefix: must be 1 to 40 characters of a-z, 0-9 and _, and begin with no digit, is "Sluice-1" (flag --pubsub-sql-prefix)`)
}

func TestFlags(t *testing.T) {
	flags := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	config.AddFlags(flags)
	require.NoError(t, flags.Parse([]string{"--http-addr", ":0", "--dispatch-max-attempts=3", "--backend-headers", "X-A:a,X-B:b", "--log-level="}))
	require.Equal(t, map[string]string{
		"http.addr": ":0", "dispatch.max_attempts": "3", "backend.headers": "X-A:a,X-B:b", "log.level": "",
	}, config.FromFlags(flags))
}

func TestCheckModules(t *testing.T) {
	tests := []struct {
		name    string
		modules []string
		want    string
	}{
		{"all", []string{"dispatch", "intake"}, ""},
		{"some", []string{"dispatch"}, "pubsub.backend: gochannel cannot leave the process, so it needs the modules intake, dispatch in it, without intake"},
		{"none", nil, "modules: names none, want some of intake, dispatch"},
		{"unknown", []string{"intake", "dispatch", "billing"}, `modules: unknown module "billing", want some of intake, dispatch`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			err := config.Default().CheckModules(test.modules)
			if test.want == "" {
				require.NoError(t, err)
				return
			}
			var faults *config.Error
			require.ErrorAs(t, err, &faults)
			require.EqualError(t, err, test.want)
		})
	}
}

func TestModulesAreACopy(t *testing.T) {
	slices.Reverse(config.Modules())
	require.Equal(t, []string{"intake", "dispatch"}, config.Modules())
}
