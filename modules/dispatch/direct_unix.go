//go:build unix

package dispatch

import "syscall"

// canGoDirect says whether isOpen knows.
const canGoDirect = true

// isOpen reports whether the other side has neither closed the idle connection
// nor said anything on it, which it was not asked to.
func (c *connection) isOpen() bool {
	var one [1]byte
	var err error
	readErr := c.raw.Read(func(descriptor uintptr) bool {
		_, err = syscall.Read(int(descriptor), one[:])
		return true // and do not wait
	})
	return readErr == nil && err == syscall.EAGAIN
}
