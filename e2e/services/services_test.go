package services_test

import (
	"database/sql"
	"testing"

	"github.com/stretchr/testify/require"

	"sluice/e2e/services"
)

func TestEachTestHasADatabaseOfItsOwn(t *testing.T) {
	first, second := services.Postgres(t), services.Postgres(t)
	require.NotEqual(t, first, second)
	for _, dsn := range []string{first, second} {
		db, err := sql.Open("pgx", dsn)
		require.NoError(t, err)
		_, err = db.ExecContext(t.Context(), `CREATE TABLE mine (id int)`)
		require.NoError(t, err)
		require.NoError(t, db.Close())
	}
}

func TestEachTestHasAPrefixOfItsOwn(t *testing.T) {
	address, first := services.AMQP(t)
	_, second := services.AMQP(t)
	require.NotEmpty(t, address)
	require.NotEqual(t, first, second)
}
