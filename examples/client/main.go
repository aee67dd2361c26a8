// Command client is what a client of Sluice should look like: it submits the
// order on its standard input, waits for its end, and prints what became of it.
//
//	go run ./examples/client http://localhost:8080 < order.json
//
// It sends an Idempotency-Key, so that it may repeat a request whose answer was
// lost; it waits as long as it is told to; and it understands problem
// documents. An API key is taken from SLUICE_CLIENT_KEY. It uses nothing but
// the standard library, and nothing of Sluice but its HTTP API.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strconv"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, os.Args[1:], os.Stdin, os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "client:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdin io.Reader, stdout io.Writer) error {
	if len(args) != 1 {
		return errors.New("usage: client URL < order.json")
	}
	base, err := url.Parse(args[0])
	if err != nil {
		return err
	}
	body, err := io.ReadAll(stdin)
	if err != nil {
		return err
	}
	c := client{base: base, apiKey: os.Getenv("SLUICE_CLIENT_KEY"), http: &http.Client{Timeout: time.Minute}}
	defer c.http.CloseIdleConnections()
	location, err := c.submit(ctx, body)
	if err != nil {
		return err
	}
	o, err := c.await(ctx, location)
	if err != nil {
		return err
	}
	text := fmt.Sprintf("order %s is %s after %d attempts\n", o.OrderNumber, o.Status, o.Attempts)
	if o.Problem != nil {
		text += fmt.Sprintf("because: %v\n", o.Problem)
	}
	_, err = io.WriteString(stdout, text)
	return err
}

// order is what the client wants to know of an order.
type order struct {
	OrderNumber string   `json:"orderNumber"`
	Status      string   `json:"status"`
	Attempts    int      `json:"attempts"`
	Problem     *problem `json:"problem"`
}

// problem is an error as the API sends it (RFC 9457).
type problem struct {
	Type   string `json:"type"`
	Title  string `json:"title"`
	Status int    `json:"status"`
	Detail string `json:"detail"`
	Errors []struct {
		Pointer string `json:"pointer"`
		Detail  string `json:"detail"`
	} `json:"errors"`
}

func (p *problem) Error() string {
	text := fmt.Sprintf("%d %s: %s", p.Status, p.Title, p.Detail)
	for _, e := range p.Errors {
		text += fmt.Sprintf("\n  %s %s", e.Pointer, e.Detail)
	}
	return text
}

type client struct {
	base   *url.URL
	apiKey string
	http   *http.Client
}

// submit hands the order in and returns its URL. It tries until the order is
// accepted or refused, with one key for all tries: the first one may have come
// through although its answer did not.
func (c *client) submit(ctx context.Context, body []byte) (*url.URL, error) {
	key := `"` + rand.Text() + `"`
	for pause := time.Second; ; pause = min(2*pause, time.Minute) {
		res, err := c.do(ctx, http.MethodPost, c.base.JoinPath("orders"), body, "Content-Type", "application/json", "Idempotency-Key", key)
		switch {
		case ctx.Err() != nil:
			return nil, ctx.Err()
		case err != nil: // no answer
		case res.status == http.StatusAccepted || res.status == http.StatusOK:
			return c.base.Parse(res.header.Get("Location"))
		case !temporary(res.status):
			return nil, res.problem()
		default:
			pause = retryAfter(res.header, pause)
		}
		if err := wait(ctx, pause); err != nil {
			return nil, err
		}
	}
}

// await asks for the order until it is final. Each question is held by the
// server until there is news; one that is answered sooner says when to ask
// again.
func (c *client) await(ctx context.Context, location *url.URL) (order, error) {
	for {
		asked := time.Now()
		res, err := c.do(ctx, http.MethodGet, location, nil, "Prefer", "wait=30")
		pause := time.Second
		switch {
		case ctx.Err() != nil:
			return order{}, ctx.Err()
		case err != nil:
		case res.status == http.StatusOK:
			var o order
			if err := json.Unmarshal(res.body, &o); err != nil {
				return order{}, err
			}
			if o.Status == "saved" || o.Status == "rejected" || o.Status == "dead" {
				return o, nil
			}
			pause = retryAfter(res.header, pause) - time.Since(asked)
		case !temporary(res.status):
			return order{}, res.problem()
		default:
			pause = retryAfter(res.header, pause)
		}
		if err := wait(ctx, pause); err != nil {
			return order{}, err
		}
	}
}

// answer is a whole HTTP answer.
type answer struct {
	status int
	header http.Header
	body   []byte
}

func (a answer) problem() error {
	p := &problem{Title: http.StatusText(a.status), Status: a.status}
	if a.header.Get("Content-Type") == "application/problem+json" {
		if err := json.Unmarshal(a.body, p); err != nil {
			return err
		}
	}
	return p
}

func (c *client) do(ctx context.Context, method string, target *url.URL, body []byte, header ...string) (answer, error) {
	req, err := http.NewRequestWithContext(ctx, method, target.String(), bytes.NewReader(body))
	if err != nil {
		return answer{}, err
	}
	for i := 0; i+1 < len(header); i += 2 {
		req.Header.Set(header[i], header[i+1])
	}
	if c.apiKey != "" {
		req.Header.Set("Authorization", "Bearer "+c.apiKey)
	}
	res, err := c.http.Do(req)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	return answer{res.StatusCode, res.Header, text}, err
}

// temporary reports whether the same request can succeed later.
func temporary(status int) bool {
	return status == http.StatusRequestTimeout || status == http.StatusTooManyRequests || status >= 500
}

// retryAfter returns how long the server wants to be left alone.
func retryAfter(header http.Header, otherwise time.Duration) time.Duration {
	seconds, err := strconv.Atoi(header.Get("Retry-After"))
	if err != nil {
		return otherwise
	}
	return time.Duration(seconds) * time.Second
}

func wait(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
