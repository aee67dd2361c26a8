package intake

import (
	"bytes"
	"regexp"
	"strings"
	"testing"

	"github.com/google/uuid"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

const cursorAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"

func TestCursorPropertyRoundTrip(t *testing.T) {
	plain := regexp.MustCompile(`^[A-Za-z0-9_-]+$`) // needs no escape in a URL
	rapid.Check(t, func(t *rapid.T) {
		id := uuid.UUID(rapid.SliceOfN(rapid.Byte(), 16, 16).Draw(t, "id"))
		cursor := encodeCursor(id)
		require.Regexp(t, plain, cursor)
		got, err := decodeCursor(cursor)
		require.NoError(t, err)
		require.Equal(t, id, got)
	})
}

// Clients keep cursors: those of an older Sluice must stay readable, or be
// refused because their version is another one.
func TestCursorIsTheSameInEveryVersion(t *testing.T) {
	id := uuid.MustParse("01938a5c-7c00-7abc-8def-0123456789ab")
	require.Equal(t, "AQGTilx8AHq8je8BI0Vnias1VLLY", encodeCursor(id))
}

func TestCursorRefuses(t *testing.T) {
	id := uuid.MustParse("01938a5c-7c00-7abc-8def-0123456789ab")
	cursor := encodeCursor(id)
	for _, bad := range []string{
		"", " ", "1", id.String(), cursor + "=", cursor + "A", cursor[1:], cursor + cursor, " " + cursor, "\n" + cursor,
		cursor[:27] + "\n", cursor[:26] + "\r\n", strings.Repeat("A", len(cursor)), strings.Repeat("\n", len(cursor)),
		strings.Repeat("ü", len(cursor)/2), cursor[:27] + "+", cursor[:27] + "%",
	} {
		got, err := decodeCursor(bad)
		require.ErrorIs(t, err, errCursor, "%q", bad)
		require.Equal(t, uuid.Nil, got)
	}
}

func TestCursorRefusesEveryChangedCharacter(t *testing.T) {
	cursor := []byte(encodeCursor(uuid.MustParse("01938a5c-7c00-7abc-8def-0123456789ab")))
	for i := range cursor {
		for _, c := range []byte(cursorAlphabet) {
			changed := bytes.Clone(cursor)
			changed[i] = c
			if bytes.Equal(changed, cursor) {
				continue
			}
			_, err := decodeCursor(string(changed))
			require.ErrorIs(t, err, errCursor, "%s", changed)
		}
	}
}

func TestCursorRefusesOtherVersions(t *testing.T) {
	id := uuid.MustParse("01938a5c-7c00-7abc-8def-0123456789ab")
	for version := range 256 {
		_, err := decodeCursor(sealCursor(byte(version), id))
		if version == cursorVersion {
			require.NoError(t, err)
			continue
		}
		require.ErrorIs(t, err, errCursor, "version %d", version)
	}
}

func FuzzCursor(f *testing.F) {
	f.Add("", []byte("0123456789abcdef"))
	f.Add(encodeCursor(uuid.MustParse("01938a5c-7c00-7abc-8def-0123456789ab")), []byte{})
	f.Add(strings.Repeat("A", 28), bytes.Repeat([]byte{0xff}, 16))
	f.Fuzz(func(t *testing.T, s string, raw []byte) {
		if id, err := decodeCursor(s); err == nil {
			require.Equal(t, s, encodeCursor(id), "a cursor has one spelling")
		}
		var id uuid.UUID
		copy(id[:], raw)
		got, err := decodeCursor(encodeCursor(id))
		require.NoError(t, err)
		require.Equal(t, id, got)
	})
}
