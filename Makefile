# What there is to do here. Each target installs what it lacks (tests/lib/deps.sh) and says what it
# does. Everything made goes below $XDG_CACHE_HOME/lazarette, outside the clone; all targets
# share one cargo profile and one target directory, so RocksDB compiles once.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:

export XDG_CACHE_HOME ?= $(HOME)/.cache
export CARGO_TARGET_DIR ?= $(XDG_CACHE_HOME)/lazarette/target
export PATH := $(PATH):$(HOME)/.cargo/bin:/usr/local/go/bin:/usr/sbin:/sbin

.PHONY: help demo test bench lint deny fmt

help: ## this list
	@sed -nE 's/^([a-z]+):.*## (.*)/make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

demo: ## build, make a real image, start it lazily from a registry on loopback (root)
	@tests/lib/deps.sh build images
	@tests/demo.sh

test: ## every test; those that need root say so when they cannot run
	@tests/lib/deps.sh build images test
	@tests/run.sh

bench: ## cold starts beside containerd and stargz-snapshotter (root); ARGS=--quick for one round
	@tests/lib/deps.sh build images bench
	@benches/run.sh $(ARGS)

lint: ## formatting, clippy, docs, licences, shell scripts, fences
	@tests/lib/deps.sh build lint
	@tests/lint.sh

deny: ## install cargo-deny (some minutes) and check licences, bans and advisories
	@tests/lib/deps.sh build
	command -v cargo-deny >/dev/null || cargo install --locked cargo-deny
	cargo deny check

fmt: ## format the Rust code
	cargo fmt --all
