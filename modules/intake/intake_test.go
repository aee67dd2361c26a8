package intake

import (
	"fmt"
	"os"
	"testing"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) {
	if task := os.Getenv(generatorVariable); task != "" {
		if err := generate(task); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	// database/sql ends this goroutine without waiting for it.
	goleak.VerifyTestMain(m, goleak.IgnoreTopFunction("database/sql.(*DB).connectionOpener"))
}
