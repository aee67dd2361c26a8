package load

import (
	"bytes"
	"strconv"
	"strings"
)

// numberMark stands for the order number in a body.
const numberMark = "{{number}}"

// builtInOrder is valid for the default schema of the gateway. The note takes the padding.
const builtInOrder = `{"orderNumber":"` + numberMark + `","customerId":"load","currency":"EUR",` +
	`"items":[{"sku":"tea","quantity":2,"unitPrice":4.5}],"note":""}`

// template makes the bodies of orders. It is safe for concurrent use.
type template struct {
	prefix string
	parts  [][]byte // what stands around the numbers
	size   int      // of the built-in order; 0 leaves it as it is
}

func newTemplate(cfg Config) template {
	body := cfg.Body
	if body == nil {
		body = []byte(builtInOrder)
	}
	return template{prefix: cfg.Prefix + "-", parts: bytes.Split(body, []byte(numberMark)), size: cfg.Size}
}

// order returns the body of the nth order.
func (t template) order(n int64) []byte {
	number := t.prefix + strconv.FormatInt(n, 10)
	body := bytes.Join(t.parts, []byte(number))
	if missing := t.size - len(body); missing > 0 {
		body = append(body[:len(body)-len(`"}`)], strings.Repeat("x", missing)+`"}`...)
	}
	return body
}
