// Package e2e tests the built binary from outside, over HTTP, as its users see
// it. It shares no code with the gateway, not even response types: what it
// expects is written down here, by hand, from the contract.
package e2e
