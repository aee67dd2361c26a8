package config

import (
	"fmt"
	"strings"
)

// suggest returns ", did you mean …?" with the candidate that is most like
// name, or "" if none is.
func suggest(name string, candidates []string) string {
	best, distance := "", len(name)/3+1
	for _, candidate := range candidates {
		// The right word in the wrong section is a near miss, too.
		if strings.HasSuffix(candidate, "."+name[strings.LastIndex(name, ".")+1:]) && distance > 1 {
			best, distance = candidate, 1
		}
		if d := editDistance(name, candidate); d < distance {
			best, distance = candidate, d
		}
	}
	if best == "" {
		return ""
	}
	return fmt.Sprintf(", did you mean %s?", best)
}

// editDistance is the number of characters to insert, remove or replace to make
// b of a (Levenshtein).
func editDistance(a, b string) int {
	// row[j] is the distance between what was read of a and the first j of b.
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, diagonal+1)
		}
	}
	return row[len(b)]
}
