package intake

import (
	"bufio"
	"bytes"
	"errors"
	"io"
)

// lineBuffer is how much of a stream of lines is read at once. Every batch
// takes so much; a line that does not fit takes room.
const lineBuffer = 32 << 10

var (
	errLineTooLong = errors.New("the line is too long")
	errNoRoom      = errors.New("there is no room for the line")
)

// byteOrderMark is what some programs put before a text in UTF-8. It is no part
// of the first line.
var byteOrderMark = []byte("\uFEFF")

// lines takes a stream apart into lines. It holds one line at most, and none of
// what is longer than limit.
type lines struct {
	in    *bufio.Reader
	limit int
	// begin is called before each line, grow once in a line, blank or not, that
	// does not fit into the buffer, skip now and then in a line that is thrown away.
	begin, skip func()
	grow        func() error

	number int  // of the line that next has returned or failed at, from 1
	kept   bool // that line is in no buffer, and stays valid
}

// next returns the next line that is not blank, without its end (LF or CRLF); it
// is valid until the following call, unless kept says that it stays so. The last line needs no end. After
// errLineTooLong and errNoRoom, which are about line number only, next can be
// called again. io.EOF says that there are no more lines; with any other error
// the stream broke off in line number, of which nothing is returned.
func (l *lines) next() ([]byte, error) {
	for {
		l.begin()
		l.number++
		line, err := l.read()
		if err != nil {
			return nil, err
		}
		line = bytes.TrimSuffix(line, []byte{'\r'})
		if l.number == 1 {
			line = bytes.TrimPrefix(line, byteOrderMark)
		}
		switch {
		case len(line) > l.limit:
			return nil, errLineTooLong
		case len(bytes.TrimLeft(line, " \t\r")) == 0:
		default:
			return line, nil
		}
	}
}

// read returns a line without its LF.
func (l *lines) read() ([]byte, error) {
	part, err := l.in.ReadSlice('\n')
	if l.kept = errors.Is(err, bufio.ErrBufferFull); !l.kept {
		return ended(part, err)
	}
	// The mark and a CR may come on top of the limit: next takes them away.
	most := l.limit + len(byteOrderMark) + len("\r")
	if len(part) > most {
		return nil, l.discard(errLineTooLong)
	}
	if err := l.grow(); err != nil {
		return nil, l.discard(err)
	}
	var line []byte
	for errors.Is(err, bufio.ErrBufferFull) {
		line = append(line, part...)
		if len(line) > most {
			return nil, l.discard(errLineTooLong)
		}
		part, err = l.in.ReadSlice('\n')
	}
	return ended(append(line, part...), err)
}

// discard reads to the end of the line and returns the reason.
func (l *lines) discard(reason error) error {
	for {
		l.skip()
		part, err := l.in.ReadSlice('\n')
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		if _, err = ended(part, err); err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		return reason
	}
}

// ended returns the line that part is, without its LF.
func ended(part []byte, err error) ([]byte, error) {
	switch {
	case err == nil:
		return part[:len(part)-1], nil
	case errors.Is(err, io.EOF) && len(part) > 0:
		return part, nil
	default:
		return nil, err
	}
}
