# `make` alone lists the targets.

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.stamp

PACKAGES := python3 python3-venv python3-dev gcc make libc6-dev linux-libc-dev qemu-system-x86 busybox-static \
	kmod cpio xz-utils pciutils libudev1 libelf1 \
	acpica-tools dmsetup iproute2 mount strace fio nvme-cli
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)
# Tests have a long form if they read KVMPASS_SOAK, or what the modules beside them made of it.
SOAKING = $(shell grep -rlwE --include='test_*.py' 'KVMPASS_SOAK|SOAK' tests)
SOURCES := kvmpass cffi_build tests scripts setup.py

.DEFAULT_GOAL := help
.PHONY: help deps venv demo bench qemu test test-full soak mutants lint format build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

deps: ## install the Debian packages that everything else needs
	@missing=$$(for package in $(PACKAGES); do \
		dpkg-query -W -f '$${db:Status-Status}' $$package 2>/dev/null | grep -qx installed || echo $$package; \
	done); \
	if [ -n "$$missing" ]; then \
		echo "installing:" $$missing; \
		$(SUDO) apt-get update -q=2 && \
		$(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -q=2 -y --no-install-recommends $$missing \
			> /dev/null; \
	fi

# Emulated hosts see these files read-only: without byte code each start there would compile them again.
venv: $(STAMP) ## make .venv, with kvmpass in it as it lies here
	@$(BIN)/python -m compileall -q kvmpass

$(STAMP): pyproject.toml setup.py $(wildcard cffi_build/*.py cffi_build/*.c cffi_build/*.cdef cffi_build/*.h cffi_build/agent/*)
	@echo "building $(VENV)"
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	@$(BIN)/pip install --quiet --disable-pip-version-check --compile -e '.[dev]'
	@touch $@

# `deps` always comes before the environment, without making it stale.
$(STAMP): | deps

demo: venv ## assign an NVMe drive to a virtual machine, inside an emulated AMD-Vi host
	@$(BIN)/python scripts/demo.py

bench: venv ## kvmpass beside QEMU's vfio-pci and C, nine rounds in emulated hosts: docs/bench.json and pictures
	@$(BIN)/python scripts/bench/run.py $(ARGS)

qemu: venv ## fetch the modern QEMU, which some tests ask for
	@$(BIN)/kvmpass lab qemu

# Offline the rest still runs: that QEMU's tests are skipped then, each with the reason.
test: venv ## every test, in one report
	@$(BIN)/kvmpass lab qemu || echo "going on without the modern QEMU: the tests that ask for it are skipped"
	@env -u PYTHONDONTWRITEBYTECODE $(BIN)/pytest $(ARGS)

test-full: venv ## every test on all kernels and under both QEMU lines
	@$(BIN)/kvmpass lab kernel
	@$(BIN)/kvmpass lab kernel --next
	@$(BIN)/kvmpass lab qemu
	@failed=; for lane in stock/system stock/modern full/system full/modern next/modern; do \
		echo "=== kernel $${lane%/*}, QEMU $${lane#*/}"; \
		$(BIN)/pytest --lab-kernel=$${lane%/*} --lab-qemu=$${lane#*/} $(ARGS) || failed="$$failed $$lane"; \
	done; \
	if [ -n "$$failed" ]; then echo "failed on:$$failed"; exit 1; fi

soak: venv ## the long forms of the tests that have one: about an hour
	@$(BIN)/kvmpass lab qemu || echo "going on without the modern QEMU: the tests that ask for it are skipped"
	@KVMPASS_SOAK=1 $(BIN)/pytest -v --durations=20 $(SOAKING) $(ARGS)

mutants: venv ## put small faults into a copy of the tree: do the unit tests notice? 20 minutes
	@nice $(BIN)/python scripts/mutants.py $(ARGS)

lint: venv ## ruff and mypy
	@$(BIN)/ruff check $(SOURCES)
	@$(BIN)/ruff format --check $(SOURCES)
	@$(BIN)/mypy
	@$(BIN)/mypy scripts/demo.py
	@MYPYPATH=scripts/bench:tests $(BIN)/mypy scripts/bench/run.py scripts/bench/accesses.py

format: venv ## let ruff format the code
	@$(BIN)/ruff check --fix $(SOURCES)
	@$(BIN)/ruff format $(SOURCES)

build: venv ## the source archive and an abi3 wheel, in dist/
	@rm -rf build dist
	@$(BIN)/python -m build > build.log 2>&1 || { cat build.log; exit 1; }
	@rm -rf build build.log
	@ls dist
	@ls dist/*-cp311-abi3-*.whl > /dev/null
	@for file in man/man1/kvmpass.1 doc/kvmpass/README.md doc/kvmpass/docs/quickstart.md; do \
		$(BIN)/python -m zipfile -l dist/*.whl | grep "/data/share/$$file" > /dev/null || { echo "no $$file"; exit 1; }; \
	done

clean: ## remove everything that was made here
	rm -rf $(VENV) build dist build.log .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	rm -f kvmpass/_native.c kvmpass/*.so kvmpass/files/confine kvmpass/files/*.so kvmpass/initramfs/agent
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
