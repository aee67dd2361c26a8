package dispatch_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/alecthomas/units"
	"github.com/dunglas/httpsfv"
	"github.com/stretchr/testify/require"
	"go.opentelemetry.io/otel/attribute"
	metricnoop "go.opentelemetry.io/otel/metric/noop"
	"go.opentelemetry.io/otel/propagation"
	sdkmetric "go.opentelemetry.io/otel/sdk/metric"
	"go.opentelemetry.io/otel/sdk/metric/metricdata"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"go.opentelemetry.io/otel/trace"
	tracenoop "go.opentelemetry.io/otel/trace/noop"
	"go.uber.org/goleak"

	"sluice/modules/contract"
	"sluice/modules/dispatch"
)

func TestMain(m *testing.M) {
	if os.Getenv(proxyChild) != "" {
		os.Exit(attemptThroughProxy())
	}
	goleak.VerifyTestMain(m)
}

// patience is a backend.timeout that no test reaches, however slow the machine.
const patience = time.Hour

func quietDeps() dispatch.Deps {
	return dispatch.Deps{
		Logger:         slog.New(slog.DiscardHandler),
		TracerProvider: tracenoop.NewTracerProvider(),
		MeterProvider:  metricnoop.NewMeterProvider(),
		Propagator:     propagation.TraceContext{},
	}
}

// newClient makes a client that is closed at the end of the test. Each change
// is applied to the settings first.
func newClient(t *testing.T, backendURL string, changes ...func(*dispatch.BackendConfig, *dispatch.Config, *dispatch.Deps)) *dispatch.Client {
	t.Helper()
	backend, cfg, deps := dispatch.BackendConfig{URL: backendURL, Timeout: patience}, dispatch.DefaultConfig(), quietDeps()
	for _, change := range changes {
		change(&backend, &cfg, &deps)
	}
	client, err := dispatch.NewClient(backend, cfg, deps)
	require.NoError(t, err)
	t.Cleanup(client.Close)
	return client
}

func withTimeout(d time.Duration) func(*dispatch.BackendConfig, *dispatch.Config, *dispatch.Deps) {
	return func(b *dispatch.BackendConfig, _ *dispatch.Config, _ *dispatch.Deps) { b.Timeout = d }
}

func withMaxResponse(n units.Base2Bytes) func(*dispatch.BackendConfig, *dispatch.Config, *dispatch.Deps) {
	return func(_ *dispatch.BackendConfig, c *dispatch.Config, _ *dispatch.Deps) { c.MaxResponse = n }
}

func withHeaders(h dispatch.Headers) func(*dispatch.BackendConfig, *dispatch.Config, *dispatch.Deps) {
	return func(b *dispatch.BackendConfig, _ *dispatch.Config, _ *dispatch.Deps) { b.Headers = h }
}

const orderID = "019ab9f0-7c1e-7d3a-8b44-1f2e3d4c5b6a"

func newOrder() contract.Submitted {
	return contract.Submitted{
		OrderID:     orderID,
		OrderNumber: "A-1001",
		Attempt:     3,
		ContentType: "application/json",
		AcceptedAt:  time.Date(2026, time.November, 22, 10, 0, 0, 0, time.UTC),
		Body:        []byte(`{"orderNumber": "A-1001",  "note":"byte for byte"}`),
	}
}

func attempt(t *testing.T, client *dispatch.Client, order contract.Submitted) contract.Outcome {
	t.Helper()
	outcome, err := client.Attempt(t.Context(), order)
	require.NoError(t, err)
	return outcome
}

func TestAttemptSendsWhatTheContractSays(t *testing.T) {
	var got *http.Request
	var body []byte
	backend := newBackend(t, func(_ http.ResponseWriter, r *http.Request) {
		got = r.Clone(context.WithoutCancel(r.Context()))
		body, _ = io.ReadAll(r.Body)
	})
	client := newClient(t, backend.URL+"/v1/orders?tenant=7#part", withHeaders(dispatch.Headers{"x-api-key": "k1", "Host": "orders.example"}))

	outcome := attempt(t, client, newOrder())

	require.Equal(t, contract.TypeSaved, outcome.Type)
	require.Equal(t, http.MethodPost, got.Method)
	require.Equal(t, "/v1/orders?tenant=7", got.RequestURI)
	require.Equal(t, "orders.example", got.Host)
	require.Equal(t, string(newOrder().Body), string(body))
	require.EqualValues(t, len(body), got.ContentLength)
	require.Equal(t, http.Header{
		"Content-Type":    {"application/json"},
		"Content-Length":  {fmt.Sprint(len(body))},
		"Idempotency-Key": {`"` + orderID + `"`},
		"X-Order-Number":  {"A-1001"},
		"X-Attempt":       {"3"},
		"X-Api-Key":       {"k1"},
		"User-Agent":      {"sluice"},
	}, got.Header)
}

func TestAttemptLeavesOutWhatTheOrderHasNot(t *testing.T) {
	var got http.Header
	backend := newBackend(t, func(_ http.ResponseWriter, r *http.Request) { got = r.Header.Clone() })
	client := newClient(t, backend.URL)
	order := newOrder()
	order.OrderNumber, order.ContentType = "", ""

	outcome := attempt(t, client, order)

	require.Equal(t, contract.TypeSaved, outcome.Type)
	require.NotContains(t, got, "X-Order-Number")
	require.Equal(t, "application/octet-stream", got.Get("Content-Type"))
}

func TestAttemptMakesHeadersSafe(t *testing.T) {
	var got http.Header
	backend := newBackend(t, func(_ http.ResponseWriter, r *http.Request) { got = r.Header.Clone() })
	client := newClient(t, backend.URL)

	for _, tc := range []struct{ name, number, want string }{
		{"as it is", `A/10 01;"b"\c`, `A/10 01;"b"\c`},
		{"injection", "A\r\nX-Evil: 1", "A%0D%0AX-Evil: 1"},
		{"spaces at the ends", " A ", "%20A%20"},
		{"percent", "50%41", "50%2541"},
		{"beyond ASCII", "Ä1", "%C3%841"},
		{"broken UTF-8", "A\xff\x7f", "A%FF%7F"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			order := newOrder()
			order.OrderID, order.OrderNumber = tc.number, tc.number

			outcome := attempt(t, client, order)

			require.Equal(t, contract.TypeSaved, outcome.Type)
			require.Equal(t, tc.want, got.Get("X-Order-Number"))
			require.NotContains(t, got, "X-Evil")
			decoded, err := url.PathUnescape(tc.want)
			require.NoError(t, err)
			require.Equal(t, tc.number, decoded)

			key, err := httpsfv.UnmarshalItem(got.Values("Idempotency-Key"))
			require.NoError(t, err)
			require.Equal(t, tc.want, key.Value, "the key must be a structured-field string")
		})
	}

	t.Run("a number too long for a header", func(t *testing.T) {
		order := newOrder()
		order.OrderNumber = strings.Repeat("9", 1025)
		require.Equal(t, contract.TypeSaved, attempt(t, client, order).Type)
		require.NotContains(t, got, "X-Order-Number")
	})
	t.Run("a content type that is none", func(t *testing.T) {
		order := newOrder()
		order.ContentType = "a\r\nb"
		require.Equal(t, contract.TypeSaved, attempt(t, client, order).Type)
		require.Equal(t, "application/octet-stream", got.Get("Content-Type"))
	})
}

func TestAttemptAuthenticatesWithTheUserOfTheURL(t *testing.T) {
	var user, password string
	backend := newBackend(t, func(_ http.ResponseWriter, r *http.Request) { user, password, _ = r.BasicAuth() })
	withUser := strings.Replace(backend.URL, "http://", "http://shop:s%40crt@", 1)

	attempt(t, newClient(t, withUser), newOrder())
	require.Equal(t, []string{"shop", "s@crt"}, []string{user, password})

	attempt(t, newClient(t, withUser, withHeaders(dispatch.Headers{"authorization": "Bearer x"})), newOrder())
	require.Empty(t, user, "a configured header wins")
}

func TestAttemptDecidesByStatus(t *testing.T) {
	backend := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		var status int
		_, _ = fmt.Sscanf(r.Header.Get("X-Order-Number"), "%d", &status)
		w.Header().Set("Retry-After", "7")
		w.Header().Set("Location", "/elsewhere")
		w.WriteHeader(status)
	})
	client := newClient(t, backend.URL)

	byType := map[string][]int{
		contract.TypeSaved:    {200, 201, 202, 203, 204, 205, 206, 226, 299},
		contract.TypeRejected: {400, 401, 402, 403, 404, 405, 406, 407, 409, 410, 411, 412, 413, 414, 415, 416, 417, 418, 421, 422, 423, 424, 426, 428, 431, 451, 499},
		contract.TypeAttemptFailed: {300, 301, 302, 303, 304, 305, 307, 308, 399, 408, 425, 429,
			500, 501, 502, 503, 504, 505, 507, 508, 511, 599, 600, 999},
	}
	for want, statuses := range byType {
		for _, status := range statuses {
			t.Run(fmt.Sprint(status), func(t *testing.T) {
				order := newOrder()
				order.OrderNumber = fmt.Sprint(status)

				outcome := attempt(t, client, order)

				require.Equal(t, want, outcome.Type)
				require.Equal(t, status, outcome.StatusCode)
				require.Equal(t, order.OrderID, outcome.OrderID)
				require.Equal(t, order.OrderNumber, outcome.OrderNumber)
				require.Equal(t, order.Attempt, outcome.Attempt)
				require.Positive(t, outcome.Duration)
				require.False(t, outcome.Timeout)
				switch want {
				case contract.TypeSaved:
					require.Empty(t, outcome.Error)
					require.Zero(t, outcome.RetryAfter)
				case contract.TypeRejected:
					require.Equal(t, strings.TrimSpace(fmt.Sprintf("backend answered %d %s", status, http.StatusText(status))), outcome.Error)
					require.Zero(t, outcome.RetryAfter, "only a failed attempt is followed by another")
				default:
					require.Equal(t, strings.TrimSpace(fmt.Sprintf("backend answered %d %s", status, http.StatusText(status))), outcome.Error)
					require.Equal(t, 7*time.Second, outcome.RetryAfter)
				}
			})
		}
	}
}

func TestAttemptDoesNotFollowRedirects(t *testing.T) {
	var requests atomic.Int64
	backend := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		requests.Add(1)
		http.Redirect(w, r, "/elsewhere", http.StatusTemporaryRedirect)
	})

	outcome := attempt(t, newClient(t, backend.URL), newOrder())

	require.Equal(t, contract.TypeAttemptFailed, outcome.Type)
	require.EqualValues(t, 1, requests.Load())
}

func TestAttemptKeepsTheProblemOfARejection(t *testing.T) {
	const problem = `{"type":"/problems/out-of-stock","title":"Out of stock","status":409}`
	backend := newBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/problem+json")
		w.WriteHeader(http.StatusConflict)
		_, _ = io.WriteString(w, problem)
	})

	outcome := attempt(t, newClient(t, backend.URL), newOrder())

	require.Equal(t, contract.TypeRejected, outcome.Type)
	require.Equal(t, "application/problem+json", outcome.ContentType)
	require.Equal(t, problem, string(outcome.Body))
	require.False(t, outcome.Truncated)
	require.Equal(t, "backend answered 409 Conflict", outcome.Error)
}

func TestAttemptTakesNoContentForAnAnswer(t *testing.T) {
	backend := newBackend(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusNoContent) })

	outcome := attempt(t, newClient(t, backend.URL), newOrder())

	require.Equal(t, contract.TypeSaved, outcome.Type)
	require.Empty(t, outcome.Body)
	require.False(t, outcome.Truncated)
}

func TestAttemptWaitsBehindInformationalAnswers(t *testing.T) {
	backend := newBackend(t, func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusProcessing)
		w.WriteHeader(http.StatusEarlyHints)
		w.WriteHeader(http.StatusCreated)
	})

	outcome := attempt(t, newClient(t, backend.URL), newOrder())

	require.Equal(t, contract.TypeSaved, outcome.Type)
	require.Equal(t, http.StatusCreated, outcome.StatusCode)
}

func TestAttemptDoesNotSwitchProtocols(t *testing.T) {
	// The connection stays open: reading its end would take until the timeout.
	backend := newRawBackend(t, func(_ int64, conn *net.TCPConn) bool {
		return write(conn, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: chat\r\nConnection: Upgrade\r\n\r\n")
	})

	outcome := attempt(t, newClient(t, backend.url), newOrder())

	require.Equal(t, contract.TypeAttemptFailed, outcome.Type)
	require.Equal(t, "backend answered 101 Switching Protocols", outcome.Error)
}

func TestAttemptIsOneRequest(t *testing.T) {
	// net/http would send the second order again on a new connection, where it
	// gets an answer: two requests for one attempt.
	for _, body := range []string{`{"orderNumber":"A-1001"}`, ""} {
		for name, cut := range map[string]func(*net.TCPConn) bool{
			"closed": func(*net.TCPConn) bool { return false },
			"reset":  reset,
		} {
			t.Run(fmt.Sprintf("%s with %d bytes", name, len(body)), func(t *testing.T) {
				backend := newRawBackend(t, func(n int64, conn *net.TCPConn) bool {
					if n == 2 {
						return cut(conn)
					}
					return write(conn, "HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")
				})
				client := newClient(t, backend.url)
				order := newOrder()
				order.Body = []byte(body)
				require.Equal(t, contract.TypeSaved, attempt(t, client, order).Type)

				outcome := attempt(t, client, order)

				require.Equal(t, contract.TypeAttemptFailed, outcome.Type)
				require.Equal(t, "backend at "+hostPort(t, backend.url)+" closed the connection without an answer", outcome.Error)
				require.Zero(t, outcome.StatusCode)
				require.EqualValues(t, 2, backend.requests.Load(), "one request for each attempt")

				require.Equal(t, contract.TypeSaved, attempt(t, client, order).Type, "the next attempt has a connection of its own")
			})
		}
	}
}

func TestAttemptFailsWithoutBackend(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	require.NoError(t, listener.Close())

	outcome := attempt(t, newClient(t, "http://"+listener.Addr().String()), newOrder())

	require.Equal(t, contract.TypeAttemptFailed, outcome.Type)
	require.Equal(t, "connection refused by backend at "+listener.Addr().String(), outcome.Error)
	require.False(t, outcome.Timeout)
	require.Zero(t, outcome.StatusCode)
}

func TestAttemptFailsWhenConnectionIsResetBeforeAnswer(t *testing.T) {
	backend := newRawBackend(t, func(_ int64, conn *net.TCPConn) bool { return reset(conn) })

	outcome := attempt(t, newClient(t, backend.url), newOrder())

	require.Equal(t, contract.TypeAttemptFailed, outcome.Type)
	require.Equal(t, "backend at "+hostPort(t, backend.url)+" closed the connection without an answer", outcome.Error)
	require.EqualValues(t, 1, backend.requests.Load())
}

func TestAttemptFailsWhenAnswerIsNotHTTP(t *testing.T) {
	backend := newRawBackend(t, func(_ int64, conn *net.TCPConn) bool {
		_ = write(conn, "SSH-2.0-server\r\n")
		return false
	})

	outcome := attempt(t, newClient(t, backend.url), newOrder())

	require.Equal(t, contract.TypeAttemptFailed, outcome.Type)
	require.Contains(t, outcome.Error, "call backend at "+hostPort(t, backend.url)+": ")
	require.Contains(t, outcome.Error, "malformed HTTP")
}

func TestAttemptFailsWhenCertificateIsUnknown(t *testing.T) {
	backend := httptest.NewUnstartedServer(http.NotFoundHandler())
	backend.Config.ErrorLog = slog.NewLogLogger(slog.DiscardHandler, slog.LevelError) // it complains about our bad certificate alert
	backend.StartTLS()
	t.Cleanup(backend.Close)

	outcome := attempt(t, newClient(t, backend.URL), newOrder())

	require.Equal(t, contract.TypeAttemptFailed, outcome.Type)
	require.Contains(t, outcome.Error, "certificate")
}

func TestAttemptFailsWhenAnswerBreaksOff(t *testing.T) {
	for _, status := range []string{"200 OK", "409 Conflict", "503 Service Unavailable"} {
		for name, head := range map[string]string{
			"by length": "Content-Length: 100\r\n\r\npart",
			"in chunks": "Transfer-Encoding: chunked\r\n\r\n4\r\npart\r\n",
		} {
			t.Run(status+" "+name, func(t *testing.T) {
				backend := newRawBackend(t, func(_ int64, conn *net.TCPConn) bool {
					_ = write(conn, "HTTP/1.1 "+status+"\r\nRetry-After: 9\r\n"+head)
					return false
				})

				outcome := attempt(t, newClient(t, backend.url), newOrder())

				require.Equal(t, contract.TypeAttemptFailed, outcome.Type)
				require.Equal(t, "backend broke off its answer "+status, outcome.Error)
				require.Equal(t, status[:3], fmt.Sprint(outcome.StatusCode))
				require.Equal(t, "part", string(outcome.Body))
				require.True(t, outcome.Truncated)
				require.False(t, outcome.Timeout)
				require.Equal(t, 9*time.Second, outcome.RetryAfter)
			})
		}
	}
}

func TestAttemptEndsWhenNoAnswerComesInTime(t *testing.T) {
	backend := newBackend(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body) // the server notices a closed connection only after the body
		<-r.Context().Done()
	})

	outcome := attempt(t, newClient(t, backend.URL, withTimeout(50*time.Millisecond)), newOrder())

	require.Equal(t, contract.TypeAttemptFailed, outcome.Type)
	require.True(t, outcome.Timeout)
	require.Equal(t, "backend did not answer within 50ms", outcome.Error)
	require.GreaterOrEqual(t, outcome.Duration, 50*time.Millisecond)
}

func TestAttemptEndsWhenAnswerDoesNotEndInTime(t *testing.T) {
	backend := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "part")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})

	// On a busy machine the limit can pass before the answer begins: then it
	// is doubled.
	timeout := 50 * time.Millisecond
	outcome := attempt(t, newClient(t, backend.URL, withTimeout(timeout)), newOrder())
	for outcome.StatusCode == 0 || len(outcome.Body) == 0 {
		timeout *= 2
		outcome = attempt(t, newClient(t, backend.URL, withTimeout(timeout)), newOrder())
	}

	require.Equal(t, contract.TypeAttemptFailed, outcome.Type)
	require.True(t, outcome.Timeout)
	require.Equal(t, fmt.Sprintf("backend did not finish its answer 200 OK within %s", timeout), outcome.Error)
	require.Equal(t, "part", string(outcome.Body))
	require.True(t, outcome.Truncated)
}

func TestAttemptKeepsAtMostMaxResponse(t *testing.T) {
	const limit = 1000
	for _, tc := range []struct {
		name      string
		size      int
		truncated bool
		reused    bool // the connection
	}{
		{"nothing", 0, false, true},
		{"less", limit - 1, false, true},
		{"exactly", limit, false, true},
		{"one more", limit + 1, true, true},
		{"a little more", 2 * limit, true, true},
		{"much more", 64 << 20, true, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			backend, connections := countingBackend(t, func(w http.ResponseWriter, r *http.Request) {
				_, _ = io.Copy(io.Discard, r.Body)
				if tc.size <= limit {
					_ = http.NewResponseController(w).Flush() // hence chunked: the end is not known beforehand
				} // and otherwise a little more comes in one piece, and drain has nothing to wait for
				_, _ = io.CopyN(w, letters{}, int64(tc.size))
			})
			client := newClient(t, backend.URL, withMaxResponse(limit))

			// net/http gives a connection up when it has not seen its own
			// writing end 50 ms after the answer, as happens on a busy machine:
			// some attempt of several has to find one to use again.
			var attempts int64
			for attempts < 2 || tc.reused && attempts < 20 && connections.Load() == attempts {
				attempts++
				outcome := attempt(t, client, newOrder())

				require.Equal(t, contract.TypeSaved, outcome.Type)
				require.Equal(t, strings.Repeat("x", min(tc.size, limit)), string(outcome.Body))
				require.Equal(t, tc.truncated, outcome.Truncated)
			}
			require.Equal(t, tc.reused, connections.Load() < attempts, "%d connections for %d attempts", connections.Load(), attempts)
		})
	}

	t.Run("none", func(t *testing.T) {
		backend := newBackend(t, func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "x") })
		outcome := attempt(t, newClient(t, backend.URL, withMaxResponse(0)), newOrder())
		require.Empty(t, outcome.Body)
		require.True(t, outcome.Truncated)
	})
}

type letters struct{}

func (letters) Read(p []byte) (int, error) {
	for i := range p {
		p[i] = 'x'
	}
	return len(p), nil
}

func TestAttemptDoesNotWaitForTheRestOfALongAnswer(t *testing.T) {
	// The answer never ends and the timeout is out of reach: the attempt must
	// let go of it by itself.
	backend := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		_, _ = io.WriteString(w, "xxxxx")
		_ = http.NewResponseController(w).Flush()
		<-r.Context().Done()
	})

	outcome := attempt(t, newClient(t, backend.URL, withMaxResponse(4)), newOrder())

	require.Equal(t, contract.TypeSaved, outcome.Type)
	require.Equal(t, "xxxx", string(outcome.Body))
	require.True(t, outcome.Truncated)
	require.False(t, outcome.Timeout)
}

func TestAttemptHasNoOutcomeWhenTheCallerEndsIt(t *testing.T) {
	arrived := make(chan struct{}, 1)
	backend := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		if r.Header.Get("X-Order-Number") == "half" {
			_, _ = io.WriteString(w, "part")
			_ = http.NewResponseController(w).Flush()
		}
		arrived <- struct{}{}
		<-r.Context().Done()
	})
	client := newClient(t, backend.URL)

	for _, number := range []string{"none", "half"} {
		t.Run("after "+number+" of the answer", func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			go func() {
				<-arrived
				cancel()
			}()
			order := newOrder()
			order.OrderNumber = number

			outcome, err := client.Attempt(ctx, order)

			require.ErrorIs(t, err, context.Canceled)
			require.ErrorContains(t, err, orderID)
			require.Zero(t, outcome)
		})
	}
	t.Run("before the call", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		_, err := client.Attempt(ctx, newOrder())
		require.ErrorIs(t, err, context.Canceled)
	})
	t.Run("by a deadline of its own", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		_, err := client.Attempt(ctx, newOrder())
		require.ErrorIs(t, err, context.DeadlineExceeded)
	})
}

func TestAttemptsShareConnections(t *testing.T) {
	const concurrency, waves = 64, 16 // 1,024 attempts

	connections := connectionsOf(t, concurrency, waves)
	// On a busy machine net/http gives a few up, see above; not in every run.
	for range 5 {
		if connections > concurrency {
			connections = min(connections, connectionsOf(t, concurrency, waves))
		}
	}

	require.LessOrEqual(t, connections, int64(concurrency))
}

// connectionsOf counts the connections of attempts that come in waves. All of a
// wave are in the backend at once, so that none dials in vain, and all of their
// connections are idle at once before the next.
func connectionsOf(t *testing.T, concurrency, waves int64) int64 {
	t.Helper()
	var (
		mu      sync.Mutex
		waiting int64
		all     = make(chan struct{})
	)
	backend, connections := countingBackend(t, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		mu.Lock()
		wave := all
		if waiting++; waiting == concurrency {
			close(all)
			waiting, all = 0, make(chan struct{})
		}
		mu.Unlock()
		select {
		case <-wave:
		case <-r.Context().Done():
		}
		_, _ = io.WriteString(w, `{"saved":true}`)
	})
	client := newClient(t, backend.URL)

	var saved atomic.Int64
	for range waves {
		var wg sync.WaitGroup
		for range concurrency {
			wg.Go(func() {
				if outcome, err := client.Attempt(t.Context(), newOrder()); err == nil && outcome.Type == contract.TypeSaved {
					saved.Add(1)
				}
			})
		}
		wg.Wait()
	}

	require.Equal(t, concurrency*waves, saved.Load())
	return connections.Load()
}

func TestNothingShowsTheSecretsOfTheBackend(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
	t.Cleanup(func() { _ = provider.Shutdown(context.WithoutCancel(t.Context())) })
	traced := func(_ *dispatch.BackendConfig, _ *dispatch.Config, d *dispatch.Deps) { d.TracerProvider = provider }
	secretive := func(address string) string {
		return strings.Replace(address, "http://", "http://user:hunter2@", 1) + "?token=hunter2#hunter2"
	}
	headers := withHeaders(dispatch.Headers{"Authorization": "Bearer hunter2", "X-Key": "hunter2"})

	broken := newRawBackend(t, func(_ int64, conn *net.TCPConn) bool { return reset(conn) })
	failing := newBackend(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusBadGateway) })
	slow := newBackend(t, func(_ http.ResponseWriter, r *http.Request) {
		_, _ = io.Copy(io.Discard, r.Body)
		<-r.Context().Done()
	})
	closed := httptest.NewServer(nil)
	closed.Close()

	for name, client := range map[string]*dispatch.Client{
		"reset":   newClient(t, secretive(broken.url), headers, traced),
		"failing": newClient(t, secretive(failing.URL), headers, traced),
		"slow":    newClient(t, secretive(slow.URL), headers, traced, withTimeout(10*time.Millisecond)),
		"refused": newClient(t, secretive(closed.URL), headers, traced),
	} {
		t.Run(name, func(t *testing.T) {
			text, err := json.Marshal(attempt(t, client, newOrder()))
			require.NoError(t, err)
			require.NotContains(t, string(text), "hunter2")
		})
	}
	recorded := spans.GetSpans()
	require.Len(t, recorded, 4)
	require.NotContains(t, fmt.Sprintf("%+v", recorded), "hunter2")
	require.Contains(t, fmt.Sprintf("%+v", recorded), "?REDACTED")
}

func TestAttemptIsAClientSpan(t *testing.T) {
	spans := tracetest.NewInMemoryExporter()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSyncer(spans))
	t.Cleanup(func() { _ = provider.Shutdown(context.WithoutCancel(t.Context())) })
	var traceparent string
	backend := newBackend(t, func(_ http.ResponseWriter, r *http.Request) { traceparent = r.Header.Get("Traceparent") })
	client := newClient(t, backend.URL, func(_ *dispatch.BackendConfig, _ *dispatch.Config, d *dispatch.Deps) { d.TracerProvider = provider })
	ctx, parent := provider.Tracer("test").Start(t.Context(), "process")

	_, err := client.Attempt(ctx, newOrder())
	require.NoError(t, err)

	parent.End()
	span := spans.GetSpans()[0]
	require.Equal(t, "POST", span.Name)
	require.Equal(t, trace.SpanKindClient, span.SpanKind)
	require.Equal(t, parent.SpanContext().SpanID(), span.Parent.SpanID())
	require.Equal(t, fmt.Sprintf("00-%s-%s-01", span.SpanContext.TraceID(), span.SpanContext.SpanID()), traceparent)
}

func TestAttemptsAreMeasuredByResult(t *testing.T) {
	reader := sdkmetric.NewManualReader()
	provider := sdkmetric.NewMeterProvider(sdkmetric.WithReader(reader))
	statuses := []int{200, 201, 422, 503}
	var n atomic.Int64
	backend := newBackend(t, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(statuses[n.Add(1)%4]) })
	client := newClient(t, backend.URL, func(_ *dispatch.BackendConfig, _ *dispatch.Config, d *dispatch.Deps) { d.MeterProvider = provider })
	for i := range 40 {
		order := newOrder()
		order.OrderID, order.OrderNumber = fmt.Sprint("id", i), fmt.Sprint("number", i)
		attempt(t, client, order)
	}

	var got metricdata.ResourceMetrics
	require.NoError(t, reader.Collect(t.Context(), &got))

	counts := map[string]uint64{}
	for _, scope := range got.ScopeMetrics {
		for _, m := range scope.Metrics {
			if histogram, ok := m.Data.(metricdata.Histogram[float64]); ok {
				require.LessOrEqual(t, len(histogram.DataPoints), len(statuses), "%s: series must not grow with the orders", m.Name)
				if m.Name == "sluice.dispatch.attempt.duration" {
					for _, point := range histogram.DataPoints {
						result, _ := point.Attributes.Value(attribute.Key("result"))
						counts[result.AsString()] = point.Count
					}
				}
			}
		}
	}
	require.Equal(t, map[string]uint64{"saved": 20, "rejected": 10, "attempt_failed": 10}, counts)
}

// proxyChild makes the test binary run attemptThroughProxy: net/http reads the
// proxy's variables once in the life of a process.
const proxyChild = "DISPATCH_TEST_PROXY_CHILD"

func attemptThroughProxy() int {
	client, err := dispatch.NewClient(dispatch.BackendConfig{URL: "http://backend.invalid/orders", Timeout: patience}, dispatch.DefaultConfig(), quietDeps())
	if err != nil {
		fmt.Println(err)
		return 1
	}
	defer client.Close()
	outcome, err := client.Attempt(context.Background(), newOrder())
	fmt.Println(outcome.Type, outcome.Error, err)
	return 0
}

func TestProxyOfTheEnvironment(t *testing.T) {
	proxy := newBackend(t, func(w http.ResponseWriter, r *http.Request) {
		if r.URL.String() != "http://backend.invalid/orders" {
			w.WriteHeader(http.StatusTeapot)
		}
	})
	closed := httptest.NewServer(nil)
	closed.Close()

	for _, tc := range []struct{ name, proxy, want string }{
		{"is used", proxy.URL, "order.saved.v1  <nil>"},
		{"is down", strings.Replace(closed.URL, "//", "//user:hunter2@", 1), "order.attempt_failed.v1 connect to the proxy for the backend: "},
	} {
		t.Run(tc.name, func(t *testing.T) {
			exe, err := os.Executable()
			require.NoError(t, err)
			cmd := exec.CommandContext(t.Context(), exe)
			cmd.Env = append(os.Environ(), proxyChild+"=1", "HTTP_PROXY="+tc.proxy, "http_proxy="+tc.proxy, "NO_PROXY=", "no_proxy=")
			out, err := cmd.CombinedOutput()
			require.NoError(t, err, string(out))
			require.Contains(t, string(out), tc.want)
			require.NotContains(t, string(out), "hunter2")
		})
	}
}

func hostPort(t *testing.T, address string) string {
	t.Helper()
	u, err := url.Parse(address)
	require.NoError(t, err)
	return u.Host
}
