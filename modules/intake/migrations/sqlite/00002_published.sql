-- +goose Up
-- When an unfinished order was handed to a broker that keeps messages, and
-- which broker that was: what the broker loses, or is replaced with, has to
-- become due again.
ALTER TABLE orders ADD COLUMN published_at INTEGER;
UPDATE orders SET published_at = 0 WHERE finished_at IS NULL AND publish_at IS NULL;
DROP INDEX orders_published;
CREATE INDEX orders_published ON orders (published_at, id) WHERE finished_at IS NULL AND publish_at IS NULL;

CREATE TABLE carrier (
    one  INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    name TEXT    NOT NULL
) STRICT;

-- +goose Down
DROP TABLE carrier;
DROP INDEX orders_published;
ALTER TABLE orders DROP COLUMN published_at;
CREATE INDEX orders_published ON orders (id) WHERE finished_at IS NULL AND publish_at IS NULL;
