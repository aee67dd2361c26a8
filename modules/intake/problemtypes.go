package intake

import (
	"cmp"
	"slices"

	"sluice/platform/httpserver"
)

// ProblemTypes explains every problem that clients and operators can get,
// sorted by name.
func ProblemTypes() []httpserver.ProblemType {
	types := append(httpserver.ProblemTypes(), []httpserver.ProblemType{
		{Name: "attempts-exhausted", Title: "The order could not be saved",
			Happened: "Every attempt at saving the order failed, and there will be no further one. The order is dead: it is kept, with its number.",
			Do:       "Look at GET /orders/{id}/attempts for what went wrong. An operator can replay the order when the backend is well again."},
		{Name: "backend-failed", Title: "The backend did not save the order",
			Happened: "POST /orders/sync called the backend, which answered with an error or could not be reached. Nothing was stored and the order number is free, unless the problem names an order: that one was promised to another client meanwhile, and is tried again.",
			Do:       "Send the order again, here or to POST /orders, which tries until the backend is well again."},
		{Name: "backend-timeout", Title: "The backend did not answer in time",
			Happened: "POST /orders/sync called the backend, which did not answer within backend.timeout. Whether it saved the order is not known. Nothing was stored here and the order number is free, unless the problem names an order: that one was promised to another client meanwhile, and is tried again.",
			Do:       "Send the order again, here or to POST /orders. The repetition is a new order with an id of its own, so the backend can recognise it by the order number only."},
		{Name: "backlog-full", Title: "Too many orders are waiting",
			Happened: "As many orders wait for the backend as may wait at once (intake.max_backlog). This one was not accepted.",
			Do:       "Send it again after the seconds in Retry-After, with the same Idempotency-Key."},
		{Name: "batch-limit-reached", Title: "Too many batches are under way",
			Happened: "As many batches are under way as may be at once. Nothing was accepted.",
			Do:       "Send the batch again after the seconds in Retry-After, or wait for another one of yours to end."},
		{Name: "batch-unfinished", Title: "The rest of the batch was not taken",
			Happened: "The server is about to stop. The lines before this one were answered and are kept; this line and those after it were not taken.",
			Do:       "Send the lines that were not answered again, in a new batch."},
		{Name: "duplicate-order-number", Title: "Another order has this number",
			Happened: "There is an order with this number and a different body. The problem names it in the member order. Only rejected orders give their numbers back.",
			Do:       "Give the new order a number of its own. If it is meant to be the same order, send the same body: equal as JSON values is equal enough."},
		{Name: "idempotency-key-reused", Title: "The Idempotency-Key was used for another order",
			Happened: "The same Idempotency-Key came with a different body before. The problem names that order in the member order.",
			Do:       "Make a new key for each new order, and keep it for the repetitions of that one request."},
		{Name: "invalid-order", Title: "The order does not satisfy the order schema",
			Happened: "The body is JSON, but not an order as the order schema wants it. The member errors lists what is wrong, each with a JSON Pointer to the place.",
			Do:       "Correct the order and send it again. The schema is in the document at /openapi.yaml."},
		{Name: "invalid-query", Title: "A query parameter cannot be understood",
			Happened: "A parameter behind the question mark has a value that it cannot have, or stands there twice, or the whole cannot be read. The detail says which.",
			Do:       "Correct it. A cursor is the next of an earlier answer, unchanged. In a value, characters such as % ; & + are percent-encoded."},
		{Name: "malformed-header", Title: "A header field cannot be understood",
			Happened: "A header field that this server looks at is malformed. The detail names it.",
			Do:       "Correct it. An Idempotency-Key is one string in quotes, of at most 255 visible ASCII characters."},
		{Name: "malformed-json", Title: "The body is not one JSON value",
			Happened: "The body cannot be read as JSON in UTF-8. The detail names line and column. A member name that stands twice in one object is an error too.",
			Do:       "Correct the body and send it again."},
		{Name: "not-acceptable", Title: "Events are text/event-stream",
			Happened: "The header Accept leaves no room for text/event-stream, and the events of an order are nothing else.",
			Do:       "Accept text/event-stream, or look at the order with GET /orders/{id}."},
		{Name: "order-not-dead", Title: "Only dead orders can be replayed",
			Happened: "The order is not dead: it waits, or it is saved, or it was rejected.",
			Do:       "Nothing, if it waits or is saved. A rejected order is corrected by its client, as a new one."},
		{Name: "order-not-found", Title: "There is no such order",
			Happened: "No order of yours has this id. Finished orders are removed after a while (store.retention), and the orders of other clients are not shown.",
			Do:       "Look at the id. GET /orders?orderNumber=… finds an order by its number."},
		{Name: "overloaded", Title: "Too many large orders arrive at once",
			Happened: "There is no room for the body at the moment. Nothing was accepted.",
			Do:       "Send the order again after the seconds in Retry-After, with the same Idempotency-Key."},
		{Name: "rejected-by-backend", Title: "The backend refused the order",
			Happened: "The backend looked at the order and refused it for good. Its own words are in the member backend, or in the problem of the order. The order is stored as rejected, and its number is free.",
			Do:       "Correct the order as the backend says and send it again: it is a new order then, with the same number if you like, and with a new Idempotency-Key."},
		{Name: "storage-unavailable", Title: "Orders cannot be stored or read at the moment",
			Happened: "The storage of this server does not answer, or not in time. An order that was answered so was not accepted, unless the problem names it in the member order, or says that this is not known: the storage was lost while it was committing.",
			Do:       "Send the request again after the seconds in Retry-After, with the same order number or Idempotency-Key, which makes no second order of it. With the member order, look at that one instead."},
		{Name: "sync-limit-reached", Title: "Too many synchronous orders are under way",
			Happened: "As many calls of POST /orders/sync are under way as may be at once (intake.sync_limit). Nothing was accepted.",
			Do:       "Send the order again after the seconds in Retry-After, or send it to POST /orders, which does not wait for the backend."},
		{Name: "unsupported-media-type", Title: "The body is of another media type",
			Happened: "One order is application/json, a batch is application/x-ndjson, both in UTF-8. The body was said to be something else.",
			Do:       "Set Content-Type. A body with a Content-Encoding is not unpacked."},
	}...)
	slices.SortFunc(types, func(a, b httpserver.ProblemType) int { return cmp.Compare(a.Name, b.Name) })
	return types
}
