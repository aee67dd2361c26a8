//go:build unix

package services_test

import (
	"database/sql"
	"testing"

	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
)

func TestAnOwnPostgreSQLKeepsItsDataOverStopAndKill(t *testing.T) {
	p := services.OwnPostgreSQL(t)
	db, err := sql.Open("pgx", p.DSN)
	require.NoError(t, err)
	defer db.Close() //nolint:errcheck // nothing is lost with it
	_, err = db.ExecContext(t.Context(), `CREATE TABLE kept (id int)`)
	require.NoError(t, err)
	for _, end := range []func(){p.Stop, p.Kill} {
		end()
		require.Error(t, db.PingContext(t.Context()))
		p.Start()
		_, err = db.ExecContext(t.Context(), `INSERT INTO kept VALUES (1)`)
		require.NoError(t, err)
	}
}
