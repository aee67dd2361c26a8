package e2e

import (
	"bytes"
	"context"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"
)

// curl runs a shell script whose curl lines speak to the gateway, and returns
// the status of each answer, in their order.
func (g *gateway) curl(t *testing.T, script string) []string {
	t.Helper()
	if _, err := exec.LookPath("curl"); err != nil {
		if os.Getenv("CI") != "" {
			require.NoError(t, err, "CI must not skip what needs curl")
		}
		t.Skip("curl is not installed")
	}
	script = strings.ReplaceAll(script, "localhost:8080", strings.TrimPrefix(g.url, "http://"))
	script = strings.ReplaceAll(script, "localhost:8081", strings.TrimPrefix(g.admin, "http://"))
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-ec", `curl() { command curl -s -w '%{stderr}%{http_code}\n' "$@"; }`+"\n"+script)
	cmd.Dir = t.TempDir()
	var out, statuses bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &statuses
	require.NoError(t, cmd.Run(), "%s\n%s\n%s", script, out.String(), statuses.String())
	return strings.Fields(statuses.String())
}

func TestTheCurlLinesOfTheREADMEWork(t *testing.T) {
	text, err := os.ReadFile("../README.md")
	require.NoError(t, err)
	_, section, found := strings.Cut(string(text), "\n## The API by curl\n")
	require.True(t, found)
	block := regexp.MustCompile("(?s)```sh\n(.*?)```").FindStringSubmatch(section)
	require.NotNil(t, block)
	var want []string
	for _, line := range regexp.MustCompile(`(?m)\bcurl .*# (\d{3})`).FindAllStringSubmatch(block[1], -1) {
		want = append(want, line[1])
	}
	require.Len(t, want, strings.Count(block[1], "curl "), "each line says its status")

	b := backend(t, "--latency", "1ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b))
	require.Equal(t, want, g.curl(t, block[1]))

	var doc struct {
		Paths map[string]map[string]any
	}
	openapi, err := os.ReadFile("../modules/intake/openapi.yaml")
	require.NoError(t, err)
	require.NoError(t, yaml.Unmarshal(openapi, &doc))
	for path := range doc.Paths {
		pattern := strings.ReplaceAll(strings.ReplaceAll(regexp.QuoteMeta(path), `\{id\}`, `\$id`), `\{name\}`, `[a-z-]+`)
		require.Regexp(t, `localhost:8080`+pattern+`\b`, section, "no line for %s", path)
	}
}

// The samples of the document are what a reader copies first.
func TestTheSamplesOfTheDocumentWork(t *testing.T) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b))
	var doc struct {
		Paths map[string]map[string]yaml.Node
	}
	require.NoError(t, yaml.Unmarshal(do(t, http.MethodGet, g.url+"/openapi.yaml", "", nil).body, &doc))
	id := g.accept(t, "A-0").ID
	n := 0
	for _, item := range doc.Paths {
		for _, node := range item {
			var operation struct {
				Samples []struct{ Source string } `yaml:"x-codeSamples"`
			}
			if node.Kind != yaml.MappingNode {
				continue
			}
			require.NoError(t, node.Decode(&operation))
			for _, sample := range operation.Samples {
				statuses := g.curl(t, "id="+id+"\nprintf '%s\\n' '"+body("A-1")+"' >orders.ndjson\n"+sample.Source)
				require.Len(t, statuses, 1)
				require.Regexp(t, "^20[02]$", statuses[0], sample.Source)
				n++
			}
		}
	}
	require.GreaterOrEqual(t, n, 13)
}

// The example is a program of its own, as a client's author would build it.
func TestTheExampleClientWorks(t *testing.T) {
	program := filepath.Join(t.TempDir(), "client")
	if runtime.GOOS == "windows" {
		program += ".exe"
	}
	out, err := exec.CommandContext(t.Context(), "go", "build", "-o", program, "sluice/examples/client").CombinedOutput()
	require.NoError(t, err, "%s", out)
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b))
	for _, test := range []struct {
		name, order string
		works       bool
		says        []string
	}{
		{"saved", body("A-1"), true, []string{"order A-1 is saved after 1 attempts\n"}},
		{"again", body("A-1"), true, []string{"order A-1 is saved after 1 attempts\n"}},
		{"rejected", body("A-2-REJECT"), true, []string{"order A-2-REJECT is rejected after 1 attempts\n", "because: 400 Bad Request: "}},
		{"invalid", `{"orderNumber":"A-3"}`, false, []string{"422 The order does not satisfy the order schema", "/items is required"}},
		{"a duplicate", strings.Replace(body("A-1"), "tea", "cup", 1), false, []string{"409 Another order has this number"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			cmd := exec.CommandContext(ctx, program, g.url)
			cmd.Stdin = strings.NewReader(test.order)
			out, err := cmd.CombinedOutput()
			require.Equal(t, test.works, err == nil, "%v\n%s", err, out)
			for _, says := range test.says {
				require.Contains(t, string(out), says)
			}
		})
	}
}
