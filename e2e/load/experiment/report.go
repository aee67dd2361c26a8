package experiment

import (
	"bytes"
	_ "embed"
	"encoding/base64"
	"encoding/csv"
	"fmt"
	"html/template"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// reportFile and resultsFile are the files that hold all of it; the others are named after parts and charts. Where not all
// parts were measured they are named after those that were, and leave a report that has more as it is.
func (r *result) reportFile() string  { return "report" + r.some() + ".html" }
func (r *result) resultsFile() string { return "results" + r.some() + ".md" }

func (r *result) some() string {
	if len(r.Parts) == len(parts()) {
		return ""
	}
	names := ""
	for _, p := range r.Parts {
		names += "-" + p.name
	}
	return names
}

// table is a table of the report.
type table struct {
	Title   string
	Columns []string
	Rows    [][]string
}

func (t *table) add(cells ...string) { t.Rows = append(t.Rows, cells) }

// noted marks what has a note.
const noted = " †"

// marked is the name of the row in a table.
func (r row) marked(name string) string {
	if r.note != "" {
		return name + noted
	}
	return name
}

// footnotes are what the marks in tables and plots are about.
func (p partResult) footnotes() []string {
	var footnotes []string
	for _, r := range p.medians {
		if r.note != "" {
			footnotes = append(footnotes, "† "+r.name()+": "+r.note)
		}
	}
	return footnotes
}

// write writes all files. What an earlier experiment left under other names stays.
func (r *result) write(dir string) error {
	files := map[string][]byte{}
	for _, p := range r.Parts {
		files[p.name+".csv"] = rowsCSV(p.rows)
		if len(p.series) > 0 {
			files[p.name+"_series.csv"] = seriesCSV(p.series)
		}
		for _, c := range p.charts(r.plan, p) {
			for _, t := range themes {
				picture, err := c.render(t)
				if err != nil {
					return err
				}
				files[c.file(t)] = picture
			}
		}
	}
	files[r.resultsFile()] = r.markdown()
	page, err := r.html(files)
	if err != nil {
		return err
	}
	files[r.reportFile()] = page
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o644); err != nil {
			return fmt.Errorf("write the results: %w", err)
		}
	}
	return nil
}

// file is the name of the chart's file.
func (c chart) file(t theme) string { return c.name + "-" + t.name + ".png" }

// rowsCSV has a line for each measured point and run.
func rowsCSV(rows []row) []byte {
	var file bytes.Buffer
	lines := csv.NewWriter(&file)
	header := []string{"part", "run", "mode", "variant", "orders"}
	for _, c := range rowColumns {
		header = append(header, c.name)
	}
	_ = lines.Write(append(header, "note")) // a buffer takes everything
	for _, r := range rows {
		fields := []string{r.part, strconv.Itoa(r.run), r.mode, r.variant, blank(float64(r.orders), r.orders == 0)}
		for _, c := range rowColumns {
			fields = append(fields, number(*c.of(&r)))
		}
		_ = lines.Write(append(fields, r.note))
	}
	lines.Flush()
	return file.Bytes()
}

// seriesCSV has a line for each second of each measured point and run.
func seriesCSV(series []instant) []byte {
	var file bytes.Buffer
	lines := csv.NewWriter(&file)
	header := []string{"part", "run", "mode", "variant"}
	for _, c := range instantColumns {
		header = append(header, c.name)
	}
	_ = lines.Write(header)
	for _, i := range series {
		fields := []string{i.part, strconv.Itoa(i.run), i.mode, i.variant}
		for _, c := range instantColumns {
			fields = append(fields, number(*c.of(&i)))
		}
		_ = lines.Write(fields)
	}
	lines.Flush()
	return file.Bytes()
}

func blank(x float64, empty bool) string {
	if empty {
		return ""
	}
	return number(x)
}

// number writes a number for a program: three decimals at most, and nothing where there is none.
func number(x float64) string {
	if math.IsNaN(x) || math.IsInf(x, 0) {
		return ""
	}
	return strconv.FormatFloat(math.Round(1000*x)/1000, 'f', -1, 64)
}

// facts are where, when and how it was measured.
func (r *result) facts() [][2]string {
	m := r.Machine
	kind := "full"
	if r.Quick {
		kind = "quick"
	}
	facts := [][2]string{
		{"date", r.Started.Format("2006-01-02 15:04 MST")},
		{"command", r.Command},
		{"Sluice", r.Version + ", " + m.Go},
		{"machine", fmt.Sprintf("%s, %d cores, %d MiB, %s %s", m.Processor, m.Cores, m.MemoryMiB, m.System, m.Kernel)},
		{"before the first point", fmt.Sprintf("others took %s of the processors, the hypervisor %s; timers rang %s late (99th percentile); an idle backend answered %.0f times a second; load average %s",
			percent(m.Taken), percent(m.Stolen), m.Lag.Round(10*time.Microsecond), m.Answers, m.Load)},
		{"gateway", "SQLite on disk, synchronous=FULL; message broker " + r.Broker},
		{"measured", fmt.Sprintf("%s, runs of each point: %d (tables and checks have the median), took %s", kind, r.Runs, r.Took.Round(time.Second))},
	}
	if m.Taking > 0 {
		facts = append(facts, [2]string{"a gateway with one processor", fmt.Sprintf("took %.0f synchronous orders of 16 KiB a second on an ideal backend; part D has %.0f", m.Taking, r.plan.memoryRate)})
	}
	if r.Arrivals != ArrivalsConstant || r.Service != ServiceConstant || r.Cancellation != CancellationIgnored {
		facts = append(facts, [2]string{"overload with", r.Arrivals + " arrivals, " + r.Service + " service times, cancellation " + r.Cancellation})
	}
	return facts
}

func percent(share float64) string {
	if math.IsNaN(share) {
		return "an unknown part"
	}
	return figure(100*share) + " %"
}

// markdown is the same as the page, for a repository.
func (r *result) markdown() []byte {
	var text strings.Builder
	text.WriteString("# The experiment: results\n\nWritten by `sluice experiment`; what each part is about is in the report, `" + r.reportFile() + "`.\n\n| | |\n|---|---|\n")
	for _, fact := range r.facts() {
		fmt.Fprintf(&text, "| %s | %s |\n", fact[0], cell(fact[1]))
	}
	for _, remark := range r.remarks() {
		fmt.Fprintf(&text, "\n**%s**\n", remark)
	}
	for _, p := range r.Parts {
		fmt.Fprintf(&text, "\n## %s\n\n%s\n", p.title, p.about(r.plan))
		for _, c := range p.charts(r.plan, p) {
			fmt.Fprintf(&text, "\n%s\n", c.picture(""))
		}
		for _, t := range p.tables(r.plan, p.medians) {
			text.WriteString("\n" + t.markdown())
		}
		for _, footnote := range p.footnotes() {
			text.WriteString("\n" + footnote + "\n")
		}
		text.WriteString("\n| | check | measured | expected |\n|---|---|---|---|\n")
		for _, v := range p.verdicts {
			mark := "ok"
			if !v.OK {
				mark = "**not so**"
			}
			fmt.Fprintf(&text, "| %s | %s | %s | %s |\n", mark, cell(v.Name), cell(v.Told()), cell(v.Expected))
		}
		text.WriteString("\nWhat this does not show:\n\n")
		for _, caveat := range p.caveats(r.plan) {
			fmt.Fprintf(&text, "* %s\n", caveat)
		}
		text.WriteString("\n" + parameters(p.points(r.plan)).markdown())
	}
	text.WriteString("\n## Columns of the CSV files\n\nOne line for each point and run: `part`, `run`, `mode` (`sync`, `async`, `sync-limit`), `variant` (what differs from the part's main course), " +
		"`orders` (of a closed loop), and the numbers below; `note` says why a point is not to be trusted. An empty field is a number that does not apply.\n\n")
	text.WriteString(columnTable(rowColumns) + "\nIn the files `…_series.csv`, one line for each second:\n\n" + columnTable(instantColumns))
	return []byte(text.String())
}

func columnTable[T any](columns []column[T]) string {
	t := table{Columns: []string{"column", "what it is"}}
	for _, c := range columns {
		t.add("`"+c.name+"`", c.doc)
	}
	return t.markdown()
}

// picture shows the chart in the theme of the page, from files in that directory.
func (c chart) picture(dir string) string {
	return fmt.Sprintf("<picture><source media=\"(prefers-color-scheme: dark)\" srcset=\"%[1]s%[2]s\"><img src=\"%[1]s%[3]s\" width=\"590\" alt=\"%[4]s\"></picture>",
		dir, c.file(themes[1]), c.file(themes[0]), template.HTMLEscapeString(c.title))
}

func (t table) markdown() string {
	var text strings.Builder
	if t.Title != "" {
		fmt.Fprintf(&text, "%s:\n\n", t.Title)
	}
	line := func(cells []string) {
		text.WriteString("|")
		for _, c := range cells {
			text.WriteString(" " + cell(c) + " |")
		}
		text.WriteString("\n")
	}
	line(t.Columns)
	text.WriteString("|" + strings.Repeat("---|", len(t.Columns)) + "\n")
	for _, row := range t.Rows {
		line(row)
	}
	return text.String()
}

// cell is a text that does not end a cell of a table.
func cell(text string) string {
	return strings.ReplaceAll(strings.ReplaceAll(text, "\n", " "), "|", "\\|")
}

//go:embed report.html.tmpl
var pageSource string

var page = template.Must(template.New("report").Parse(pageSource))

// html is the report as one page that asks for nothing from outside: the plots are in it.
func (r *result) html(files map[string][]byte) ([]byte, error) {
	type picture struct {
		Title string
		Light template.URL
		Dark  template.Srcset
	}
	type section struct {
		Name, Title string
		About       string
		Pictures    []picture
		Tables      []table
		Footnotes   []string
		Verdicts    []verdict
		Caveats     []string
		Parameters  table
	}
	inline := func(name string) string {
		return "data:image/png;base64," + base64.StdEncoding.EncodeToString(files[name])
	}
	var sections []section
	for _, p := range r.Parts {
		s := section{Name: p.name, Title: p.title, About: p.about(r.plan), Tables: p.tables(r.plan, p.medians), Footnotes: p.footnotes(), Verdicts: p.verdicts, Caveats: p.caveats(r.plan),
			Parameters: parameters(p.points(r.plan))}
		for _, c := range p.charts(r.plan, p) {
			s.Pictures = append(s.Pictures, picture{c.title, template.URL(inline(c.file(themes[0]))), template.Srcset(inline(c.file(themes[1])))})
		}
		sections = append(sections, s)
	}
	var text bytes.Buffer
	err := page.Execute(&text, struct {
		Facts    [][2]string
		Remarks  []string
		Sections []section
	}{r.facts(), r.remarks(), sections})
	if err != nil {
		return nil, fmt.Errorf("write the report: %w", err)
	}
	return text.Bytes(), nil
}
