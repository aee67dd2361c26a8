-- +goose Up
-- Ids are UUIDv7, so their order is that of acceptance. Fixed-width columns
-- stand first, the wide ones in front, which saves padding.
--
-- A row is inserted, changed two or three times within seconds, and then rests
-- until it is purged. The room that fillfactor leaves takes the later versions
-- of the rows beside it, so that a page is dirtied again instead of another
-- one; what they leave behind is pruned there. Claims, marks and outcomes move
-- a row from one partial index to the next and so cannot be heap-only (HOT)
-- updates; every index that a row is in costs each of them an entry, which is
-- why there are no more of them than questions to the table.
CREATE TABLE orders (
    accepted_at     timestamptz NOT NULL,
    updated_at      timestamptz NOT NULL,
    finished_at     timestamptz,
    publish_at      timestamptz,          -- NULL: nothing to publish
    published_at    timestamptz,          -- when it was last handed to a broker that keeps messages
    attempts        int         NOT NULL,
    attempt_base    int         NOT NULL,
    backend_status  int         NOT NULL DEFAULT 0,
    size            int         NOT NULL, -- of body
    id              uuid        NOT NULL PRIMARY KEY,
    released        uuid        NOT NULL, -- zero while the order holds its number, else its id
    direct          boolean     NOT NULL,
    owner           text        NOT NULL,
    status          text        NOT NULL,
    number          text,                 -- NULL: the order has no number
    exact_number    bytea,                -- the number, where the column number has a digest of it
    idempotency_key text,
    trace_parent    text        NOT NULL,
    trace_state     text        NOT NULL,
    content_type    text        NOT NULL,
    hash            bytea       NOT NULL,
    backend_type    text        NOT NULL DEFAULT '',
    backend_body    bytea,
    problem         bytea,
    history         bytea,                -- JSON array of attempts
    body            bytea       NOT NULL
) WITH (
    fillfactor = 75,
    -- A fixed share of a large table is too much garbage for the small indexes
    -- of what is due and what is waiting.
    autovacuum_vacuum_scale_factor = 0.01,
    autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_insert_scale_factor = 0.05,
    autovacuum_analyze_scale_factor = 0.02,
    autovacuum_vacuum_cost_delay = 1
);

-- Who holds a number, and all who ever had it.
CREATE UNIQUE INDEX orders_number ON orders (number, owner, released) WHERE number IS NOT NULL;
CREATE UNIQUE INDEX orders_key ON orders (idempotency_key, owner) WHERE idempotency_key IS NOT NULL;
-- Lists of one owner among many; without API keys there is one owner, '', and the ids will do.
CREATE INDEX orders_owner ON orders (owner, id) WHERE owner <> '';
-- What is due, what is with the broker, what is waiting, what needs a look. Each holds only the few
-- orders that it is about, whatever the size of the table.
CREATE INDEX orders_due ON orders (publish_at, id) WHERE publish_at IS NOT NULL;
CREATE INDEX orders_published ON orders (published_at, id) WHERE finished_at IS NULL AND publish_at IS NULL;
CREATE INDEX orders_waiting ON orders (status, id) WHERE finished_at IS NULL;
CREATE INDEX orders_failed ON orders (status, id) WHERE status IN ('rejected', 'dead');

-- How many orders are in each state: the sum over the shards, kept in step by
-- every transaction. A connection writes to the shard of its server process, so
-- that transactions under way at the same time do not wait for each other's row.
CREATE TABLE order_counts (
    n      bigint NOT NULL,
    shard  int    NOT NULL,
    status text   NOT NULL,
    PRIMARY KEY (status, shard)
) WITH (fillfactor = 20, autovacuum_vacuum_threshold = 1000, autovacuum_vacuum_cost_delay = 0);

-- Which broker has the published orders.
CREATE TABLE carrier (
    one  int  NOT NULL PRIMARY KEY CHECK (one = 1),
    name text NOT NULL
);

-- +goose Down
DROP TABLE carrier;
DROP TABLE order_counts;
DROP TABLE orders;
