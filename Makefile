# virt-usb. The two that matter: 'make run' shows the main job, 'make test' is what every change must pass.
SHELL := /bin/bash
.DEFAULT_GOAL := help

CARGO := cargo
# Each target below is a step: 'tests/step' runs it, and reports it where 'make test' runs many.
STEP := tests/step
# The builds and the nested host take longest: other steps run at a lower priority.
BESIDE := $(STEP) --beside

.PHONY: help deps test-deps bench-deps build filter run test check steps-test steps-check tests lint corpus suite story \
	walks conformance embedding nova portal tempest monitoring \
	live live-nested live-nested-1 live-nested-2 packages docs bench deny fuzz soak install install-hook install-agent deb clean

help: ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

deps: ## install what building needs (apt)
	@$(STEP) $@ "install what building needs" install/deps
test-deps: deps ## install what the tests need as well (apt)
	@$(STEP) $@ "install what the tests need" install/deps test
bench-deps: ## install what the figures need as well (apt)
	@install/deps bench

build: deps ## the programs, in target/release
	@$(STEP) $@ "build the programs (some minutes the first time)" install/build

filter: deps ## the scheduler's filter, as a component and as a core module
	@filter-wasm/build

run: build ## the main job as a story, on this machine's devices or a recorded host's
	@tests/story/run

# --- Tests. 'make test' and 'make check' run these steps several at a time; each can be made alone.

test: ## everything that a change must pass (some 25 minutes the first time)
	@$(STEP) --all steps-test
check: ## the inner loop: formatting, lints, unit, property and process tests
	@$(STEP) --all steps-check

steps-test: live-nested-1 live-nested-2 tests suite lint packages tempest nova conformance portal embedding monitoring live story walks
steps-check: tests suite lint walks

# Below 'make test', steps that need cargo's lock run one after the other, and downloads run during the build.
ifdef STEPS_BEGAN
lint: tests
# 'tests' was a step of its own.
BUILT := --built
# apt is not run twice at a time.
deb: test-deps
live-nested-1 live-nested-2: fetch-live
packages tempest nova conformance portal embedding: %: fetch-%
endif

fetch-%: test-deps
	@$(BESIDE) $@ "fetch what '$*' takes from package registries" tests/$*/run fetch

tests: test-deps build ## build the tests
	@$(STEP) $@ "build the tests" tests/suite/run build

suite: test-deps build tests corpus ## unit, property and process tests
	@$(STEP) --memory --behind $@ "run the unit, property and process tests" tests/suite/run $(BUILT)

lint: test-deps ## formatting, lints, links of the documentation
	@$(BESIDE) $@ "check formatting, lints and links" tests/lint

corpus: test-deps ## fetch the domain files of libvirt's own tests
	@$(BESIDE) $@ "fetch the domain files of libvirt's own tests" tests/corpus/fetch

story: test-deps build ## 'make run' as a test
	@$(BESIDE) $@ "run the story of 'make run'" tests/story/run

walks: test-deps build ## the examples of README.md and of the walks in docs/
	@$(BESIDE) $@ "run the examples of the documentation" tests/docs/run

conformance: test-deps build ## the API against its own description (brings schemathesis from PyPI)
	@$(BESIDE) $@ "compare the API with its description" tests/conformance/run

embedding: test-deps build ## the filter in Python and JavaScript (brings wasmtime from PyPI and jco from npm)
	@$(BESIDE) $@ "use the filter from Python and JavaScript" tests/embedding/run

nova: test-deps build ## the filter in Nova's own scheduler (brings nova from PyPI)
	@$(STEP) --memory --beside $@ "use the filter in OpenStack Nova" tests/nova/run

tempest: test-deps build ## the API under a real Keystone, by Tempest and the openstack command (brings them from PyPI)
	@$(BESIDE) $@ "use the API with Keystone, Tempest and the openstack command" tests/tempest/run

portal: test-deps build ## users of the portal in a real Chromium (brings playwright-core and axe-core from npm)
	@$(BESIDE) $@ "use the portal in Chromium" tests/portal/run

monitoring: test-deps build ## the alert rules in a real Prometheus, the rotation of the log
	@$(BESIDE) $@ "raise each alert in a real Prometheus" tests/monitoring/run

live: test-deps build ## real libvirtd and real guests on this machine (root)
	@$(BESIDE) $@ "start guests with libvirtd on this machine" tests/live/run machine

live-nested: test-deps deb ## a compute host in a VM, with real USB devices (root)
	@$(STEP) $@ "pass USB devices to guests on a compute host in a VM" tests/live/run nested
live-nested-1 live-nested-2: live-nested-%: test-deps deb
	@$(STEP) $@ "pass USB devices to guests on a compute host in a VM, part $* of 2" tests/live/run nested --part $*/2

packages: test-deps deb ## the Debian package in clean Debians (root)
	@$(BESIDE) $@ "install the package in clean Debians" tests/packages/run

docs: build ## the book for users, in target/book (installs mdBook)
	@$(STEP) $@ "build the book" docs/build

bench: bench-deps build embedding ## the figures of BENCHMARKS.md
	@$(CARGO) build --release -p virt-usb-bench
	@target/release/virt-usb-bench
	@tests/nova/run bench
	@tests/live/run nested --case figures

deny: ## licences, bans, sources and advisories of the dependencies (installs cargo-deny)
	@tests/deny

fuzz: ## ten minutes of each fuzz target (installs cargo-fuzz)
	@tests/fuzz/run 600

soak: test-deps build deb corpus deny ## hours: more random runs, an hour of chaos, Debian 13's compute host, coverage, mutants
	@echo "== long property tests"
	@PROPTEST_CASES=20000 tests/suite/run --timeout 7200
	@echo "== etcd's cluster under 20 times so many faults"
	@FLEET_ROUNDS=20 FLEET_SEED=100 tests/suite/run --timeout 7200 fleet
	@echo "== root's tools under attack, 100 times as often"
	@VIRT_USB_ROUNDS=100 tests/suite/run --timeout 7200 planted
	@echo "== 200 kills in the VM"
	@tests/live/run nested --case crash.random_moments --kills 200 --cpus 2
	@tests/soak/chaos
	@echo "== the nested compute host with Debian 13"
	@tests/soak/debian13
	@echo "== coverage"
	@tests/soak/coverage
	@echo "== mutants"
	@tests/soak/mutants

install: ## what was built to where it belongs, below DESTDIR; a package is made of it
	@install/place command hook config agent

deb: build ## a Debian package, in target/deb
	@$(STEP) $@ "make the Debian package" sh -c "install/deps deb && install/deb"

install-hook: build ## put the hook where libvirt calls it (root)
	@install/hook

install-agent: build ## put the agent and its systemd unit in place (root); starts nothing
	@install/agent

clean:
	@$(CARGO) clean
