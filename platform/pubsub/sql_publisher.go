package pubsub

import (
	"context"
	"database/sql"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"strconv"
	"strings"
	"sync"
	"time"

	librarysql "github.com/ThreeDotsLabs/watermill-sql/v3/pkg/sql"
	"github.com/ThreeDotsLabs/watermill/message"

	"sluice/platform/group"
)

const (
	// statementSize is how many bytes of messages go into one INSERT: enough
	// for its costs to be shared by thousands, and little to hold twice.
	statementSize = 1 << 20
	// publishFlushers is how many INSERTs of a topic are under way at a time:
	// one waits for the disk while the other one is computed.
	publishFlushers = 2
)

// errRouteChanged is what the database answers to an INSERT when the topic has
// other groups than its sender thought.
var errRouteChanged = errors.New("the topic's consumer groups have changed")

// sqlTopic is where a topic's messages go.
type sqlTopic struct {
	broker  *sqlBroker
	name    string
	batches *group.Group[*message.Message]

	mu    sync.Mutex
	route sqlRoute // empty when it must be asked for
}

// sqlRoute is the queues that get a message, in order. As the library's topic
// it is written "3.7".
type sqlRoute []sqlQueue

func (r sqlRoute) String() string {
	numbers := make([]string, len(r))
	for i, queue := range r {
		numbers[i] = strconv.FormatInt(int64(queue), 10)
	}
	return strings.Join(numbers, ".")
}

func parseRoute(text string) (sqlRoute, error) {
	var route sqlRoute
	for number := range strings.SplitSeq(text, ".") {
		queue, err := strconv.ParseInt(number, 10, 64)
		if err != nil {
			return nil, err
		}
		route = append(route, sqlQueue(queue))
	}
	return route, nil
}

func (b *sqlBroker) publish(topic string, msgs []*message.Message) error {
	return b.send(context.Background(), topic, msgs) // which has its own time limit
}

// confirm is done when the database has the messages, like publish, but does
// not outlast the contexts of the messages.
func (b *sqlBroker) confirm(topic string, msgs []*message.Message) error {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	for _, msg := range msgs {
		defer context.AfterFunc(msg.Context(), func() { cancel(context.Cause(msg.Context())) })()
	}
	return b.send(ctx, topic, msgs)
}

// send waits until the messages are in the database, but no longer than a
// Publish may take.
func (b *sqlBroker) send(ctx context.Context, topic string, msgs []*message.Message) error {
	t, err := b.topic(topic)
	if err != nil {
		return b.refusal(topic, err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, b.timeout, fmt.Errorf("no answer from the database within %s", b.timeout))
	defer cancel()
	if err := t.batches.Do(ctx, copies(msgs)...); err != nil {
		return b.refusal(topic, err)
	}
	return nil
}

// copies returns messages that nobody else has. A caller who gave up may publish
// his again, and set their metadata, while they are being written.
func copies(msgs []*message.Message) []*message.Message {
	all := make([]*message.Message, len(msgs))
	for i, msg := range msgs {
		all[i] = &message.Message{UUID: msg.UUID, Metadata: maps.Clone(msg.Metadata), Payload: msg.Payload}
	}
	return all
}

func (b *sqlBroker) refusal(topic string, err error) error {
	return fmt.Errorf("publish to %s: %w", topic, b.closedOr(err))
}

// closedOr is err, unless the PubSub has closed: that is the reason for all
// else then.
func (b *sqlBroker) closedOr(err error) error {
	if isClosed(b.closing) {
		return ErrClosed
	}
	return oneLine(err)
}

func (b *sqlBroker) topic(name string) (*sqlTopic, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed || isClosed(b.closing) {
		return nil, ErrClosed
	}
	t := b.topics[name]
	if t == nil {
		t = &sqlTopic{broker: b, name: name}
		t.batches = group.New(group.Config[*message.Message]{Flush: t.flush, Flushers: publishFlushers, Size: statementSize, Weigh: size, Patience: b.timeout})
		b.topics[name] = t
	}
	return t, nil
}

// size is about what a message takes in a statement.
func size(msg *message.Message) int {
	n := 64 + len(msg.UUID) + len(msg.Payload)
	for key, value := range msg.Metadata {
		n += len(key) + len(value) + 2
	}
	return n
}

// flush publishes a batch to the groups that the topic has now. It ends with the
// broker.
func (t *sqlTopic) flush(_ context.Context, msgs []*message.Message) error {
	ctx := t.broker.life
	for range 3 {
		route, err := t.currentRoute(ctx)
		if err != nil {
			return err
		}
		err = t.broker.publisher.Publish(route.String(), msgs...)
		switch {
		case err == nil:
			t.broker.published(route)
			return nil
		case isUndefinedTable(err):
			if err := t.broker.repair(ctx); err != nil {
				return err
			}
		case !errors.Is(err, errRouteChanged):
			return err
		}
		t.setRoute(nil)
	}
	return errRouteChanged
}

func (t *sqlTopic) setRoute(route sqlRoute) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.route = route
}

func (t *sqlTopic) currentRoute(ctx context.Context) (sqlRoute, error) {
	t.mu.Lock()
	route := t.route
	t.mu.Unlock()
	if len(route) > 0 {
		return route, nil
	}
	ctx, cancel := context.WithTimeout(ctx, t.broker.timeout)
	defer cancel()
	route, err := t.broker.readRoute(ctx, t.name)
	if isUndefinedTable(err) {
		if err := t.broker.repair(ctx); err != nil {
			return nil, err
		}
		route, err = t.broker.readRoute(ctx, t.name)
	}
	if err != nil {
		return nil, fmt.Errorf("read the topic's groups: %w", err)
	}
	if len(route) == 0 {
		return nil, ErrNoSubscriber
	}
	t.setRoute(route)
	return route, nil
}

func (b *sqlBroker) readRoute(ctx context.Context, topic string) (sqlRoute, error) {
	rows, err := b.db.QueryContext(ctx, `SELECT id FROM `+b.names.groups()+` WHERE topic = $1 ORDER BY id`, topic)
	if err != nil {
		return nil, err
	}
	defer rows.Close()
	var route sqlRoute
	for rows.Next() {
		var queue sqlQueue
		if err := rows.Scan(&queue); err != nil {
			return nil, err
		}
		route = append(route, queue)
	}
	return route, rows.Err()
}

// sqlWriter is what the library's publisher writes to. The library gives its
// statements no time limit and does not look at their results.
type sqlWriter struct {
	*sql.DB
	life    context.Context // the broker's, for lack of a caller's
	timeout time.Duration
}

// ExecContext fails with errRouteChanged when nothing was written.
func (w sqlWriter) ExecContext(_ context.Context, query string, args ...any) (sql.Result, error) {
	ctx, cancel := context.WithTimeout(w.life, w.timeout)
	defer cancel()
	result, err := w.DB.ExecContext(ctx, query, args...)
	if err != nil {
		return nil, err
	}
	if n, err := result.RowsAffected(); err == nil && n == 0 {
		return nil, errRouteChanged
	}
	return result, nil
}

// sqlInserts is the library's SchemaAdapter for publishing.
type sqlInserts struct{ names sqlNames }

// InsertQuery writes any number of messages to the queues of a route, in one
// statement with a fixed number of parameters. It writes nothing if these are
// not all the queues that the topic has when the statement begins: messages
// must not miss a group that was declared by another process.
func (a sqlInserts) InsertQuery(route string, msgs message.Messages) (librarysql.Query, error) {
	queues, err := parseRoute(route)
	if err != nil {
		return librarysql.Query{}, err
	}
	groups := a.names.groups()
	var text strings.Builder
	text.WriteString(`WITH m AS MATERIALIZED (
		SELECT uuid, metadata, payload FROM unnest($1::bytea[], $2::bytea[], $3::bytea[]) AS m (uuid, metadata, payload)
		WHERE $4::bigint[] = (SELECT array_agg(id ORDER BY id) FROM ` + groups + ` WHERE topic = (SELECT topic FROM ` + groups + ` WHERE id = ($4::bigint[])[1])))`)
	for i, queue := range queues {
		insert := `INSERT INTO ` + a.names.queue(queue) + ` (uuid, metadata, payload) SELECT uuid, metadata, payload FROM m`
		if i < len(queues)-1 {
			insert = fmt.Sprintf(", i%d AS (%s)", i, insert)
		}
		text.WriteString(insert)
	}
	ids, metadata, payloads := columns(msgs)
	return librarysql.Query{Query: text.String(), Args: []any{ids, metadata, payloads, []sqlQueue(queues)}}, nil
}

func columns(msgs message.Messages) (ids, metadata, payloads [][]byte) {
	for _, msg := range msgs {
		ids = append(ids, []byte(msg.UUID))
		metadata = append(metadata, encodeMetadata(msg.Metadata))
		payloads = append(payloads, append([]byte{}, msg.Payload...)) // not nil, which would be NULL
	}
	return ids, metadata, payloads
}

// The rest of the SchemaAdapter is not used for publishing.
func (sqlInserts) SelectQuery(string, string, librarysql.OffsetsAdapter) librarysql.Query {
	return librarysql.Query{}
}
func (sqlInserts) UnmarshalMessage(librarysql.Scanner) (librarysql.Row, error) {
	return librarysql.Row{}, errors.ErrUnsupported
}
func (sqlInserts) SchemaInitializingQueries(string) []librarysql.Query { return nil }
func (sqlInserts) SubscribeIsolationLevel() sql.IsolationLevel         { return sql.LevelDefault }

// encodeMetadata writes each key and each value with its length before it.
// JSON would not keep every string as it is.
func encodeMetadata(metadata message.Metadata) []byte {
	data := []byte{} // not nil, which would be NULL
	for key, value := range metadata {
		for _, text := range []string{key, value} {
			data = binary.AppendUvarint(data, uint64(len(text)))
			data = append(data, text...)
		}
	}
	return data
}

// decodeMetadata returns what it can read. It has no errors: a row that could
// not be taken would stand in the way of all others for ever.
func decodeMetadata(data []byte) message.Metadata {
	metadata := make(message.Metadata)
	for len(data) > 0 {
		var key, value string
		key, data = decodeText(data)
		value, data = decodeText(data)
		metadata[key] = value
	}
	return metadata
}

func decodeText(data []byte) (text string, rest []byte) {
	length, n := binary.Uvarint(data)
	if n <= 0 || length > uint64(len(data)-n) {
		return "", nil
	}
	end := n + int(length) // which is at most len(data)
	return string(data[n:end]), data[end:]
}
