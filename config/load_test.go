package config_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/alecthomas/units"
	"github.com/stretchr/testify/require"

	"sluice/config"
	"sluice/modules/dispatch"
	"sluice/platform/httpserver"
)

var update = flag.Bool("update", false, "write the golden files")

func golden(t *testing.T, name, got string) {
	t.Helper()
	file := filepath.Join("testdata", name+".golden")
	if *update {
		require.NoError(t, os.WriteFile(file, []byte(got), 0o600))
	}
	want, err := os.ReadFile(file)
	require.NoError(t, err)
	require.Equal(t, string(want), got)
}

func write(t *testing.T, text string) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "sluice.yaml")
	require.NoError(t, os.WriteFile(file, []byte(text), 0o600))
	return file
}

func TestLoadWithoutSourcesGivesTheDefaults(t *testing.T) {
	cfg, err := config.Load("", nil, nil)
	require.NoError(t, err)
	require.Equal(t, config.Default(), cfg)
}

func TestLaterSourcesGoBeforeEarlierOnes(t *testing.T) {
	file := write(t, "dispatch: {concurrency: 1, max_attempts: 2, retry_initial: 3s}\n")
	cfg, err := config.Load(file,
		[]string{"SLUICE_DISPATCH_MAX_ATTEMPTS=20", "SLUICE_DISPATCH_RETRY_INITIAL=30s", "HOME=/"},
		map[string]string{"dispatch.retry_initial": "31s"})
	require.NoError(t, err)

	want := config.Default()
	want.Dispatch.Concurrency = 1
	want.Dispatch.MaxAttempts = 20
	want.Dispatch.RetryInitial = 31 * time.Second
	require.Equal(t, want, cfg)
}

func TestEveryTypeOfValueIsReadFromEverySource(t *testing.T) {
	want := config.Default()
	want.HTTP.Addr = ":0"
	want.HTTP.ReadTimeout = 90 * time.Second
	want.Intake.MaxBody = 1536 * units.KiB
	want.Intake.MaxBacklog = 7
	want.Intake.OrderNumberPointer = ""
	want.Backend.Headers = dispatch.Headers{"Authorization": "Bearer a:b", "X-Tenant": "t"}
	shop, pos := "shop:"+strings.Repeat("0b", 32), "pos:"+strings.Repeat("0C", 32)
	want.HTTP.APIKeys = httpserver.APIKeys{shop, pos}

	cfg, err := config.Load(write(t, `
http:
  addr: ":0"
  read_timeout: 1m30s
  api_keys:
    - `+shop+`
    - `+pos+`
intake: {max_body: 1.5MiB, max_backlog: 7, order_number_pointer: ""}
backend:
  headers:
    Authorization: Bearer a:b
    X-Tenant: t
`), nil, nil)
	require.NoError(t, err)
	require.Equal(t, want, cfg)

	cfg, err = config.Load("", []string{
		"SLUICE_HTTP_ADDR=:0", "SLUICE_HTTP_READ_TIMEOUT=1m30s", "SLUICE_INTAKE_MAX_BODY=1.5MiB", "SLUICE_INTAKE_MAX_BACKLOG=7",
		"SLUICE_INTAKE_ORDER_NUMBER_POINTER=", "SLUICE_BACKEND_HEADERS=Authorization: Bearer a:b, X-Tenant: t",
		"SLUICE_HTTP_API_KEYS=" + shop + ", " + pos,
	}, nil)
	require.NoError(t, err)
	require.Equal(t, want, cfg)

	cfg, err = config.Load("", nil, map[string]string{
		"http.addr": ":0", "http.read_timeout": "1m30s", "intake.max_body": "1.5MiB", "intake.max_backlog": "7",
		"intake.order_number_pointer": "", "backend.headers": "Authorization: Bearer a:b, X-Tenant: t",
		"http.api_keys": shop + "," + pos,
	})
	require.NoError(t, err)
	require.Equal(t, want, cfg)
}

func TestAMapIsReplacedAsAWhole(t *testing.T) {
	cfg, err := config.Load(write(t, "backend: {headers: {X-A: a, X-B: b}}\n"), []string{"SLUICE_BACKEND_HEADERS=X-C:c"}, nil)
	require.NoError(t, err)
	require.Equal(t, dispatch.Headers{"X-C": "c"}, cfg.Backend.Headers)
}

func TestAFileMayLeaveThingsOut(t *testing.T) {
	for name, text := range map[string]string{
		"nothing":           "",
		"comments":          "# http:\n#   addr: x\n",
		"an empty section":  "http:\nlog:\n  # level: debug\n",
		"an empty document": "---\n",
	} {
		t.Run(name, func(t *testing.T) {
			cfg, err := config.Load(write(t, text), nil, nil)
			require.NoError(t, err)
			require.Equal(t, config.Default(), cfg)
		})
	}
}

func TestAliasesAreFollowed(t *testing.T) {
	cfg, err := config.Load(write(t, "http: {read_timeout: &t 20s, idle_timeout: *t}\n"), nil, nil)
	require.NoError(t, err)
	require.Equal(t, 20*time.Second, cfg.HTTP.IdleTimeout)
}

func TestVariablesOfTheTestsAreNotKeys(t *testing.T) {
	_, err := config.Load("", []string{"SLUICE_TEST_POSTGRES=x", "SLUICEGATE=open"}, nil)
	require.NoError(t, err)
}

func TestFaultsAreToldAllAtOnce(t *testing.T) {
	tests := []struct {
		name, file string
		environ    []string
		flags      map[string]string
	}{
		{
			name:    "everywhere",
			file:    "testdata/everywhere.yaml",
			environ: []string{"SLUICE_HTTP_ADR=:1", "SLUICE_INTAKE_MAX_WAIT=30", "SLUICE_STORE_DRIVER=postgress", "SLUICE_BACKEND_HEADERS=my-secret"},
			flags:   map[string]string{"dispatch.max_response": "64", "store.retention": "0s", "no.such.key": "1"},
		},
		{
			name:    "values",
			file:    "testdata/values.yaml",
			environ: []string{"SLUICE_BACKEND_TIMEOUT=-1s", "SLUICE_BACKEND_URL=ftp://user:password@host"},
			flags:   map[string]string{"pubsub.backend": "kafka"},
		},
		{
			name: "keys",
			file: "testdata/keys.yaml",
		},
		{
			name:    "keys-variable",
			environ: []string{"SLUICE_HTTP_API_KEYS=my-secret-key,,shop:my-secret-key,", "SLUICE_HTTP_RATE_LIMIT=-1", "SLUICE_HTTP_RATE_BURST=2000000000"},
		},
		{name: "syntax", file: "testdata/syntax.yaml"},
		{name: "list", file: "testdata/list.yaml"},
		{name: "documents", file: "testdata/documents.yaml"},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			cfg, err := config.Load(test.file, test.environ, test.flags)
			var faults *config.Error
			require.ErrorAs(t, err, &faults)
			require.NotContains(t, err.Error(), "secret", "values of headers are secrets")
			require.NotContains(t, err.Error(), "password")
			require.Zero(t, cfg)
			golden(t, test.name, err.Error()+"\n")
		})
	}
}

func TestAMissingFileIsAFaultAmongOthers(t *testing.T) {
	_, err := config.Load(filepath.Join(t.TempDir(), "none.yaml"), []string{"SLUICE_LOG_LEVEL=loud"}, nil)
	var faults *config.Error
	require.ErrorAs(t, err, &faults)
	require.ErrorIs(t, err, os.ErrNotExist)
	require.Len(t, faults.Faults, 2)
}

// The file is what a stranger may have written: whatever is in it, Load returns.
func FuzzLoad(f *testing.F) {
	for _, name := range []string{"sluice.yaml", "testdata/everywhere.yaml", "testdata/syntax.yaml"} {
		text, err := os.ReadFile(name)
		require.NoError(f, err)
		f.Add(text)
	}
	f.Add([]byte("http: &a\n  addr: *a\nbackend: &b {headers: &c {x: *c, y: *b}}\n<<: *a\n? [x]\n: y\n"))
	file := filepath.Join(f.TempDir(), "sluice.yaml")
	f.Fuzz(func(t *testing.T, text []byte) {
		require.NoError(t, os.WriteFile(file, text, 0o600))
		cfg, err := config.Load(file, nil, nil)
		if err != nil {
			return
		}
		_, err = cfg.YAML()
		require.NoError(t, err)
	})
}
