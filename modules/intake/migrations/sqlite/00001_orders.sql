-- +goose Up
-- Times are microseconds since 1970-01-01 UTC. Ids are the 16 bytes of a
-- UUIDv7, so their order is that of acceptance.
CREATE TABLE orders (
    id              BLOB    NOT NULL,
    owner           TEXT    NOT NULL,
    number          TEXT,             -- NULL: the order has no number
    released        BLOB    NOT NULL, -- empty while the order holds its number, else its id
    idempotency_key TEXT,
    status          TEXT    NOT NULL,
    attempts        INTEGER NOT NULL,
    attempt_base    INTEGER NOT NULL,
    direct          INTEGER NOT NULL,
    accepted_at     INTEGER NOT NULL,
    updated_at      INTEGER NOT NULL,
    finished_at     INTEGER,
    publish_at      INTEGER,          -- NULL: nothing to publish
    trace_parent    TEXT    NOT NULL,
    trace_state     TEXT    NOT NULL,
    backend_status  INTEGER NOT NULL,
    backend_type    TEXT    NOT NULL,
    backend_body    BLOB,
    problem         BLOB,
    history         BLOB,             -- JSON array of attempts
    hash            BLOB    NOT NULL,
    size            INTEGER NOT NULL,
    content_type    TEXT    NOT NULL,
    body            BLOB    NOT NULL
) STRICT;

CREATE UNIQUE INDEX orders_id ON orders (id);
-- Who holds a number, and all who ever had it.
CREATE UNIQUE INDEX orders_number ON orders (number, owner, released) WHERE number IS NOT NULL;
CREATE UNIQUE INDEX orders_key ON orders (idempotency_key, owner) WHERE idempotency_key IS NOT NULL;
-- What is due, what is with the broker, what is waiting, what needs a look. Each holds only the few
-- orders that it is about, whatever the size of the table.
CREATE INDEX orders_due ON orders (publish_at, id, size) WHERE publish_at IS NOT NULL;
CREATE INDEX orders_published ON orders (id) WHERE finished_at IS NULL AND publish_at IS NULL;
CREATE INDEX orders_waiting ON orders (status, id) WHERE finished_at IS NULL;
CREATE INDEX orders_failed ON orders (status, id) WHERE status IN ('rejected', 'dead');

-- How many orders are in each state, kept in step by every transaction, so
-- that nobody has to count them.
CREATE TABLE order_counts (
    status TEXT    NOT NULL PRIMARY KEY,
    n      INTEGER NOT NULL
) STRICT;

-- +goose Down
DROP TABLE order_counts;
DROP TABLE orders;
