// Package rivals measures what others make of the work that Sluice does, on the
// same RabbitMQ, the same PostgreSQL and the same stand-in for the Backend API:
// Watermill with the configuration that its documentation starts with, and
// River, the job queue on PostgreSQL. Its numbers stand beside those of
// BenchmarkAccept (modules/intake) and BenchmarkDrain (e2e).
//
// It is a module of its own, so that what it depends on is no dependency of
// Sluice, and it shares no code with Sluice: the stand-in is the sluice binary,
// built from the tree around it.
//
// # What is compared
//
// BenchmarkAccept is a call of the library from 64 goroutines, until it says that
// the order is taken. The accepting of Sluice is more: an HTTP request, its
// validation, the refusal of duplicates and a commit. So this is an upper bound
// of what a gateway on these libraries could accept. And it is not always the
// same promise: Watermill's AMQP publisher does not wait for the broker's confirm
// unless told to (amqp-confirms), and Go channels forget with the process.
//
// BenchmarkDrain is a backlog that is worked off, counted by the stand-in. The
// handler is the same for all: POST the order to the backend, and say what became
// of it, which is a message to a second topic with Watermill and the completion
// of the job with River. Nothing fails, so nobody's retries are measured, and
// nothing is traced or shown to a client, as Sluice does in the same time.
//
// # How it is kept fair
//
// Defaults stay as they are, and the comment at each configuration says where
// they are documented and what they mean here. Three things are no defaults, and
// each is in favour of the rival: connections to PostgreSQL are kept, and as many
// as serve it well (database/sql would keep 2 and pgxpool open 4); tables are
// analyzed after the backlog was written, as autovacuum does a minute later; and
// the HTTP client keeps its connections (net/http would keep 2). Under names of
// their own stand AMQP with confirms (amqp-confirms), and River with the fetching
// that its own benchmark uses (river-2ms-fetch), which is faster than the default.
//
// Everything shares one machine and pays for it: rival, broker and stand-in. The
// default SQL subscriber also waits for every transaction that writes anywhere in
// the same PostgreSQL server, so numbers want a server that nobody else uses.
//
//	go -C e2e/rivals test -run '^$' -bench . -benchtime 1x
//
// takes about two minutes. What has no RabbitMQ (SLUICE_TEST_AMQP_URL) or no
// PostgreSQL (SLUICE_TEST_POSTGRES_DSN) is skipped.
package rivals
