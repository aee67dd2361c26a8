-- +goose Up
-- Direct orders that are under way, or that a process left behind: from now on
-- they are counted.
INSERT INTO order_counts (status, shard, n) SELECT 'direct', 0, count(*) FROM orders WHERE finished_at IS NULL AND direct;

-- +goose Down
DELETE FROM order_counts WHERE status IN ('direct', 'direct final');
