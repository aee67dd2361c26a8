package intake

import (
	"strings"
	"testing"
	"time"

	"github.com/dunglas/httpsfv"
	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"
)

func TestParsePrefer(t *testing.T) {
	wait := func(d time.Duration) prefer { return prefer{wait: d, hasWait: true} }
	tests := []struct {
		name   string
		values []string
		want   prefer
	}{
		{"no header", nil, prefer{}},
		{"an empty header", []string{""}, prefer{}},
		{"wait", []string{"wait=10"}, wait(10 * time.Second)},
		{"wait for nothing", []string{"wait=0"}, wait(0)},
		{"leading zeros", []string{"wait=007"}, wait(7 * time.Second)},
		{"respond-async", []string{"respond-async"}, prefer{respondAsync: true}},
		{"both", []string{"respond-async, wait=10"}, prefer{wait: 10 * time.Second, hasWait: true, respondAsync: true}},
		{"both in two lines", []string{"wait=10", "respond-async"}, prefer{wait: 10 * time.Second, hasWait: true, respondAsync: true}},
		{"among others", []string{`return=minimal; foo="some, wait=1", handling=lenient, wait=10`}, wait(10 * time.Second)},
		{"white space", []string{" \twait \t= \t10 \t;\tx , \trespond-async\t"}, prefer{wait: 10 * time.Second, hasWait: true, respondAsync: true}},
		{"empty elements", []string{",, ,wait=10,,"}, wait(10 * time.Second)},
		{"names in any case", []string{"Wait=10, RESPOND-ASYNC"}, prefer{wait: 10 * time.Second, hasWait: true, respondAsync: true}},
		{"a quoted value", []string{`wait="10"`}, wait(10 * time.Second)},
		{"a quoted value with escapes", []string{`wait="\1\0"`}, wait(10 * time.Second)},
		{"parameters", []string{`wait=10; a; b="x;,\"wait=1"; c=1, respond-async; d`}, prefer{wait: 10 * time.Second, hasWait: true, respondAsync: true}},
		{"an empty value is none", []string{`respond-async="", wait=""`}, prefer{respondAsync: true}},
		{"the first one counts", []string{"wait=10, wait=20", "wait=30"}, wait(10 * time.Second)},
		{"the first one counts even if it is bad", []string{"wait=soon, wait=20"}, prefer{}},
		{"the same for respond-async", []string{"respond-async=no, respond-async"}, prefer{}},
		{"a value too large", []string{"wait=2147483649"}, wait(1 << 31 * time.Second)},
		{"a value beyond all bounds", []string{"wait=" + strings.Repeat("9", 1000)}, wait(1 << 31 * time.Second)},

		{"no value", []string{"wait"}, prefer{}},
		{"a word", []string{"wait=soon"}, prefer{}},
		{"a negative number", []string{"wait=-1"}, prefer{}},
		{"a signed number", []string{"wait=+1"}, prefer{}},
		{"a fraction", []string{"wait=1.5"}, prefer{}},
		{"a unit", []string{"wait=10s"}, prefer{}},
		{"a space in a number", []string{"wait=1 0"}, prefer{}},
		{"other digits", []string{"wait=١٠"}, prefer{}},
		{"a second equals sign", []string{"wait=1=2"}, prefer{}},
		{"another name", []string{"waiting=10, x-wait=10, wait-=10"}, prefer{}},
		{"a quoted name", []string{`"wait"=10`}, prefer{}},
		{"a parameter of another one", []string{"foo; wait=10; respond-async"}, prefer{}},
		{"a value for respond-async", []string{"respond-async=no"}, prefer{}},
		{"an open quote", []string{`wait="10`, "respond-async"}, prefer{respondAsync: true}},
		{"an open quote before", []string{`foo="bar, wait=10`}, prefer{}},
		{"a quote within", []string{`wait=1"0"`}, prefer{}},
		{"a quote within quotes", []string{`wait="1"0"`}, prefer{}},
		{"an open escape", []string{`wait="10\`}, prefer{}},
		{"an escaped last quote", []string{`wait="10\"`}, prefer{}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			require.Equal(t, test.want, parsePrefer(test.values))
		})
	}
}

// What stands in front of or behind a preference does not change it.
func TestParsePreferPropertyPreferencesAreIndependent(t *testing.T) {
	other := rapid.StringMatching(`[a-z]{2,3}([ \t]?=[ \t]?([a-z0-9]{1,3}|"([a-z ,;=]|\\["\\a])*"))?([ \t]?;[ \t]?[a-z]{1,4}(="[wait=1,;]*")?)*`)
	rapid.Check(t, func(t *rapid.T) {
		list := rapid.SliceOfN(other, 0, 4).Draw(t, "others")
		at := rapid.IntRange(0, len(list)).Draw(t, "at")
		list = append(list[:at:at], append([]string{"wait=10"}, list[at:]...)...)
		split := rapid.IntRange(0, len(list)).Draw(t, "split")
		values := []string{strings.Join(list[:split], ", "), strings.Join(list[split:], ",")}
		require.Equal(t, prefer{wait: 10 * time.Second, hasWait: true}, parsePrefer(values), values)
	})
}

func FuzzPrefer(f *testing.F) {
	f.Add("respond-async, wait=10", "")
	f.Add(`foo="a,b\"c"; bar, wait="5"`, "wait=1")
	f.Add("wait=99999999999999999999", "respond-async")
	f.Add(`wait="10`, `",respond-async`)
	f.Fuzz(func(t *testing.T, one, two string) {
		p := parsePrefer([]string{one, two})
		require.GreaterOrEqual(t, p.wait, time.Duration(0))
		require.LessOrEqual(t, p.wait, 1<<31*time.Second)
		require.Zero(t, p.wait%time.Second)
		if !p.hasWait {
			require.Zero(t, p.wait)
		}

		// An empty line is nothing, and a first preference is not overruled.
		require.Equal(t, p, parsePrefer([]string{"", one, " ,", two}))
		first := parsePrefer([]string{"wait=3, respond-async", one, two})
		require.Equal(t, prefer{wait: 3 * time.Second, hasWait: true, respondAsync: true}, first)
		// Two lines are one list (RFC 9110, section 5.3), as long as no quote is open.
		if !strings.Contains(one, `"`) {
			require.Equal(t, p, parsePrefer([]string{one + "," + two}))
		}
		// Without a wait of its own the header cannot hide a later one.
		if lower := strings.ToLower(one + two); !strings.Contains(lower, "wait") {
			require.Equal(t, 7*time.Second, parsePrefer([]string{one, two, "wait=7"}).wait)
		}
	})
}

func TestParseIdempotencyKey(t *testing.T) {
	long := strings.Repeat("k", maxIdempotencyKey)
	for _, test := range []struct{ value, want string }{
		{`"8e03978e-40d5-43dd-bc93-6894a57f9324"`, "8e03978e-40d5-43dd-bc93-6894a57f9324"},
		{`8e03978e-40d5-43dd-bc93-6894a57f9324`, "8e03978e-40d5-43dd-bc93-6894a57f9324"},
		{" \t\"k\" ", "k"},
		{" k\t", "k"},
		{`"a b, c; d=\"e\" \\"`, `a b, c; d="e" \`},
		{`"k"; a; b=1`, "k"},
		{`a:/?#[]@!$&'()*+;=~\{}|`, `a:/?#[]@!$&'()*+;=~\{}|`},
		{`:a2V5:`, ":a2V5:"},
		{"12", "12"},
		{"?1", "?1"},
		{long, long},
		{`"` + long + `"`, long},
		{`"` + strings.Repeat(`\"`, maxIdempotencyKey) + `"`, strings.Repeat(`"`, maxIdempotencyKey)},
	} {
		key, err := parseIdempotencyKey([]string{test.value})
		require.NoError(t, err, test.value)
		require.Equal(t, test.want, key)
	}

	key, err := parseIdempotencyKey(nil)
	require.NoError(t, err)
	require.Empty(t, key)
}

func TestParseIdempotencyKeyRefuses(t *testing.T) {
	const quoted, bare = "must be one string in quotes", "must be a string in quotes, or visible ASCII"
	long := strings.Repeat("k", maxIdempotencyKey+1)
	for _, test := range []struct {
		values []string
		want   string
	}{
		{[]string{""}, "must not be empty"},
		{[]string{" \t"}, "must not be empty"},
		{[]string{`""`}, "must not be empty"},
		{[]string{"a", "b"}, "there are 2 of it, there may be one"},
		{[]string{"a", "a"}, "there are 2 of it, there may be one"},
		{[]string{"", ""}, "there are 2 of it, there may be one"},
		{[]string{long}, "must have at most 255 characters, has 256"},
		{[]string{`"` + long + `"`}, "must have at most 255 characters, has 256"},
		{[]string{`"a`}, quoted},
		{[]string{`"a\`}, quoted},
		{[]string{`"a\b"`}, quoted},
		{[]string{`"a", "b"`}, quoted},
		{[]string{`"a" b`}, quoted},
		{[]string{`"a";`}, quoted},
		{[]string{`"ü"`}, quoted},
		{[]string{"\"a\tb\""}, quoted},
		{[]string{`"`}, quoted},
		{[]string{"a,b"}, bare},
		{[]string{"a b"}, bare},
		{[]string{`a"b"`}, bare},
		{[]string{"ü"}, bare},
		{[]string{"a\x7f"}, bare},
		{[]string{"a\xff"}, bare},
		{[]string{"a\x00"}, bare},
	} {
		key, err := parseIdempotencyKey(test.values)
		require.ErrorContains(t, err, test.want, "%q", test.values)
		require.Empty(t, key)
	}
}

func FuzzIdempotencyKey(f *testing.F) {
	for _, seed := range []string{"", "k", `"k"`, `"a \"b\" \\"; p=1`, `"a", "b"`, "\"\u00fc\"", `:YQ==:`, "%\"x\""} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, value string) {
		key, err := parseIdempotencyKey([]string{value})
		if err != nil {
			require.Empty(t, key)
			return
		}
		require.NotEmpty(t, key)
		require.LessOrEqual(t, len(key), maxIdempotencyKey)
		for _, c := range []byte(key) {
			require.True(t, c >= ' ' && c <= '~', "%q", key)
		}
		// Every key can be sent in quotes, and is the same key then.
		quoted, err := httpsfv.Marshal(httpsfv.NewItem(key))
		require.NoError(t, err)
		again, err := parseIdempotencyKey([]string{quoted})
		require.NoError(t, err)
		require.Equal(t, key, again)
	})
}

func BenchmarkParsePrefer(b *testing.B) {
	values := []string{"respond-async, wait=10"}
	b.ReportAllocs()
	for b.Loop() {
		parsePrefer(values)
	}
}
