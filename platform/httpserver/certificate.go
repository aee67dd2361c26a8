package httpserver

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
)

// certificate is what clients are shown: a certificate and its key, read again
// when one of the files has changed, so that a renewed one needs no restart.
// Connections keep the one that they began with.
type certificate struct {
	certFile, keyFile string
	logger            *slog.Logger

	mu   sync.Mutex
	pair *tls.Certificate
	seen [2]os.FileInfo // of the files when they were read last
}

func openCertificate(certFile, keyFile string, logger *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, logger: logger}
	files, err := c.stat()
	if err == nil {
		err = c.read(files)
	}
	if err != nil {
		return nil, fmt.Errorf("load http.tls_cert and http.tls_key: %w", err)
	}
	return c, nil
}

// get is for tls.Config.GetCertificate. It looks at the files in each handshake,
// which costs two system calls where the handshake costs a signature. What
// cannot be used (half of a renewal, an unreadable file) is told once, and the
// old certificate stays.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	files, err := c.stat()
	switch {
	case err == nil && sameFile(files[0], c.seen[0]) && sameFile(files[1], c.seen[1]):
		return c.pair, nil
	case err != nil && c.seen == [2]os.FileInfo{}:
		return c.pair, nil // still missing
	case err == nil:
		err = c.read(files)
	}
	if err != nil {
		c.seen = files
		c.logger.Warn("the new certificate cannot be used; the old one stays", "error", err)
		return c.pair, nil
	}
	c.logger.Info("certificate replaced", "file", c.certFile, "valid_until", c.pair.Leaf.NotAfter)
	return c.pair, nil
}

// stat returns what the files look like, nothing if one is missing.
func (c *certificate) stat() (files [2]os.FileInfo, err error) {
	for i, file := range []string{c.certFile, c.keyFile} {
		if files[i], err = os.Stat(file); err != nil {
			return [2]os.FileInfo{}, err
		}
	}
	return files, nil
}

// read loads the pair. files is what they looked like before: should they
// change meanwhile, the next look sees it.
func (c *certificate) read(files [2]os.FileInfo) error {
	pair, err := tls.LoadX509KeyPair(c.certFile, c.keyFile)
	if err != nil {
		return err
	}
	c.pair, c.seen = &pair, files
	return nil
}

func sameFile(a, b os.FileInfo) bool {
	return a != nil && b != nil && os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}
