# virt-usb. The two that matter: 'make run' shows the main job, 'make test' is what every change must pass.
SHELL := /bin/bash
.DEFAULT_GOAL := help

CARGO := cargo
# The hook starts twice as fast when nothing has to be linked at run time. Only its last step is told so: the same
# flag for everything would break proc-macros and libusb.
STATIC_HOOK := $(CARGO) rustc --release -p virt-usb-hook --bin virt-usb-hook -- -C target-feature=+crt-static -C lto=fat -C codegen-units=1

.PHONY: help deps test-deps bench-deps build filter run test lint suite corpus conformance embedding nova portal tempest foreign live live-nested packages bench fuzz soak install install-hook install-agent deb clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

deps: ## install what building needs (apt)
	@install/deps
test-deps: ## install what the tests need as well (apt)
	@install/deps test
bench-deps: ## install what the figures need as well (apt)
	@install/deps bench

build: deps ## the programs, in target/release
	@echo "== building (the first time takes some minutes)"
	@$(CARGO) build --release --workspace --bins
	@$(STATIC_HOOK)
	@filter-wasm/build
	@target/release/virt-usb manual target/manual --date "$$(date -u -d "$$(sed -n '/^ -- /{s/.*>  //p;q}' debian/changelog)" +%F)"

filter: deps ## the scheduler's filter, as a component and as a core module
	@filter-wasm/build

run: build ## the main job as a story, on this machine's devices or a recorded host's
	@tests/story/run

test: test-deps lint build corpus suite foreign live live-nested packages ## everything that a change must pass

lint:
	@echo "== formatting and lints"
	@$(CARGO) fmt --all --check
	@$(CARGO) clippy --workspace --all-targets --features virt-usb-filter/component,virt-usb-filter/module -- -D warnings

corpus: test-deps
	@tests/corpus/fetch

suite: build
	@echo "== tests"
	@$(CARGO) test --workspace --no-fail-fast
	@tests/story/run > target/story.txt && echo "== the story of 'make run' was told: target/story.txt"

conformance: test-deps build ## the API against its own description (brings schemathesis from PyPI)
	@echo "== the API against its description"
	@tests/conformance/run

embedding: build ## the filter in Python and JavaScript (brings wasmtime from PyPI and jco from npm)
	@echo "== the filter in other languages"
	@tests/embedding/run

nova: test-deps build ## the filter in Nova's own scheduler (brings nova from PyPI)
	@echo "== the filter in OpenStack Nova"
	@tests/nova/run

tempest: test-deps build ## the API under a real Keystone, by Tempest and the openstack command (brings them from PyPI)
	@echo "== the API under Keystone"
	@tests/tempest/run

# Each of them waits much: two at once.
foreign: test-deps build
	@$(MAKE) --no-print-directory -j2 -o build -o test-deps tempest nova conformance portal embedding

portal: test-deps build ## users of the portal in a real Chromium (brings playwright-core and axe-core from npm)
	@echo "== the portal in Chromium"
	@tests/portal/run

live: build ## real libvirtd and real guests on this machine (root)
	@echo "== libvirtd and guests on this machine"
	@tests/live/run machine

live-nested: test-deps deb ## a compute host in a VM, with real USB devices (root; a quarter of an hour)
	@echo "== a compute host in a VM, with real USB devices (a quarter of an hour; a line a case)"
	@tests/live/run nested

packages: test-deps deb ## the Debian package in clean Debians 12 and 13 (root)
	@echo "== the package in clean Debians"
	@tests/packages/run

bench: bench-deps build embedding ## the figures of BENCHMARKS.md
	@target/release/virt-usb-bench
	@tests/nova/run bench
	@tests/live/run nested --case figures

fuzz: ## ten minutes of each fuzz target (installs cargo-fuzz)
	@tests/fuzz/run 600

soak: test-deps build corpus ## what takes longer than a change may: many more random runs
	@echo "== long property tests"
	@PROPTEST_CASES=20000 $(CARGO) test --release --workspace
	@echo "== etcd's cluster under 20 times so many faults"
	@FLEET_ROUNDS=20 FLEET_SEED=100 $(CARGO) test -p virt-usb-suite --test fleet whatever_befalls -- --nocapture
	@echo "== 200 kills in the VM"
	@tests/live/run nested --case crash.random_moments --kills 200

install: ## what was built to where it belongs, below DESTDIR; a package is made of it
	@install/place command hook config agent

deb: build ## a Debian package, in target/deb
	@install/deps deb
	@install/deb

install-hook: build ## put the hook where libvirt calls it (root)
	@install/hook

install-agent: build ## put the agent and its systemd unit in place (root); starts nothing
	@install/agent

clean:
	@$(CARGO) clean
