package intake

import (
	"encoding/base64"
	"encoding/binary"
	"errors"
	"hash/crc32"

	"github.com/google/uuid"
)

// A cursor is 21 bytes: the version, the id, and a checksum of both. That makes
// 28 characters of URL-safe base64 without padding or spare bits, so that each
// cursor has one spelling only. The checksum tells a cursor from a mistake; it
// is no secret, and need not be one: a forged cursor shows nothing that a
// client could not list anyway.
const (
	cursorVersion = 1
	cursorSize    = 1 + len(uuid.UUID{}) + crc32.Size
)

var (
	cursorEncoding = base64.RawURLEncoding.Strict()
	cursorTable    = crc32.MakeTable(crc32.Castagnoli)

	errCursor = errors.New("not a cursor that was given out here")
)

// encodeCursor returns the text by which a client asks for the orders after
// the one with this id.
func encodeCursor(id uuid.UUID) string { return sealCursor(cursorVersion, id) }

func sealCursor(version byte, id uuid.UUID) string {
	raw := make([]byte, 0, cursorSize)
	raw = append(raw, version)
	raw = append(raw, id[:]...)
	raw = binary.BigEndian.AppendUint32(raw, crc32.Checksum(raw, cursorTable))
	return cursorEncoding.EncodeToString(raw)
}

// decodeCursor returns the id in a cursor, or errCursor when encodeCursor did
// not make it.
func decodeCursor(s string) (uuid.UUID, error) {
	if len(s) != cursorEncoding.EncodedLen(cursorSize) {
		return uuid.Nil, errCursor
	}
	raw, err := cursorEncoding.DecodeString(s)
	// The decoder passes over line breaks: then the bytes are too few.
	if err != nil || len(raw) != cursorSize || raw[0] != cursorVersion {
		return uuid.Nil, errCursor
	}
	body, sum := raw[:cursorSize-crc32.Size], raw[cursorSize-crc32.Size:]
	if binary.BigEndian.Uint32(sum) != crc32.Checksum(body, cursorTable) {
		return uuid.Nil, errCursor
	}
	return uuid.UUID(body[1:]), nil
}
