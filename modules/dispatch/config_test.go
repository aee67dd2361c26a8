package dispatch_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"

	"sluice/modules/dispatch"
)

func TestDefaultsAreValid(t *testing.T) {
	require.NoError(t, dispatch.DefaultConfig().Validate())
	require.NoError(t, dispatch.DefaultBackendConfig().Validate())
}

func TestValidateNamesEachFault(t *testing.T) {
	require.EqualError(t, dispatch.Config{Concurrency: 0, MaxResponse: -1}.Validate(),
		"dispatch.concurrency: must be at least 1, is 0\n"+
			"dispatch.max_response: must be at least 0, is -1B")

	require.EqualError(t, dispatch.BackendConfig{URL: "ftp://host", Timeout: -1, Headers: dispatch.Headers{
		"idempotency-key": "hunter2", "Content-Length": "hunter2", "traceparent": "hunter2",
		"two words": "hunter2", "X-Line": "hunter2\n", "x-key": "hunter2", "X-KEY": "hunter2", "X-Fine": "hunter2",
	}}.Validate(),
		"backend.url: must begin with http:// or https://, its scheme is \"ftp\"\n"+
			"backend.timeout: must be above 0, is -1ns\n"+
			"backend.headers.Content-Length: is set by sluice and cannot be configured\n"+
			"backend.headers.X-Line: its value holds characters that a header cannot\n"+
			"backend.headers.idempotency-key: is set by sluice and cannot be configured\n"+
			"backend.headers.traceparent: is set by sluice and cannot be configured\n"+
			"backend.headers.two words: is not the name of a header\n"+
			"backend.headers.x-key: is the same header as backend.headers.X-KEY")
}

func TestValidateURL(t *testing.T) {
	for text, want := range map[string]string{
		"http://localhost:9090/orders":    "",
		"https://u:p@[::1]:8443/o?token=": "",
		"http://host":                     "",
		"":                                `must begin with http:// or https://, its scheme is ""`,
		"/orders":                         `must begin with http:// or https://, its scheme is ""`,
		"localhost:9090/orders":           `must begin with http:// or https://, its scheme is "localhost"`,
		"http://":                         "must have a host",
		"http://:9090/orders":             "must have a host",
		"http://host:70000":               "must have a port up to 65535, its port is 70000",
		"http://user:hunter2/@host":       "is not a URL",
		"http://user:hunter2@ho st/":      "is not a URL",
	} {
		cfg := dispatch.DefaultBackendConfig()
		cfg.URL = text
		err := cfg.Validate()
		if want == "" {
			require.NoError(t, err, text)
			continue
		}
		require.EqualError(t, err, "backend.url: "+want, text)
	}
}

func TestNewClientRefusesAFaultyConfiguration(t *testing.T) {
	_, err := dispatch.NewClient(dispatch.BackendConfig{}, dispatch.Config{}, quietDeps())

	require.ErrorContains(t, err, "backend.url: ")
	require.ErrorContains(t, err, "backend.timeout: ")
	require.ErrorContains(t, err, "dispatch.concurrency: ")
}

func TestHeadersHideTheirValues(t *testing.T) {
	cfg := dispatch.BackendConfig{Headers: dispatch.Headers{"Authorization": "hunter2", "X-Key": "hunter2"}}
	const want = "map[Authorization:<secret> X-Key:<secret>]"

	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%d", "%x", "%t"} {
		require.Equal(t, want, fmt.Sprintf(verb, cfg.Headers), verb)
		require.Contains(t, fmt.Sprintf(verb, cfg), want, verb)
	}
	require.Equal(t, map[string]string{"Authorization": "<secret>", "X-Key": "<secret>"}, cfg.Headers.Redacted())

	text, err := json.Marshal(cfg)
	require.NoError(t, err)
	require.NotContains(t, string(text), "hunter2")
	require.Contains(t, string(text), `"Authorization":"\u003csecret\u003e"`)

	fields, err := cfg.Headers.MarshalYAML()
	require.NoError(t, err)
	require.Equal(t, cfg.Headers.Redacted(), fields)

	var log bytes.Buffer
	for _, handler := range []slog.Handler{slog.NewTextHandler(&log, nil), slog.NewJSONHandler(&log, nil)} {
		slog.New(handler).Info("configuration", "backend", cfg, "headers", cfg.Headers)
	}
	require.NotContains(t, log.String(), "hunter2")
	require.Contains(t, log.String(), "X-Key")
}
