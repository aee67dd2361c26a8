package intake

import (
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
)

func postgresUnderTest() storeUnderTest {
	dsns := map[store]string{}
	openAt := func(t *testing.T, dsn string) store {
		s := openPostgres(t, dsn)
		dsns[s] = dsn
		return s
	}
	return storeUnderTest{
		name: "postgres", shared: true,
		open: func(t *testing.T) store { return openAt(t, services.Postgres(t)) },
		reopen: func(t *testing.T, s store) store {
			require.NoError(t, s.close())
			return openAt(t, dsns[s])
		},
	}
}

// openPostgres opens a store; who calls it closes it.
func openPostgres(t testing.TB, dsn string) *postgresStore {
	t.Helper()
	s, err := openPostgresStore(t.Context(), dsn, slog.New(slog.DiscardHandler))
	require.NoError(t, err)
	return s
}
