//go:build !unix

package dispatch

// canGoDirect says whether isOpen knows.
const canGoDirect = false

func (c *connection) isOpen() bool { return false }
