//go:build unix

package httpserver

import "syscall"

// fileLimit returns how many files and connections the process may have open, 0
// if that is not known. Go has raised it to all that the process is allowed.
func fileLimit() int {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0
	}
	return int(min(uint64(limit.Cur), 1<<30)) // it is signed on some systems
}
