# virt-usb. 'make run' shows the main job. 'make test' runs all tests that a change must pass.
SHELL := /bin/bash
.DEFAULT_GOAL := help

CARGO := cargo
# Each target below is a step. 'tests/step' runs it and reports its result.
STEP := tests/step
# The builds and the nested host take longest, so other steps run at a lower priority.
BESIDE := $(STEP) --beside

.PHONY: help deps test-deps bench-deps build filter run test check steps-test steps-check \
	tests lint corpus suite story walks conformance embedding nova portal tempest monitoring \
	live live-nested live-nested-1 live-nested-2 packages docs bench deny fuzz soak \
	install install-hook install-agent deb clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

deps: ## install the packages for building (apt)
	@$(STEP) $@ "install the packages for building" install/deps
test-deps: deps ## also install the packages for the tests (apt)
	@$(STEP) $@ "install the packages for the tests" install/deps test
bench-deps: ## also install the packages for the figures (apt)
	@install/deps bench

build: deps ## build the programs in target/release
	@$(STEP) $@ "build the programs (some minutes the first time)" install/build

filter: deps ## build the scheduler's filter, as a component and as a core module
	@filter-wasm/build

run: build ## show the main job, with this machine's devices or a recorded host's
	@tests/story/run

# --- Tests. 'make test' and 'make check' run several of these steps at a time. Each can run alone.

test: ## run all tests that a change must pass (some 25 minutes the first time)
	@$(STEP) --all steps-test
check: ## run the inner loop: formatting, lints, unit, property and process tests
	@$(STEP) --all steps-check

steps-test: live-nested-1 live-nested-2 tests suite lint packages tempest nova conformance portal \
	embedding monitoring live story walks
steps-check: tests suite lint walks

# In 'make test', steps that need cargo's lock run one after the other, and downloads run during the
# build.
ifdef STEPS_BEGAN
lint: tests
# 'tests' has run as a separate step.
BUILT := --built
# apt must not run twice at a time.
deb: test-deps
live-nested-1 live-nested-2: fetch-live
packages tempest nova conformance portal embedding: %: fetch-%
endif

fetch-%: test-deps
	@$(BESIDE) $@ "fetch the packages of '$*' from registries" tests/$*/run fetch

tests: test-deps build ## build the tests
	@$(STEP) $@ "build the tests" tests/suite/run build

suite: test-deps build tests corpus ## run the unit, property and process tests
	@$(STEP) --memory --behind $@ "run the unit, property and process tests" tests/suite/run $(BUILT)

lint: test-deps ## check formatting, language, lints, and links of the documentation
	@$(BESIDE) $@ "check formatting, lints and links" tests/lint

corpus: test-deps ## fetch the domain files of libvirt's own tests
	@$(BESIDE) $@ "fetch the domain files of libvirt's own tests" tests/corpus/fetch

story: test-deps build ## run 'make run' as a test
	@$(BESIDE) $@ "run the story of 'make run'" tests/story/run

walks: test-deps build ## run the examples of README.md and of the walks in docs/
	@$(BESIDE) $@ "run the examples of the documentation" tests/docs/run

conformance: test-deps build ## compare the API with its description (schemathesis from PyPI)
	@$(BESIDE) $@ "compare the API with its description" tests/conformance/run

embedding: test-deps build ## use the filter from Python and JavaScript (wasmtime from PyPI, jco from npm)
	@$(BESIDE) $@ "use the filter from Python and JavaScript" tests/embedding/run

nova: test-deps build ## use the filter in OpenStack Nova (nova from PyPI)
	@$(STEP) --memory --beside $@ "use the filter in OpenStack Nova" tests/nova/run

tempest: test-deps build ## use the API with Keystone, Tempest and the openstack command (from PyPI)
	@$(BESIDE) $@ "use the API with Keystone, Tempest and the openstack command" tests/tempest/run

portal: test-deps build ## use the portal in Chromium (playwright-core and axe-core from npm)
	@$(BESIDE) $@ "use the portal in Chromium" tests/portal/run

monitoring: test-deps build ## test the alert rules with Prometheus, and the rotation of the log
	@$(BESIDE) $@ "raise each alert in Prometheus" tests/monitoring/run

live: test-deps build ## start guests with libvirtd on this machine (root)
	@$(BESIDE) $@ "start guests with libvirtd on this machine" tests/live/run machine

live-nested: test-deps deb ## test a compute host in a VM, with USB devices (root)
	@$(STEP) $@ "pass USB devices to guests on a compute host in a VM" tests/live/run nested
live-nested-1 live-nested-2: live-nested-%: test-deps deb
	@$(STEP) $@ "pass USB devices to guests on a compute host in a VM, part $* of 2" \
		tests/live/run nested --part $*/2

packages: test-deps deb ## install the Debian package in clean Debians (root)
	@$(BESIDE) $@ "install the package in clean Debians" tests/packages/run

docs: build ## build the book for users in target/book (installs mdBook)
	@$(STEP) $@ "build the book" docs/build

bench: bench-deps build embedding ## measure the figures of BENCHMARKS.md
	@$(CARGO) build --release -p virt-usb-bench
	@target/release/virt-usb-bench
	@tests/nova/run bench
	@tests/live/run nested --case figures

deny: ## check licences, bans, sources and advisories of dependencies (installs cargo-deny)
	@tests/deny

fuzz: ## run each fuzz target for ten minutes (installs cargo-fuzz)
	@tests/fuzz/run 600

soak: test-deps build deb corpus deny ## run for hours: random lives, chaos, Debian 13, coverage, mutants
	@echo "== long property tests"
	@PROPTEST_CASES=20000 tests/suite/run --timeout 7200
	@echo "== 20 times as many faults of the etcd cluster"
	@FLEET_ROUNDS=20 FLEET_SEED=100 tests/suite/run --timeout 7200 fleet
	@echo "== 100 times as many attacks on programs that run as root"
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

install: ## install the built files below DESTDIR, for packages
	@install/place command hook config agent

deb: build ## build the Debian package in target/deb
	@$(STEP) $@ "make the Debian package" sh -c "install/deps deb && install/deb"

install-hook: build ## install the hook for libvirt (root)
	@install/hook

install-agent: build ## install the agent and its systemd unit, and start nothing (root)
	@install/agent

clean:
	@$(CARGO) clean
