# `make` alone prints the targets. Needs Go, nothing else; the race detector
# needs a C compiler as well and is left out where there is none, and the tests
# that need RabbitMQ or PostgreSQL are skipped where neither can be had.

.DEFAULT_GOAL := help

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo devel)
FUZZTIME ?= 30s
RACE     ?= $(if $(filter 1,$(shell go env CGO_ENABLED)),-race)

# Static and reproducible: no C library, no paths of the machine that built it.
GOBUILD := CGO_ENABLED=0 go build -trimpath -ldflags '-s -w -X main.version=$(VERSION)'

PLATFORMS := linux-amd64 linux-arm64 darwin-amd64 darwin-arm64 windows-amd64 windows-arm64

# The linter is built from tools/go.mod, which pins it. Go is part of the name:
# a linter built with one release cannot read the packages of the next.
LINT := bin/golangci-lint-$(shell go env GOVERSION)

.PHONY: help
help: ## Print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: run
run: build ## Gateway and stand-in backend in one process; Ctrl-C stops them
	@# Not `go run`, which exits 1 after Ctrl-C and has make complain about it.
	@bin/sluice dev

.PHONY: dev
dev: run ## The same as run

.PHONY: build
build: ## Build bin/sluice
	$(GOBUILD) -o bin/sluice .

.PHONY: services
services: ## Find or start the RabbitMQ and the PostgreSQL of the tests
	docker/services.sh

.PHONY: test
test: ## Run all tests with the race detector, and first start the services that they need
	@# Without them, tests are skipped and say so; in CI that would pass for a success.
	docker/services.sh || test -z "$$CI"
	go test $(RACE) -timeout 15m $$(go list ./... | grep -v '/e2e')
	@# The end-to-end tests start real processes: they get the machine to themselves, and are never
	@# cached, since the cache does not see what the binary that they build is made of.
	go test $(RACE) -count=1 -timeout 45m -p 1 -parallel 6 ./e2e/...

.PHONY: lint
lint: $(LINT) ## Run the linters
	$(LINT) run

.PHONY: fmt
fmt: $(LINT) ## Format the code
	$(LINT) fmt

.PHONY: bench
bench: ## Run the benchmarks, and last (two minutes) those of what others do with the same work
	go test -run '^$$' -bench . -benchmem ./...
	@# A module of its own: what it is built of is no dependency of Sluice.
	go -C e2e/rivals test -run '^$$' -bench . -benchtime 1x

.PHONY: fuzz
fuzz: ## Run each fuzz target for FUZZTIME (30s)
	@set -e; for file in $$(grep -rlE '^func Fuzz' --include '*_test.go' .); do \
		for target in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$$file"); do \
			echo "$$target in $$(dirname "$$file")"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 100x "$$(dirname "$$file")"; \
		done; \
	done

.PHONY: cross
cross: $(PLATFORMS:%=cross-%) ## Build bin/sluice-OS-ARCH for every platform

.PHONY: $(PLATFORMS:%=cross-%)
$(PLATFORMS:%=cross-%): cross-%:
	GOOS=$(word 1,$(subst -, ,$*)) GOARCH=$(word 2,$(subst -, ,$*)) $(GOBUILD) -o bin/sluice-$*$(if $(filter windows-%,$*),.exe) .

.PHONY: clean
clean: ## Remove what was built
	rm -rf bin coverage.out

$(LINT): tools/go.mod tools/go.sum
	go -C tools build -o ../$@ github.com/golangci/golangci-lint/v2/cmd/golangci-lint
