package contract_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/ThreeDotsLabs/watermill/message"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v3"

	"sluice/modules/contract"
)

// asyncAPI is docs/asyncapi.yaml.
type asyncAPI struct {
	topics   map[string][]string // types of message, by topic
	places   map[string]string   // of messages in the document, by type
	compiler *jsonschema.Compiler
}

func openAsyncAPI(t *testing.T) asyncAPI {
	t.Helper()
	text, err := os.ReadFile("../../docs/asyncapi.yaml")
	require.NoError(t, err)
	var value any
	require.NoError(t, yaml.Unmarshal(text, &value))
	text, err = json.Marshal(value)
	require.NoError(t, err)
	var document struct {
		Channels map[string]struct {
			Address  string
			Messages map[string]struct {
				Ref string `json:"$ref"`
			}
		}
		Components struct {
			Messages map[string]struct{ Name string }
		}
	}
	require.NoError(t, json.Unmarshal(text, &document))

	api := asyncAPI{topics: map[string][]string{}, places: map[string]string{}, compiler: jsonschema.NewCompiler()}
	for name, m := range document.Components.Messages {
		api.places[m.Name] = "#/components/messages/" + name
	}
	for _, channel := range document.Channels {
		for _, m := range channel.Messages {
			name := strings.TrimPrefix(m.Ref, "#/components/messages/")
			require.Contains(t, document.Components.Messages, name)
			api.topics[channel.Address] = append(api.topics[channel.Address], document.Components.Messages[name].Name)
		}
	}
	value, err = jsonschema.UnmarshalJSON(bytes.NewReader(text))
	require.NoError(t, err)
	requireLoneRefs(t, "", value)
	// The dialect of AsyncAPI's schemas is a superset of it.
	api.compiler.DefaultDraft(jsonschema.Draft7)
	api.compiler.AssertFormat()
	require.NoError(t, api.compiler.AddResource("file:///asyncapi.yaml", value))
	return api
}

// requireLoneRefs finds members beside a reference. Draft 7 says to pass over
// them (section 8.3), and so the tools do.
func requireLoneRefs(t *testing.T, place string, value any) {
	t.Helper()
	switch value := value.(type) {
	case map[string]any:
		if _, ok := value["$ref"]; ok {
			require.Len(t, value, 1, "%s has members beside its $ref", place)
		}
		for name, member := range value {
			requireLoneRefs(t, place+"/"+name, member)
		}
	case []any:
		for i, element := range value {
			requireLoneRefs(t, place+"/"+strconv.Itoa(i), element)
		}
	}
}

// check holds a message against the document.
func (a asyncAPI) check(t *testing.T, msg *message.Message) error {
	t.Helper()
	typ := msg.Metadata.Get("ce_type")
	place, ok := a.places[typ]
	require.True(t, ok, "%s is not in the document", typ)
	metadata := map[string]any{}
	for key, value := range msg.Metadata {
		metadata[key] = value
	}
	headers, err := a.compiler.Compile("file:///asyncapi.yaml" + place + "/headers")
	require.NoError(t, err)
	if err := headers.Validate(metadata); err != nil {
		return fmt.Errorf("headers: %w", err)
	}
	payload, err := a.compiler.Compile("file:///asyncapi.yaml" + place + "/payload")
	require.NoError(t, err)
	value, err := jsonschema.UnmarshalJSON(bytes.NewReader(msg.Payload))
	require.NoError(t, err)
	if err := payload.Validate(value); err != nil {
		return fmt.Errorf("payload: %w", err)
	}
	return nil
}

// traced adds what the publisher adds.
func traced(msg *message.Message) *message.Message {
	msg.Metadata.Set("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01")
	return msg
}

// everyMessage returns each type with all members, and with as few as there
// can be.
func everyMessage(t *testing.T) []*message.Message {
	t.Helper()
	bare := submitted()
	bare.OrderNumber = ""
	list := []*message.Message{submitted().Message(), bare.Message()}
	full := failed()
	rejected, saved, dead := full, full, full
	saved.Type, saved.StatusCode, saved.Error = contract.TypeSaved, 200, ""
	rejected.Type, rejected.StatusCode = contract.TypeRejected, 422
	dead.Type = contract.TypeDead
	few := contract.Outcome{OrderID: full.OrderID, Attempt: 1, StartedAt: at, Type: contract.TypeAttemptFailed, Error: "connection refused"}
	fewSaved := contract.Outcome{OrderID: full.OrderID, Attempt: 1, StartedAt: at, Type: contract.TypeSaved, StatusCode: 204}
	for _, out := range []contract.Outcome{full, saved, rejected, dead, few, fewSaved} {
		msg, err := out.Message()
		require.NoError(t, err)
		list = append(list, msg)
	}
	for _, marker := range []contract.Marker{{SentAt: at}, {SentAt: at, LostBefore: at.Add(-time.Minute)}, {SentAt: at, Last: "x"}} {
		msg, err := marker.Message()
		require.NoError(t, err)
		list = append(list, msg)
	}
	for _, msg := range list {
		traced(msg)
	}
	return list
}

func TestMessagesAreAsDocumented(t *testing.T) {
	api := openAsyncAPI(t)
	seen := map[string]bool{}
	for _, msg := range everyMessage(t) {
		require.NoError(t, api.check(t, msg), string(msg.Payload))
		seen[msg.Metadata.Get("ce_type")] = true
	}
	for _, typ := range constants(t, "Type") {
		require.True(t, seen[typ], "no message of type %s was made", typ)
	}
}

func TestTheDocumentHasEveryTopicAndTypeAndNoOther(t *testing.T) {
	api := openAsyncAPI(t)
	topics := constants(t, "Topic")
	var documented []string
	for topic := range api.topics {
		documented = append(documented, topic)
	}
	require.ElementsMatch(t, topics, documented)
	require.ElementsMatch(t, []string{contract.TypeSubmitted, contract.TypeMarker}, api.topics[contract.TopicSubmitted])
	require.ElementsMatch(t, []string{contract.TypeSaved, contract.TypeRejected, contract.TypeAttemptFailed, contract.TypeDead, contract.TypeMarker},
		api.topics[contract.TopicOutcome])
	require.Equal(t, []string{"poisoned"}, api.topics[contract.TopicPoison])
	var types []string
	for typ := range api.places {
		types = append(types, typ)
	}
	require.ElementsMatch(t, append(constants(t, "Type"), "poisoned"), types)
}

func TestTheDocumentRefusesOtherMessages(t *testing.T) {
	api := openAsyncAPI(t)
	for name, spoil := range map[string]func(*message.Message){
		"a header":         func(m *message.Message) { m.Metadata.Set("ce_new", "1") },
		"no trace":         func(m *message.Message) { delete(m.Metadata, "traceparent") },
		"another source":   func(m *message.Message) { m.Metadata.Set("ce_source", "/elsewhere") },
		"another version":  func(m *message.Message) { m.Metadata.Set("schema_version", "2") },
		"attempt zero":     func(m *message.Message) { m.Metadata.Set("attempt", "0") },
		"no time":          func(m *message.Message) { m.Metadata.Set("ce_time", "yesterday") },
		"a member":         func(m *message.Message) { m.Payload = bytes.Replace(m.Payload, []byte("{"), []byte(`{"new":1,`), 1) },
		"a missing member": func(m *message.Message) { m.Payload = bytes.Replace(m.Payload, []byte(`"attempt":3,`), nil, 1) },
		"a status as text": func(m *message.Message) { m.Payload = bytes.Replace(m.Payload, []byte("503"), []byte(`"503"`), 1) },
	} {
		msg, err := failed().Message()
		require.NoError(t, err)
		require.NoError(t, api.check(t, traced(msg)))
		spoil(msg)
		require.Error(t, api.check(t, msg), name)
	}
}

// constants returns the values of the exported string constants of the package
// that begin with prefix.
func constants(t *testing.T, prefix string) []string {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "contract.go", nil, 0)
	require.NoError(t, err)
	var values []string
	ast.Inspect(file, func(n ast.Node) bool {
		spec, ok := n.(*ast.ValueSpec)
		if !ok || !strings.HasPrefix(spec.Names[0].Name, prefix) || len(spec.Values) != 1 {
			return true
		}
		if literal, ok := spec.Values[0].(*ast.BasicLit); ok && literal.Kind == token.STRING {
			value, err := strconv.Unquote(literal.Value)
			require.NoError(t, err)
			values = append(values, value)
		}
		return true
	})
	require.NotEmpty(t, values)
	slices.Sort(values)
	return values
}
