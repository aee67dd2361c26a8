package experiment

import (
	"bytes"
	"cmp"
	"fmt"
	"image/color"
	"image/png"
	"math"
	"slices"
	"strconv"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/font"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
	"gonum.org/v1/plot/vg/draw"
	"gonum.org/v1/plot/vg/vgimg"
)

// chart is a plot to be drawn: curves over a load, or over time.
type chart struct {
	name, title string
	x, y        string // what the axes show, with units
	logX, logY  bool
	lines       []line
	bands       []band
}

type line struct {
	label  string
	colour string // a mode, colourIdeal or one of shades
	dashed bool
	points []xy
}

// xy is a point of a line; low and high are the range of several runs, both 0 if there was one. noted is one with a note,
// which is drawn hollow.
type xy struct {
	x, y, low, high float64
	noted           bool
}

// band is a time that is marked.
type band struct {
	from, to float64
	label    string
}

// colourIdeal is the colour of what is known and not measured.
const colourIdeal = "ideal"

// shades are colours for the loads of one mode, the lowest first.
var shades = []string{"shade 1", "shade 2", "shade 3", "shade 4", "shade 5"}

// theme is one of the two looks of every plot, for pages that are light or dark.
type theme struct {
	name                          string
	paper, ink, faint, grid, band color.Color
	colours                       map[string]color.Color
}

func rgb(hex uint32) color.Color {
	return color.NRGBA{R: uint8(hex >> 16), G: uint8(hex >> 8), B: uint8(hex), A: 255}
}

// The colours of the modes can be told apart by those who do not see red and green as different.
var themes = []theme{
	{
		name: "light", paper: rgb(0xffffff), ink: rgb(0x1f2328), faint: rgb(0x59636e), grid: rgb(0xe4e7eb), band: rgb(0xf1f1ee),
		colours: map[string]color.Color{modeSync: rgb(0xc8401b), modeAsync: rgb(0x0b62b0), modeSyncLimit: rgb(0xb58a00), colourIdeal: rgb(0x8b949e),
			shades[0]: rgb(0x9ecae1), shades[1]: rgb(0x5aa5d6), shades[2]: rgb(0x2b7bba), shades[3]: rgb(0x0b559f), shades[4]: rgb(0x08306b)},
	},
	{
		name: "dark", paper: rgb(0x0d1117), ink: rgb(0xe6edf3), faint: rgb(0x9198a1), grid: rgb(0x262c36), band: rgb(0x1c222b),
		colours: map[string]color.Color{modeSync: rgb(0xff7b54), modeAsync: rgb(0x58a6ff), modeSyncLimit: rgb(0xe3b341), colourIdeal: rgb(0x7d8590),
			shades[0]: rgb(0x2f5d8c), shades[1]: rgb(0x3c7fc0), shades[2]: rgb(0x58a6ff), shades[3]: rgb(0x9accff), shades[4]: rgb(0xd6ebff)},
	},
}

// Plots are drawn at twice the size at which pages show them.
const (
	chartWidth  = 15 * vg.Centimeter
	chartHeight = 8.6 * vg.Centimeter
	chartDPI    = 160
)

// render draws the chart as PNG.
func (c chart) render(t theme) ([]byte, error) {
	p := plot.New()
	p.BackgroundColor = t.paper
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = c.title, c.x, c.y
	c.dress(p, t)
	grid := plotter.NewGrid()
	grid.Vertical.Color, grid.Horizontal.Color = t.grid, t.grid
	low, high := c.heights()
	for _, b := range c.bands {
		area, err := plotter.NewPolygon(plotter.XYs{{X: b.from, Y: low}, {X: b.to, Y: low}, {X: b.to, Y: high}, {X: b.from, Y: high}})
		if err != nil {
			return nil, fmt.Errorf("draw %s: %w", c.name, err)
		}
		area.Color, area.LineStyle.Width = t.band, 0
		p.Add(area)
	}
	p.Add(grid)
	for _, dashed := range []bool{false, true} { // a dashed line leaves something to see of one under it
		for _, l := range c.lines {
			if l.dashed != dashed {
				continue
			}
			if err := l.draw(p, t, c.logY); err != nil {
				return nil, fmt.Errorf("draw %s: %w", c.name, err)
			}
		}
	}
	p.Y.Min, p.Y.Max = low, high
	if !c.logX {
		p.X.Min = 0
	}
	if len(c.places()) == 0 {
		p.X.Min, p.X.Max = 1, 10 // a measurement too short to have a course
	}
	canvas := vgimg.NewWith(vgimg.UseWH(chartWidth, chartHeight), vgimg.UseDPI(chartDPI), vgimg.UseBackgroundColor(t.paper))
	c.layOut(p, t, draw.New(canvas))
	var file bytes.Buffer
	if err := (&png.Encoder{CompressionLevel: png.BestCompression}).Encode(&file, canvas.Image()); err != nil {
		return nil, fmt.Errorf("write %s: %w", c.name, err)
	}
	return file.Bytes(), nil
}

// dress sets fonts, colours and scales.
func (c chart) dress(p *plot.Plot, t theme) {
	sans := func(size vg.Length) font.Font { return font.Font{Typeface: "Liberation", Variant: "Sans", Size: size} }
	p.Title.TextStyle.Font, p.Title.TextStyle.Color, p.Title.Padding = sans(11), t.ink, 6
	p.Legend.TextStyle.Font, p.Legend.TextStyle.Color = sans(9), t.ink
	for _, axis := range []*plot.Axis{&p.X, &p.Y} {
		axis.Label.TextStyle.Font, axis.Label.TextStyle.Color, axis.Label.Padding = sans(9.5), t.ink, 4
		axis.Tick.Label.Font, axis.Tick.Label.Color = sans(8.5), t.faint
		axis.Color, axis.Tick.Color, axis.Padding = t.faint, t.faint, 0
		axis.Tick.Marker = ticks{}
	}
	if c.logX {
		p.X.Scale, p.X.Tick.Marker = plot.LogScale{}, ticks{at: c.places()}
	}
	if c.logY {
		p.Y.Scale, p.Y.Tick.Marker = plot.LogScale{}, ticks{log: true}
	}
}

// layOut puts the legend below the plot, where it hides no curve.
func (c chart) layOut(p *plot.Plot, t theme, whole draw.Canvas) {
	const columns, rowHeight = 2, vg.Length(13)
	entries := c.legend(t)
	rows := (len(entries) + columns - 1) / columns
	height := vg.Length(rows)*rowHeight + 8
	bottom := height
	if c.logX {
		// On a logarithmic axis the library keeps room for the name where its mean value is, and that at the right.
		name := p.X.Label.TextStyle
		name.XAlign, name.YAlign = draw.XCenter, draw.YCenter
		whole.FillText(name, vg.Point{X: (whole.Min.X+whole.Max.X)/2 + 20, Y: whole.Min.Y + height + 5}, p.X.Label.Text)
		p.X.Label.Text = ""
		bottom += rowHeight
	}
	p.Draw(draw.Crop(whole, 4, -12, bottom, -4))
	style := p.Legend.TextStyle
	style.YAlign = draw.YCenter
	width := (whole.Max.X - whole.Min.X - 50) / columns
	for i, e := range entries {
		left := whole.Min.X + 50 + vg.Length(i%columns)*width
		middle := whole.Min.Y + height - 6 - (vg.Length(i/columns)+0.5)*rowHeight
		e.mark(whole, left, middle)
		whole.FillText(style, vg.Point{X: left + 28, Y: middle}, e.label)
	}
}

// entry is a line of the legend. mark draws 22 points from left on.
type entry struct {
	label string
	mark  func(canvas draw.Canvas, left, middle vg.Length)
}

func (c chart) legend(t theme) []entry {
	var entries []entry
	for _, l := range c.lines {
		style, glyph := l.styles(t)
		entries = append(entries, entry{l.label, func(canvas draw.Canvas, left, middle vg.Length) {
			canvas.StrokeLine2(style, left, middle, left+22, middle)
			if l.marked() {
				canvas.DrawGlyph(glyph, vg.Point{X: left + 11, Y: middle})
			}
		}})
	}
	if slices.ContainsFunc(c.lines, line.doubtful) {
		glyph := draw.GlyphStyle{Color: t.ink, Radius: glyphRadius, Shape: hollow{t.paper}}
		entries = append(entries, entry{"hollow: see the note (†) in the report", func(canvas draw.Canvas, left, middle vg.Length) {
			canvas.DrawGlyph(glyph, vg.Point{X: left + 11, Y: middle})
		}})
	}
	for _, b := range c.bands {
		entries = append(entries, entry{b.label, func(canvas draw.Canvas, left, middle vg.Length) {
			canvas.FillPolygon(t.band, []vg.Point{{X: left, Y: middle - 4}, {X: left + 22, Y: middle - 4}, {X: left + 22, Y: middle + 4}, {X: left, Y: middle + 4}})
		}})
	}
	return entries
}

// marked tells whether the points of the line are measured points, and few enough to be shown.
func (l line) marked() bool { return l.colour != colourIdeal && len(l.points) <= 10 }

func (l line) doubtful() bool {
	return l.marked() && slices.ContainsFunc(l.points, func(p xy) bool { return p.noted })
}

const glyphRadius = vg.Length(2.6)

// hollow is the shape of a point with a note: a ring with the paper in it.
type hollow struct{ paper color.Color }

// DrawGlyph implements draw.GlyphDrawer.
func (h hollow) DrawGlyph(canvas *draw.Canvas, style draw.GlyphStyle, at vg.Point) {
	style.Radius, style.Shape = glyphRadius+0.6, draw.CircleGlyph{}
	canvas.DrawGlyph(style, at)
	style.Radius, style.Color = glyphRadius-0.8, h.paper
	canvas.DrawGlyph(style, at)
}

func (l line) styles(t theme) (draw.LineStyle, draw.GlyphStyle) {
	style := draw.LineStyle{Color: t.colours[l.colour], Width: vg.Points(1.8)}
	if l.dashed {
		style.Dashes, style.Width = []vg.Length{5, 3}, vg.Points(1.3)
	}
	return style, draw.GlyphStyle{Color: t.colours[l.colour], Radius: glyphRadius, Shape: draw.CircleGlyph{}}
}

// draw adds the line to the plot. Where there is no number there is a gap.
func (l line) draw(p *plot.Plot, t theme, logY bool) error {
	style, glyph := l.styles(t)
	for _, run := range l.pieces(logY) {
		curve, points, err := plotter.NewLinePoints(run)
		if err != nil {
			return err
		}
		curve.LineStyle = style
		points.GlyphStyleFunc = func(i int) draw.GlyphStyle {
			glyph := glyph
			if run[i].noted {
				glyph.Shape = hollow{t.paper}
			}
			return glyph
		}
		p.Add(curve)
		if l.marked() {
			p.Add(points)
		}
	}
	return l.drawRanges(p, style)
}

// pieces are the parts of the line that have numbers; on a logarithmic axis zero is none.
func (l line) pieces(logY bool) []several {
	var pieces []several
	whole := false
	for _, point := range l.points {
		if math.IsNaN(point.y) || logY && point.y <= 0 {
			whole = false
			continue
		}
		if !whole {
			pieces = append(pieces, nil)
		}
		whole = true
		last := len(pieces) - 1
		pieces[last] = append(pieces[last], point)
	}
	return pieces
}

// several are points as the library wants them, with how far the runs of each were apart.
type several []xy

func (s several) Len() int                         { return len(s) }
func (s several) XY(i int) (x, y float64)          { return s[i].x, s[i].y }
func (s several) YError(i int) (low, high float64) { return s[i].low - s[i].y, s[i].high - s[i].y }

func (l line) drawRanges(p *plot.Plot, style draw.LineStyle) error {
	var some several
	for _, point := range l.points {
		if point.high > point.low && !math.IsNaN(point.y) {
			some = append(some, point)
		}
	}
	if len(some) == 0 {
		return nil
	}
	bars, err := plotter.NewYErrorBars(some)
	if err != nil {
		return err
	}
	style.Dashes, style.Width = nil, vg.Points(1)
	bars.LineStyle = style
	p.Add(bars)
	return nil
}

// heights are the ends of the y axis: from zero, or from the power of ten below the least on a logarithmic one.
func (c chart) heights() (low, high float64) {
	low, high = math.Inf(1), 0
	for _, l := range c.lines {
		for _, p := range l.points {
			high = max(high, p.y, p.high)
			if p.y > 0 {
				low = min(low, p.y)
			}
		}
	}
	switch {
	case high == 0:
		return 0.1, 1
	case c.logY:
		return math.Pow(10, math.Floor(math.Log10(low))), math.Pow(10, math.Ceil(math.Log10(high)))
	default:
		return 0, 1.05 * high
	}
}

// places are where the points of all lines stand on the x axis.
func (c chart) places() []float64 {
	var places []float64
	for _, l := range c.lines {
		for _, p := range l.points {
			places = append(places, p.x)
		}
	}
	return places
}

// ticks are marks that a reader would have chosen: round numbers, powers of ten with their first multiples, or, where
// points stand, their own numbers.
type ticks struct {
	log bool
	at  []float64
}

// Ticks implements plot.Ticker.
func (k ticks) Ticks(low, high float64) []plot.Tick {
	var marks []plot.Tick
	switch {
	case k.at != nil:
		places := slices.Compact(slices.Sorted(slices.Values(k.at)))
		for i, x := range places {
			label := count(x)
			if i+1 < len(places) && places[i+1] < 1.6*x {
				label = "" // it would run into the next one
			}
			marks = append(marks, plot.Tick{Value: x, Label: label})
		}
	case k.log:
		for power := math.Pow(10, math.Floor(math.Log10(low))); power <= high*1.001; power *= 10 {
			marks = append(marks, plot.Tick{Value: power, Label: count(power)})
		}
	default:
		step := roundStep((high - low) / 6)
		for i := math.Ceil(low / step); i*step <= high*1.0001; i++ {
			marks = append(marks, plot.Tick{Value: i * step, Label: count(i * step)})
		}
	}
	return marks
}

// roundStep is the least of 1, 2, 2.5 and 5 times a power of ten that is not less than about x.
func roundStep(x float64) float64 {
	if x <= 0 || math.IsInf(x, 0) || math.IsNaN(x) {
		return 1
	}
	power := math.Pow(10, math.Floor(math.Log10(x)))
	for _, factor := range []float64{1, 2, 2.5, 5} {
		if factor*power >= 0.85*x {
			return factor * power
		}
	}
	return 10 * power
}

// count writes a number with a comma before every three digits.
func count(x float64) string {
	text := strconv.FormatFloat(math.Round(x*1e6)/1e6, 'f', -1, 64)
	whole, rest, _ := strings.Cut(text, ".")
	for i := len(whole) - 3; i > 0; i -= 3 {
		whole = whole[:i] + "," + whole[i:]
	}
	if rest != "" {
		return whole + "." + rest
	}
	return whole
}

// curve is a number of a mode and a variant, over another number that its points have in common.
func (r partResult) curve(mode, variant string, x, y func(*row) *float64) []xy {
	var points []xy
	for _, m := range of(r.medians, mode, variant) {
		at := *x(&m)
		var group []row
		for _, one := range of(r.rows, mode, variant) {
			if *x(&one) == at {
				group = append(group, one)
			}
		}
		middle, low, high := spread(group, y)
		if math.IsNaN(middle) {
			continue
		}
		points = append(points, xy{x: at, y: middle, low: low, high: high, noted: m.note != ""})
	}
	slices.SortFunc(points, func(a, b xy) int { return cmp.Compare(a.x, b.x) })
	return points
}

// course is a number over time, in the first run.
func (r partResult) course(want func(instant) bool, y func(*instant) *float64) []xy {
	var points []xy
	for _, i := range r.series {
		if i.run == 1 && want(i) {
			points = append(points, xy{x: i.t, y: *y(&i)})
		}
	}
	return points
}

// courses are the courses of all modes.
func (r partResult) courses(y func(*instant) *float64) []line {
	var lines []line
	for _, mode := range []struct{ name, label string }{{modeSync, "sync"}, {modeAsync, "async"}, {modeSyncLimit, "sync with a limit"}} {
		lines = append(lines, line{label: mode.label, colour: mode.name, points: r.course(func(i instant) bool { return i.mode == mode.name }, y)})
	}
	return lines
}
