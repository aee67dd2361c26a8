package httpserver

import (
	"fmt"
	"html/template"
	"net/http"
	"strings"
)

// ProblemType explains one value of Problem.Type: what GET /problems/<name>
// says. Texts are plain sentences.
type ProblemType struct {
	Name     string // Problem.Type
	Title    string // what happened, in a few words
	Happened string // what happened
	Do       string // what the client is to do
}

// ProblemTypes explains the problems that this package answers with.
func ProblemTypes() []ProblemType {
	return []ProblemType{
		{"bad-request", "The request target is not a path",
			"The first line of the request names no path, as in \"GET *\".",
			"Send the request to a path of this server."},
		{"body-too-large", "The body is too large",
			"The body has more bytes than one request may have, or one line of a batch.",
			"Make the order smaller, or ask the operator for a larger intake.max_body. The same request will not succeed."},
		{"incomplete-body", "The body did not arrive in full",
			"The connection broke while the body was sent, or its length or its chunks are wrong.",
			"Send the request again, with the same Idempotency-Key. Nothing was accepted."},
		{"internal-error", "A fault of the server",
			"The request met a fault of this server. It has been logged with the trace of the request.",
			"Send the request again, with the same Idempotency-Key: whether it did its work is not known. If it happens again, tell the operator."},
		{"method-not-allowed", "The path does not know the method",
			"There is something at this path, but not for this method. The header Allow lists the methods that there are.",
			"Use one of those. The document at /openapi.yaml lists all paths and methods."},
		{"not-found", "There is nothing at this path",
			"The path of the request names nothing that this server has.",
			"Look for typing errors. The document at /openapi.yaml lists all paths."},
		{"rate-limited", "Too many orders in too short a time",
			"The client has used up what it may send at the moment. RateLimit-Policy says how much that is, RateLimit how much is left. Nothing was accepted.",
			"Send the order again after the seconds in Retry-After, with the same Idempotency-Key."},
		{"request-timeout", "The body did not arrive in time",
			"The body was sent so slowly that the server stopped waiting for it (http.read_timeout).",
			"Send the request again, with the same Idempotency-Key. Nothing was accepted."},
		{"unauthorized", "The request needs a valid API key",
			"This server takes requests only with an API key, and this one had none that is known.",
			"Send Authorization: Bearer with the key that the operator gave you."},
	}
}

var problemTemplate = template.Must(template.New("problem").Parse(`<main>
<h1>{{.Title}}</h1>
<p><code>/problems/{{.Name}}</code></p>
<h2>What happened</h2>
<p>{{.Happened}}</p>
<h2>What to do</h2>
<p>{{.Do}}</p>
</main>`))

// ProblemPages answers GET /problems/{name} with a short page about one of the
// types: in HTML, or in plain text to a client that asks for that alone. Names
// that are not among them are 404. It is to be registered with that pattern.
func ProblemPages(types []ProblemType) (http.Handler, error) {
	type pages struct{ html, text *Static }
	byName := make(map[string]pages, len(types))
	for _, t := range types {
		var body strings.Builder
		if err := problemTemplate.Execute(&body, t); err != nil {
			return nil, fmt.Errorf("make the page of problem %s: %w", t.Name, err)
		}
		html, err := NewPage(t.Title, template.HTML(body.String()))
		if err != nil {
			return nil, fmt.Errorf("make the page of problem %s: %w", t.Name, err)
		}
		text := fmt.Sprintf("%s (/problems/%s)\n\n%s\n\nWhat to do: %s\n", t.Title, t.Name, t.Happened, t.Do)
		byName[t.Name] = pages{html, NewStatic("text/plain; charset=utf-8", []byte(text))}
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		page, ok := byName[r.PathValue("name")]
		if !ok {
			WriteProblem(w, r, notFound())
			return
		}
		w.Header().Set("Vary", "Accept")
		if wantsText(r.Header.Values("Accept")) {
			page.text.ServeHTTP(w, r)
			return
		}
		page.html.ServeHTTP(w, r)
	}), nil
}

// wantsText reports whether a client names plain text and not HTML.
func wantsText(accept []string) bool {
	all := strings.ToLower(strings.Join(accept, ","))
	return strings.Contains(all, "text/plain") && !strings.Contains(all, "text/html")
}
