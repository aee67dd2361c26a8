package intake

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"

	"sluice/modules/contract"
	"sluice/platform/database"
	"sluice/platform/httpserver"
)

// The problems that intake answers with, each once. Their names are part of
// the contract with clients.

func problemMalformed(err error) httpserver.Problem {
	return httpserver.Problem{Type: "malformed-json", Title: "The body is not one JSON value", Status: http.StatusBadRequest, Detail: err.Error()}
}

func problemMediaType(got string) httpserver.Problem {
	detail := fmt.Sprintf("the body is %q, send application/json in UTF-8", got)
	if got == "" {
		detail = "the request has no Content-Type, send application/json"
	}
	return httpserver.Problem{Type: "unsupported-media-type", Title: "Orders are application/json", Status: http.StatusUnsupportedMediaType, Detail: detail}
}

func problemBatchMediaType(got string) httpserver.Problem {
	p := problemMediaType(got)
	p.Detail = fmt.Sprintf("the body is %q, send application/x-ndjson in UTF-8, one order a line", got)
	return p
}

func problemTooLarge(limit fmt.Stringer) httpserver.Problem {
	return httpserver.Problem{Type: "body-too-large", Title: "The order is too large", Status: http.StatusRequestEntityTooLarge,
		Detail: fmt.Sprintf("an order may have %v (intake.max_body)", limit)}
}

func problemInvalid(errors []httpserver.FieldError) httpserver.Problem {
	return httpserver.Problem{Type: "invalid-order", Title: "The order does not satisfy the order schema", Status: http.StatusUnprocessableEntity,
		Detail: "see errors for what is wrong and where", Errors: errors}
}

func problemHeader(name string, err error) httpserver.Problem {
	return httpserver.Problem{Type: "malformed-header", Title: "A header field cannot be understood", Status: http.StatusBadRequest,
		Detail: fmt.Sprintf("%s: %v", name, err)}
}

func problemQuery(name, detail string) httpserver.Problem {
	return httpserver.Problem{Type: "invalid-query", Title: "A query parameter cannot be understood", Status: http.StatusBadRequest,
		Detail: fmt.Sprintf("%s: %s", name, detail)}
}

func problemDuplicate(o *order) httpserver.Problem {
	return httpserver.Problem{Type: "duplicate-order-number", Title: "Another order has this number", Status: http.StatusConflict,
		Detail:  fmt.Sprintf("order number %q belongs to an order with a different body", o.Number),
		Members: map[string]any{"order": location(o)}}
}

func problemKeyReused(o *order) httpserver.Problem {
	return httpserver.Problem{Type: "idempotency-key-reused", Title: "The Idempotency-Key was used for another order", Status: http.StatusUnprocessableEntity,
		Detail:  "the same key came with a different body before; a new order needs a new key",
		Members: map[string]any{"order": location(o)}}
}

func problemNotAcceptable(accept string) httpserver.Problem {
	return httpserver.Problem{Type: "not-acceptable", Title: "Events are text/event-stream", Status: http.StatusNotAcceptable,
		Detail: fmt.Sprintf("the request accepts %q", accept)}
}

func problemNotFound() httpserver.Problem {
	return httpserver.Problem{Type: "order-not-found", Title: "There is no such order", Status: http.StatusNotFound,
		Detail: "no order has this id; finished orders are removed after store.retention"}
}

func problemNotDead(o *order) httpserver.Problem {
	return httpserver.Problem{Type: "order-not-dead", Title: "Only dead orders can be replayed", Status: http.StatusConflict,
		Detail: fmt.Sprintf("the order is %s", o.Status)}
}

func problemBacklogFull(limit int) httpserver.Problem {
	return httpserver.Problem{Type: "backlog-full", Title: "Too many orders are waiting", Status: http.StatusServiceUnavailable,
		Detail: fmt.Sprintf("%d or more orders are waiting (intake.max_backlog); this one was not accepted, send it again later", limit)}
}

// problemStorage answers a request that should have changed something.
func problemStorage(err error) httpserver.Problem {
	p := httpserver.Problem{Type: "storage-unavailable", Title: "Orders cannot be stored at the moment", Status: http.StatusServiceUnavailable,
		Detail: "nothing was accepted; send the request again later"}
	if errors.Is(err, database.ErrUncertain) {
		p.Detail = "the storage was lost during the commit, and whether the order was accepted is not known; " +
			"sent again later with the same order number or Idempotency-Key it will be there once"
	}
	return p
}

func problemUnread() httpserver.Problem {
	return httpserver.Problem{Type: "storage-unavailable", Title: "Orders cannot be read at the moment", Status: http.StatusServiceUnavailable,
		Detail: "send the request again later"}
}

func problemListTooSlow() httpserver.Problem {
	p := problemUnread()
	p.Title, p.Detail = "The list took too long", "ask for an orderNumber or a smaller limit, or send the request again later"
	return p
}

// problemSyncUnknown answers POST /orders/sync when the backend was called and
// its answer could not be stored.
func problemSyncUnknown(o *order) httpserver.Problem {
	return httpserver.Problem{Type: "storage-unavailable", Title: "The outcome could not be stored", Status: http.StatusServiceUnavailable,
		Detail:  "the backend was called; the order is kept and goes on as an asynchronous one, look at it under its URL",
		Members: map[string]any{"order": location(o)}}
}

func problemOverloaded() httpserver.Problem {
	return httpserver.Problem{Type: "overloaded", Title: "Too many large orders arrive at once", Status: http.StatusServiceUnavailable,
		Detail: "there is no room for the body at the moment; nothing was accepted, send the request again later"}
}

// problemUnfinished takes the place of the answer to the first line that was
// not taken, when there is no problem of the client's that says it better.
func problemUnfinished() httpserver.Problem {
	return httpserver.Problem{Type: "batch-unfinished", Title: "The rest of the batch was not taken", Status: http.StatusServiceUnavailable,
		Detail: "the server is shutting down; this line and those after it were not taken, send them again"}
}

func problemBatchLimit() httpserver.Problem {
	return httpserver.Problem{Type: "batch-limit-reached", Title: "Too many batches are under way", Status: http.StatusServiceUnavailable,
		Detail: fmt.Sprintf("%d batches are under way; nothing was accepted, send it again later", maxBatches)}
}

func problemSyncLimit(limit int) httpserver.Problem {
	return httpserver.Problem{Type: "sync-limit-reached", Title: "Too many synchronous orders are under way", Status: http.StatusServiceUnavailable,
		Detail: fmt.Sprintf("%d calls of the backend are under way (intake.sync_limit); send it again later, or to POST /orders", limit)}
}

// problemRejected is for an order that the backend refused without a problem
// document of its own.
func problemRejected(out contract.Outcome) httpserver.Problem {
	return httpserver.Problem{Type: "rejected-by-backend", Title: "The backend refused the order", Status: out.StatusCode, Detail: out.Error}
}

// problemExhausted is for an order whose last attempt failed.
func problemExhausted(out contract.Outcome, tries int) httpserver.Problem {
	return httpserver.Problem{Type: "attempts-exhausted", Title: "The order could not be saved", Status: http.StatusBadGateway,
		Detail: fmt.Sprintf("%d attempts failed, the last one: %s", tries, out.Error)}
}

// problemSyncRejected answers POST /orders/sync with the backend's problem.
func problemSyncRejected(o *order) httpserver.Problem {
	return httpserver.Problem{Type: "rejected-by-backend", Title: "The backend refused the order", Status: http.StatusUnprocessableEntity,
		Detail:  "the order is stored as rejected; its number is free again",
		Members: map[string]any{"backend": json.RawMessage(o.Problem), "order": location(o)}}
}

// problemSyncFailed answers POST /orders/sync when the order was not saved. The
// order lives on only if another client was promised it.
func problemSyncFailed(out contract.Outcome, alive *order) httpserver.Problem {
	p := httpserver.Problem{Type: "backend-failed", Title: "The backend did not save the order", Status: http.StatusBadGateway,
		Detail: out.Error + "; nothing was stored, the order number is free"}
	if alive != nil {
		p.Detail = out.Error + "; the order was accepted from another request meanwhile and is tried again"
		p.Members = map[string]any{"order": location(alive)}
	}
	if out.Timeout {
		p.Type, p.Title, p.Status = "backend-timeout", "The backend did not answer in time", http.StatusGatewayTimeout
	}
	return p
}
