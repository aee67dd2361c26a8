-- +goose Up
-- Lists of one owner among many; without API keys there is one owner, '', and the ids will do.
CREATE INDEX orders_owner ON orders (owner, id) WHERE owner <> '';

-- +goose Down
DROP INDEX orders_owner;
