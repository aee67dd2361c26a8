//go:build unix

package load

import (
	"syscall"
	"time"
)

// cpuTime returns how much CPU time this process has used, 0 if the system does not tell.
func cpuTime() time.Duration {
	var usage syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &usage); err != nil {
		return 0
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
