package e2e

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

// fast makes retries quick, where a test is not about their pace.
func fast(b *standIn, more ...string) settings {
	s := settings{"backend.url": b.ordersURL(), "dispatch.retry_initial": "10ms", "dispatch.retry_max": "50ms"}
	for i := 0; i+1 < len(more); i += 2 {
		s[more[i]] = more[i+1]
	}
	return s
}

func TestAnOrderIsAcceptedSavedAndStillThereAfterARestart(t *testing.T) {
	eachHome(t, testAnOrderIsAcceptedSavedAndStillThereAfterARestart)
}

func testAnOrderIsAcceptedSavedAndStillThereAfterARestart(t *testing.T, h home) {
	b := backend(t, "--latency", "20ms")
	g := serve(t, true, h, fast(b))
	a := g.post(t, body("A-1001"))
	require.Equal(t, http.StatusAccepted, a.status, string(a.body))
	require.NotEmpty(t, a.header.Get("Retry-After"))
	require.Equal(t, "Prefer", a.header.Get("Vary"))
	o := a.order(t)
	require.Equal(t, "/orders/"+o.ID, a.header.Get("Location"))
	require.Equal(t, "/orders/"+o.ID, o.Links.Self)
	require.Equal(t, "accepted", o.Status)
	require.Equal(t, "A-1001", *o.OrderNumber)
	require.Len(t, o.TraceID, 32)
	require.Nil(t, o.FinishedAt)

	saved := g.await(t, o.ID, "saved")
	require.Equal(t, 1, saved.Attempts)
	require.Equal(t, 200, saved.Backend.Status)
	require.True(t, json.Valid(saved.Backend.Body))
	require.NotNil(t, saved.FinishedAt)
	require.Equal(t, "null", string(saved.Problem))

	var kept struct {
		ID      string
		Body    json.RawMessage
		Headers map[string]string
	}
	getJSON(t, b.url+"/orders/A-1001", &kept)
	require.Equal(t, o.ID, kept.ID, "the Idempotency-Key is the order's id")
	require.JSONEq(t, body("A-1001"), string(kept.Body))

	require.Zero(t, g.terminate(t))
	g = serve(t, true, h, fast(b))
	require.Equal(t, saved, g.get(t, o.ID))
	require.Zero(t, g.terminate(t))
	require.Equal(t, backendStats{Requests: 1, Orders: 1, MaxInFlight: 1}, b.stats(t))
}

func TestAFailingBackendIsTriedAgain(t *testing.T) { eachHome(t, testAFailingBackendIsTriedAgain) }

func testAFailingBackendIsTriedAgain(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, h, fast(b))
	b.control(t, `{"failNext": 2}`)
	o := g.await(t, g.accept(t, "A-1").ID, "saved", "dead")
	require.Equal(t, "saved", o.Status)
	require.Equal(t, 3, o.Attempts)
	var history struct {
		Attempts []struct {
			Number        int        `json:"number"`
			StartedAt     time.Time  `json:"startedAt"`
			Duration      string     `json:"duration"`
			Status        int        `json:"status"`
			Error         string     `json:"error"`
			NextAttemptAt *time.Time `json:"nextAttemptAt"`
		} `json:"attempts"`
	}
	getJSON(t, g.url+"/orders/"+o.ID+"/attempts", &history)
	require.Len(t, history.Attempts, 3)
	for i, status := range []int{503, 503, 200} {
		a := history.Attempts[i]
		require.Equal(t, i+1, a.Number)
		require.Equal(t, status, a.Status)
		require.Equal(t, i < 2, a.NextAttemptAt != nil)
		require.Equal(t, i < 2, a.Error != "")
		_, err := time.ParseDuration(a.Duration)
		require.NoError(t, err)
	}
}

func TestABackendThatGivesNoAnswerIsTriedAgain(t *testing.T) {
	eachHome(t, testABackendThatGivesNoAnswerIsTriedAgain)
}

func testABackendThatGivesNoAnswerIsTriedAgain(t *testing.T, h home) {
	eager := func(url string) settings {
		return settings{"backend.url": url, "backend.timeout": "200ms", "dispatch.retry_initial": "10ms", "dispatch.retry_max": "50ms", "dispatch.max_attempts": "1000"}
	}
	tried := func(g *gateway, id string) {
		eventually(t, time.Minute, func() bool { return g.get(t, id).Attempts > 0 }, "no attempt has failed")
	}
	t.Run("connection refused", func(t *testing.T) {
		addr := freePort(t)
		g := serve(t, true, h, eager("http://"+addr+"/orders"))
		o := g.accept(t, "A-1")
		tried(g, o.ID)
		backendAt(t, addr, "--latency", "1ms")
		require.Greater(t, g.await(t, o.ID, "saved").Attempts, 1)
	})
	for name, trouble := range map[string][2]string{
		"connection cut": {`{"down": true}`, `{"down": false}`},
		"time-out":       {`{"latency": "1m"}`, `{"latency": "1ms"}`},
	} {
		t.Run(name, func(t *testing.T) {
			b := backend(t, "--latency", "1ms")
			b.control(t, trouble[0])
			g := serve(t, true, h, eager(b.ordersURL()))
			o := g.accept(t, "A-1")
			tried(g, o.ID)
			b.control(t, trouble[1])
			require.Greater(t, g.await(t, o.ID, "saved").Attempts, 1)
		})
	}
}

func TestRetryAfterIsObeyed(t *testing.T) { eachHome(t, testRetryAfterIsObeyed) }

func testRetryAfterIsObeyed(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms", "--retry-after", "2s")
	g := serve(t, true, h, fast(b))
	b.control(t, `{"failNext": 1}`)
	o := g.await(t, g.accept(t, "A-1").ID, "saved")
	require.Equal(t, 2, o.Attempts)
	require.GreaterOrEqual(t, o.FinishedAt.Sub(o.AcceptedAt), 2*time.Second)
}

func TestARejectedOrderKeepsTheBackendsProblemAndFreesItsNumber(t *testing.T) {
	eachHome(t, testARejectedOrderKeepsTheBackendsProblemAndFreesItsNumber)
}

func testARejectedOrderKeepsTheBackendsProblemAndFreesItsNumber(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, h, fast(b))
	first := g.await(t, g.accept(t, "A-1-REJECT").ID, "rejected")
	require.Equal(t, 1, first.Attempts)
	require.Equal(t, 400, first.Backend.Status)
	require.JSONEq(t, string(first.Backend.Body), string(first.Problem))

	second := g.accept(t, "A-1-REJECT")
	require.NotEqual(t, first.ID, second.ID)
	g.await(t, second.ID, "rejected")
	require.Equal(t, first, g.get(t, first.ID))

	var list struct{ Orders []order }
	getJSON(t, g.url+"/orders?orderNumber=A-1-REJECT", &list)
	require.Len(t, list.Orders, 2)
	require.Equal(t, second.ID, list.Orders[0].ID, "newest first")
}

func TestAfterTheLastAttemptAnOrderIsDeadAndCanBeReplayed(t *testing.T) {
	eachHome(t, testAfterTheLastAttemptAnOrderIsDeadAndCanBeReplayed)
}

func testAfterTheLastAttemptAnOrderIsDeadAndCanBeReplayed(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, h, fast(b, "dispatch.max_attempts", "3"))
	b.control(t, `{"failRate": 1}`)
	o := g.accept(t, "A-1")
	replay := g.admin + "/admin/orders/" + o.ID + "/replay"
	dead := g.await(t, o.ID, "dead")
	require.Equal(t, 3, dead.Attempts)
	require.Contains(t, string(dead.Problem), "503")
	require.NotNil(t, dead.FinishedAt)
	a := g.post(t, body("A-1"))
	require.Equal(t, "true", a.header.Get("Idempotent-Replayed"), "a dead order holds its number")

	b.control(t, `{"failRate": 0}`)
	res := do(t, http.MethodPost, replay, "", nil)
	require.Equal(t, http.StatusAccepted, res.status, string(res.body))
	require.Equal(t, o.ID, res.order(t).ID)
	saved := g.await(t, o.ID, "saved")
	require.Equal(t, 4, saved.Attempts)
	require.Equal(t, "null", string(saved.Problem))

	do(t, http.MethodPost, replay, "", nil).problem(t, http.StatusConflict, "order-not-dead")
	do(t, http.MethodPost, g.admin+"/admin/orders/"+missingID+"/replay", "", nil).problem(t, http.StatusNotFound, "order-not-found")
}

const missingID = "01930000-0000-7000-8000-000000000000"

func TestEqualConcurrentOrdersAreOne(t *testing.T) { eachHome(t, testEqualConcurrentOrdersAreOne) }

func testEqualConcurrentOrdersAreOne(t *testing.T, h home) {
	b := backend(t, "--latency", "20ms")
	g := serve(t, true, h, fast(b))
	const n = 200
	answers := make([]answer, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() {
			// Equal as JSON values is equal enough.
			text := body("A-1")
			if i%2 == 1 {
				text = " " + strings.Replace(text, `4.5`, `4.50`, 1)
			}
			answers[i], _ = try(t.Context(), http.MethodPost, g.url+"/orders", text, jsonHeader())
		})
	}
	wg.Wait()
	replayed, ids := 0, map[string]bool{}
	for _, a := range answers {
		require.Equal(t, http.StatusAccepted, a.status, string(a.body))
		ids[a.header.Get("Location")] = true
		if a.header.Get("Idempotent-Replayed") == "true" {
			replayed++
		}
	}
	t.Logf("%d concurrent equal requests: %d orders, %d replayed", n, len(ids), replayed)
	require.Len(t, ids, 1)
	require.Equal(t, n-1, replayed)
	g.drained(t, time.Minute)
	require.Equal(t, 1, b.stats(t).Requests)

	other := strings.Replace(body("A-1"), "4.5", "4.51", 1)
	p := g.post(t, other).problem(t, http.StatusConflict, "duplicate-order-number")
	require.True(t, ids[p.Order], p.Order)
}

func TestIdempotencyKeys(t *testing.T) { eachHome(t, testIdempotencyKeys) }

func testIdempotencyKeys(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, h, fast(b))
	o := g.accept(t, "A-1", "Idempotency-Key", `"k-1"`)
	for _, key := range []string{`"k-1"`, `k-1`} {
		a := g.post(t, body("A-1"), "Idempotency-Key", key)
		require.Equal(t, http.StatusAccepted, a.status)
		require.Equal(t, "true", a.header.Get("Idempotent-Replayed"))
		require.Equal(t, o.ID, a.order(t).ID)
	}
	g.post(t, body("A-2"), "Idempotency-Key", `"k-1"`).problem(t, http.StatusUnprocessableEntity, "idempotency-key-reused")
	g.post(t, body("A-2"), "Idempotency-Key", `"`+strings.Repeat("k", 256)+`"`).problem(t, http.StatusBadRequest, "malformed-header")
	g.post(t, strings.Replace(body("A-1"), "tea", "coffee", 1), "Idempotency-Key", `"k-2"`).problem(t, http.StatusConflict, "duplicate-order-number")
}

func TestPreferWait(t *testing.T) { eachHome(t, testPreferWait) }

func testPreferWait(t *testing.T, h home) {
	b := backend(t, "--latency", "100ms")
	g := serve(t, true, h, fast(b, "intake.max_wait", "2s"))
	a := g.post(t, body("A-1"), "Prefer", "wait=10")
	require.Equal(t, http.StatusOK, a.status, string(a.body))
	require.Equal(t, "wait=2", a.header.Get("Preference-Applied"), "capped by intake.max_wait")
	require.Equal(t, "Prefer", a.header.Get("Vary"))
	require.Equal(t, "saved", a.order(t).Status)
	require.Empty(t, a.header.Get("Retry-After"))
	require.JSONEq(t, string(do(t, http.MethodGet, g.url+a.header.Get("Location"), "", nil).body), string(a.body), "whoever waits gets the whole order")

	b.control(t, `{"latency": "5s"}`)
	started := time.Now()
	a = g.post(t, body("A-2"), "Prefer", "wait=1")
	require.Equal(t, http.StatusAccepted, a.status, string(a.body))
	require.GreaterOrEqual(t, time.Since(started), time.Second)
	require.Equal(t, "accepted", a.order(t).Status)
	require.NotEmpty(t, a.header.Get("Location"))

	b.control(t, `{"latency": "1ms"}`)
	o := g.accept(t, "A-3")
	res := do(t, http.MethodGet, g.url+"/orders/"+o.ID, "", map[string]string{"Prefer": "wait=2"})
	require.Equal(t, "saved", res.order(t).Status)
	a = g.post(t, body("A-3"), "Prefer", "wait=1")
	require.Equal(t, http.StatusOK, a.status)
	require.Equal(t, "true", a.header.Get("Idempotent-Replayed"))
}

func TestETagOfAnOrder(t *testing.T) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, embedded(t.TempDir()), fast(b, "backend.timeout", "10m"))
	o := g.await(t, g.accept(t, "A-1").ID, "saved")
	url := g.url + "/orders/" + o.ID
	tag := do(t, http.MethodGet, url, "", nil).header.Get("ETag")
	require.NotEmpty(t, tag)
	for _, field := range []string{tag, "W/" + tag, `"x", ` + tag, "*"} {
		a := do(t, http.MethodGet, url, "", map[string]string{"If-None-Match": field})
		require.Equal(t, http.StatusNotModified, a.status)
		require.Empty(t, a.body)
		require.Equal(t, tag, a.header.Get("ETag"))
	}
	require.Equal(t, http.StatusOK, do(t, http.MethodGet, url, "", map[string]string{"If-None-Match": `"x"`}).status)

	// One that waits, for a client that waits for news of it.
	b.control(t, `{"latency": "10m"}`)
	url = g.url + "/orders/" + g.accept(t, "A-2").ID
	tag = do(t, http.MethodGet, url, "", nil).header.Get("ETag")
	a := do(t, http.MethodGet, url, "", map[string]string{"If-None-Match": tag, "Prefer": "wait=1"})
	require.Equal(t, http.StatusNotModified, a.status)
	require.Equal(t, "wait=1", a.header.Get("Preference-Applied"))
}

func TestOrdersAreListedInPages(t *testing.T) { eachHome(t, testOrdersAreListedInPages) }

func testOrdersAreListedInPages(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, h, fast(b))
	var want []string
	for i := range 7 {
		want = append([]string{g.accept(t, fmt.Sprintf("A-%d", i)).ID}, want...)
	}
	var got []string
	for cursor := ""; ; {
		var page struct {
			Orders []order
			Next   *string
		}
		getJSON(t, g.url+"/orders?limit=3&cursor="+cursor, &page)
		for _, o := range page.Orders {
			got = append(got, o.ID)
		}
		if page.Next == nil {
			break
		}
		cursor = *page.Next
		g.accept(t, fmt.Sprintf("late-%d", len(got)))
	}
	require.Equal(t, want, got, "new orders do not disturb the pages")
	for _, q := range []string{"limit=0", "limit=501", "limit=x", "status=lost", "cursor=zzz", "limit=1;status=saved", "orderNumber=%zz", "limit=1&limit=2"} {
		do(t, http.MethodGet, g.url+"/orders?"+q, "", nil).problem(t, http.StatusBadRequest, "invalid-query")
	}
}

func TestSynchronousOrders(t *testing.T) { eachHome(t, testSynchronousOrders) }

func testSynchronousOrders(t *testing.T, h home) {
	b := backend(t, "--latency", "1ms")
	g := serve(t, true, h, fast(b, "backend.timeout", "500ms", "intake.sync_limit", "1"))
	sync := func(number string) answer {
		return do(t, http.MethodPost, g.url+"/orders/sync", body(number), jsonHeader())
	}
	a := sync("A-1")
	require.Equal(t, http.StatusOK, a.status, string(a.body))
	require.Equal(t, "saved", a.order(t).Status)
	require.Equal(t, "saved", g.get(t, a.order(t).ID).Status)
	require.Equal(t, "true", sync("A-1").header.Get("Idempotent-Replayed"))

	p := sync("A-2-REJECT").problem(t, http.StatusUnprocessableEntity, "rejected-by-backend")
	require.True(t, json.Valid(p.Backend))
	require.NotEqual(t, "null", string(p.Backend))
	require.Equal(t, "rejected", g.get(t, strings.TrimPrefix(p.Order, "/orders/")).Status)

	b.control(t, `{"failNext": 1}`)
	sync("A-3").problem(t, http.StatusBadGateway, "backend-failed")
	require.Equal(t, http.StatusOK, sync("A-3").status, "after 502 the number is free")

	b.control(t, `{"latency": "10s"}`)
	sync("A-4").problem(t, http.StatusGatewayTimeout, "backend-timeout")
	done, calls := make(chan answer), b.stats(t).Requests
	go func() {
		a, _ := try(t.Context(), http.MethodPost, g.url+"/orders/sync", body("A-5"), jsonHeader())
		done <- a
	}()
	eventually(t, 10*time.Second, func() bool { return b.stats(t).Requests > calls }, "no call")
	refused := sync("A-6")
	refused.problem(t, http.StatusServiceUnavailable, "sync-limit-reached")
	require.NotEmpty(t, refused.header.Get("Retry-After"))
	require.Equal(t, http.StatusGatewayTimeout, (<-done).status)
	b.control(t, `{"latency": "1ms"}`)
	require.Equal(t, http.StatusOK, sync("A-4").status, "after 504 the number is free")

	// A process that dies in the middle of a call leaves no stuck order.
	b.control(t, `{"latency": "300ms"}`)
	calls = b.stats(t).Requests
	go func() { _, _ = try(t.Context(), http.MethodPost, g.url+"/orders/sync", body("A-7"), jsonHeader()) }()
	eventually(t, 10*time.Second, func() bool { return b.stats(t).Requests > calls }, "no call")
	g.kill()
	g = serve(t, true, h, fast(b))
	var list struct{ Orders []order }
	getJSON(t, g.url+"/orders?orderNumber=A-7", &list)
	require.Len(t, list.Orders, 1)
	g.await(t, list.Orders[0].ID, "saved")
}

func TestASecondClientsPromiseOutlivesAFailedSynchronousCall(t *testing.T) {
	eachHome(t, testASecondClientsPromiseOutlivesAFailedSynchronousCall)
}

func testASecondClientsPromiseOutlivesAFailedSynchronousCall(t *testing.T, h home) {
	b := backend(t, "--latency", "300ms")
	g := serve(t, true, h, fast(b))
	b.control(t, `{"failNext": 1}`)
	done := make(chan answer)
	go func() {
		a, _ := try(t.Context(), http.MethodPost, g.url+"/orders/sync", body("A-1"), jsonHeader())
		done <- a
	}()
	eventually(t, 10*time.Second, func() bool { return b.stats(t).InFlight > 0 }, "no call")
	a := g.post(t, body("A-1"))
	require.Equal(t, http.StatusAccepted, a.status)
	require.Equal(t, "true", a.header.Get("Idempotent-Replayed"))
	failed := <-done
	require.Equal(t, "/orders/"+a.order(t).ID, failed.problem(t, http.StatusBadGateway, "backend-failed").Order)
	require.Equal(t, 2, g.await(t, a.order(t).ID, "saved").Attempts)
}

func TestBacklogLimit(t *testing.T) { eachHome(t, testBacklogLimit) }

func testBacklogLimit(t *testing.T, h home) {
	b := backend(t, "--latency", "10s")
	g := serve(t, true, h, fast(b, "intake.max_backlog", "2"))
	g.accept(t, "A-1")
	g.accept(t, "A-2")
	a := g.post(t, body("A-3"))
	a.problem(t, http.StatusServiceUnavailable, "backlog-full")
	require.NotEmpty(t, a.header.Get("Retry-After"))

	// What is there already needs no room: a client whose answer got lost asks for it even now.
	a = g.post(t, body("A-1"))
	require.Equal(t, http.StatusAccepted, a.status, string(a.body))
	require.Equal(t, "true", a.header.Get("Idempotent-Replayed"))
	g.post(t, strings.Replace(body("A-1"), "c-1", "c-2", 1)).problem(t, http.StatusConflict, "duplicate-order-number")
	answers := g.batch(t, body("A-2")+"\n"+body("A-3")+"\n")
	require.True(t, answers[0].Replayed)
	answers[1].refused(t, http.StatusServiceUnavailable, "backlog-full")
	require.Equal(t, 2, g.status(t).Backlog)
}
