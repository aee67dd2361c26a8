package intake

import (
	"bufio"
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/stretchr/testify/require"
)

// takenLine is what a stream of lines was taken for.
type takenLine struct {
	number int
	text   string
	err    error
}

// takeLines takes all lines of a stream that comes in pieces of its reader's
// choice. A line that needs room gets none if it begins with "#".
func takeLines(stream io.Reader, limit int) []takenLine {
	in := bufio.NewReaderSize(stream, 16) // the smallest
	l := lines{in: in, limit: limit, begin: func() {}, skip: func() {}}
	refuse := false
	l.begin = func() {
		first, err := in.Peek(1)
		refuse = err == nil && first[0] == '#'
	}
	l.grow = func() error {
		if refuse {
			return errNoRoom
		}
		return nil
	}
	var all []takenLine
	for {
		text, err := l.next()
		all = append(all, takenLine{l.number, string(text), err})
		if err != nil && !errors.Is(err, errLineTooLong) && !errors.Is(err, errNoRoom) {
			return all
		}
	}
}

func TestLines(t *testing.T) {
	long := strings.Repeat("x", 40)
	broken := errors.New("broken")
	for name, c := range map[string]struct {
		stream io.Reader
		want   []takenLine
	}{
		"nothing":                    {strings.NewReader(""), []takenLine{{1, "", io.EOF}}},
		"ends of all kinds":          {strings.NewReader("a\nb\r\nc\r\r\nd"), []takenLine{{1, "a", nil}, {2, "b", nil}, {3, "c\r", nil}, {4, "d", nil}, {5, "", io.EOF}}},
		"blank lines":                {strings.NewReader("\n \t\r\na\n\n"), []takenLine{{3, "a", nil}, {5, "", io.EOF}}},
		"a mark at the start":        {strings.NewReader("\uFEFFa\n\uFEFFb\n"), []takenLine{{1, "a", nil}, {2, "\uFEFFb", nil}, {3, "", io.EOF}}},
		"as long as may be":          {strings.NewReader("\uFEFF" + long + "\r\n" + long + "\n"), []takenLine{{1, long, nil}, {2, long, nil}, {3, "", io.EOF}}},
		"longer":                     {strings.NewReader(long + "x\n" + long + long + "\r\na"), []takenLine{{1, "", errLineTooLong}, {2, "", errLineTooLong}, {3, "a", nil}, {4, "", io.EOF}}},
		"longer, and the last":       {strings.NewReader(long + long), []takenLine{{1, "", errLineTooLong}, {2, "", io.EOF}}},
		"no room":                    {strings.NewReader("#" + long[1:] + "\na\n"), []takenLine{{1, "", errNoRoom}, {2, "a", nil}, {3, "", io.EOF}}},
		"broken off in a line":       {io.MultiReader(strings.NewReader("a\nb"), iotest.ErrReader(broken)), []takenLine{{1, "a", nil}, {2, "", broken}}},
		"broken off in a long one":   {io.MultiReader(strings.NewReader("a\n"+long), iotest.ErrReader(broken)), []takenLine{{1, "a", nil}, {2, "", broken}}},
		"broken off in a longer one": {io.MultiReader(strings.NewReader(long+long), iotest.ErrReader(broken)), []takenLine{{1, "", broken}}},
	} {
		t.Run(name, func(t *testing.T) {
			require.Equal(t, c.want, takeLines(c.stream, len(long)))
		})
	}
}

// FuzzLines holds the lines of a stream against those of the whole text in
// memory, however the stream is cut into pieces.
func FuzzLines(f *testing.F) {
	for _, seed := range []string{"", "a", "a\n", "a\r\nb", "\n\n\r\n \t\n", "\uFEFF{}\n\uFEFF{}", "\r", "a\rb\n",
		strings.Repeat("x", 100) + "\n{}", strings.Repeat("x", 31) + "\r\n" + strings.Repeat("x", 32) + "\r\n" + strings.Repeat("x", 33), "\xff\xfe\n\x00\n"} {
		for _, limit := range []uint8{1, 15, 32, 200} {
			f.Add([]byte(seed), limit)
		}
	}
	f.Fuzz(func(t *testing.T, stream []byte, limit uint8) {
		most := max(1, int(limit))
		var want []takenLine
		number := 0
		for part := range bytes.Lines(stream) {
			number++
			line := bytes.TrimSuffix(bytes.TrimSuffix(part, []byte("\n")), []byte("\r"))
			if number == 1 {
				line = bytes.TrimPrefix(line, []byte("\uFEFF"))
			}
			switch {
			case len(line) > most:
				want = append(want, takenLine{number, "", errLineTooLong})
			case len(bytes.Trim(line, " \t\r")) == 0:
			default:
				want = append(want, takenLine{number, string(line), nil})
			}
		}
		want = append(want, takenLine{number + 1, "", io.EOF})
		stream = bytes.ReplaceAll(stream, []byte("#"), []byte("*")) // which takeLines knows
		for i := range want {
			want[i].text = strings.ReplaceAll(want[i].text, "#", "*")
		}
		require.Equal(t, want, takeLines(bytes.NewReader(stream), most))
		require.Equal(t, want, takeLines(iotest.OneByteReader(bytes.NewReader(stream)), most))
	})
}
