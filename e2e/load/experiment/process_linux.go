package experiment

import (
	"os/exec"
	"syscall"
)

// dieWithUs has the kernel kill the process when this one is gone without having ended it, as after kill -9. Strictly it is
// when the thread that started it is gone, but Go ends a thread only with a goroutine that is locked to it, and there is none.
func dieWithUs(cmd *exec.Cmd) { cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL} }
