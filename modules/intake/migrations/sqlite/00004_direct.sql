-- +goose Up
-- Direct orders that a process left behind: from now on they are counted.
INSERT INTO order_counts (status, n) SELECT 'direct', count(*) FROM orders WHERE finished_at IS NULL AND direct = 1;

-- +goose Down
DELETE FROM order_counts WHERE status IN ('direct', 'direct final');
