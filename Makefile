# vhostblk: everything a developer does, each with its own set-up.
#
#   make demo        serve a fresh disk to a small Linux guest and check what it wrote
#   make test        all tests, real QEMU guests included (make test ARGS="-k session -x"; JOBS=2: two at a time)
#   make test-sandbox  the tests that start daemons, with all of these in a sandbox that ends them if they do what it forbids
#   make test-quick  without guests, sanitizers and fuzzers
#   make lint        ruff, ruff format, mypy --strict, clang-format
#   make format      ruff format, ruff --fix, clang-format -i
#   make sanitize    the engine's C tests under AddressSanitizer, UBSan and ThreadSanitizer
#   make verify      every byte verified while extents come and go, for VERIFY_SECONDS (default 300), and a busy
#                    export moved between threads a thousand times, daemons that end HUNT times as often as usual,
#                    a guest that moves ten times, and all tests of guests with packed rings, with 1 and with 4 queues
#   make soak        guests, hostile connections, kills, resizes, memory that comes and goes, all at once, for
#                    SOAK_SECONDS (default 3600); ends with a table of figures
#   make hunt        other random requests and schedules, HUNT (default 20) times as many as usual
#   make fuzz        the fuzzers, of damaged images too, FUZZ_SECONDS each (default 60)
#   make bench       speed against qemu-storage-daemon and fio, with ratios (QUICK=1: shorter; tests/bench/README.md)
#   make bench-scaling  queues, threads, sizes of requests, depths, idle guests
#   make bench-python   a disk made of Python, against nbdkit's Python plugin
#   make qtest       QEMU's own vhost-user-blk tests against the storage daemon
#   make iotests     QEMU's own tests of the block layer with vhostblk's tools (make iotests ARGS="--format qcow2 001"; docs/iotests.md)
#   make build       the virtual environment in .venv, and the engine
#   make clean       remove what was built (not .venv)

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
JOBS ?=
FUZZ_SECONDS ?= 60
VERIFY_SECONDS ?= 300
SOAK_SECONDS ?= 3600
HUNT ?= 20
QUICK ?=

python := $(VENV)/bin/python
packed := -global vhost-user-blk-pci.packed=on
stamps := build/stamps
native := $(wildcard vhostblk/native/src/*.[ch]) vhostblk/native/engine.h vhostblk/native/build.py \
	vhostblk/native/load.h $(wildcard vhostblk/native/load_src/*.[ch])
c_files := $(wildcard vhostblk/native/*.h vhostblk/native/src/*.[ch] vhostblk/native/load_src/*.[ch] tests/native/*.[ch] tests/fuzz/*.c tests/qemu/*.c)

.PHONY: all setup build test test-sandbox test-quick lint format demo fuzz hunt verify soak sanitize qtest iotests bench bench-scaling bench-python clean
.DEFAULT_GOAL := all
all: build

setup: $(stamps)/system-test $(stamps)/venv
build: $(stamps)/engine

# System packages: the demonstration needs fewer than the tests do.
$(stamps)/system-%: contrib/setup-debian.sh
	@mkdir -p $(@D)
	contrib/setup-debian.sh $*
	@touch $@

# Without isolation: the build's own requirements are in the environment, and rebuilding is quick.
$(stamps)/venv: pyproject.toml setup.py | $(stamps)/system-build
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed")'
	[ -x $(python) ] || $(PYTHON) -m venv $(VENV)
	$(python) -m pip install -q 'setuptools>=77' 'cffi>=1.15' wheel
	PYTHONWARNINGS=ignore $(python) -m pip install -q --no-build-isolation -e '.[test,lint,plot]'
	@touch $@

$(stamps)/engine: $(native) setup.py $(stamps)/venv
	VHOSTBLK_WERROR=1 $(python) setup.py -q build_ext --inplace --force >/dev/null
	@touch $@

test: $(stamps)/system-test build
	$(python) -m pytest $(if $(JOBS),-n $(JOBS) --dist worksteal) $(ARGS)

test-sandbox: $(stamps)/system-test build
	VHOSTBLK_SANDBOX=kill $(python) -m pytest tests/contract tests/integration tests/qemu $(if $(JOBS),-n $(JOBS) --dist worksteal) $(ARGS)

test-quick: build
	$(python) -m pytest tests/unit tests/contract $(ARGS)

lint: build
	$(python) -m ruff check
	$(python) -m ruff format --check
	$(python) -m mypy
	clang-format --dry-run -Werror $(c_files)

format: build
	$(python) -m ruff check -q --fix
	$(python) -m ruff format
	clang-format -i $(c_files)

demo: $(stamps)/system-demo build
	@$(python) -m vhostblk.testing.demo $(ARGS)

sanitize: $(stamps)/system-test build
	$(python) -m pytest tests/native $(ARGS)

fuzz: $(stamps)/system-test build
	VHOSTBLK_FUZZ_SECONDS=$(FUZZ_SECONDS) $(python) -m pytest -o timeout=0 tests/fuzz \
		tests/integration/test_qcow2_faults.py::test_damaged_images_give_errors_and_nothing_else $(ARGS)

verify: $(stamps)/system-test build
	VHOSTBLK_LONG=$(VERIFY_SECONDS) $(python) -m pytest tests/integration/test_verified_run.py \
		tests/integration/test_moves_between_threads.py -s $(ARGS)
	VHOSTBLK_HUNT=$(HUNT) $(python) -m pytest tests/integration/test_restart_under_load.py tests/qemu/test_restarts.py -s $(ARGS)
	VHOSTBLK_HUNT=5 $(python) -m pytest tests/qemu/test_migration.py -s $(ARGS)
	VHOSTBLK_GUEST="$(packed)" $(python) -m pytest tests/qemu $(ARGS)
	VHOSTBLK_GUEST="$(packed)" VHOSTBLK_CPUS=4 $(python) -m pytest tests/qemu $(ARGS)

soak: $(stamps)/system-test build
	@$(python) -m tests.soak --seconds $(SOAK_SECONDS) $(ARGS)

hunt: $(stamps)/system-test build
	VHOSTBLK_HUNT=$(HUNT) $(python) -m pytest tests/unit tests/contract/test_node_contract.py -o timeout=0 $(ARGS)

qtest: $(stamps)/system-test build
	tests/qtest/run $(VENV)/bin/vhostblk-storage-daemon

iotests: $(stamps)/system-test build
	$(python) -m tests.iotests $(ARGS)

bench: $(stamps)/system-test build
	@$(python) -m tests.bench $(if $(QUICK),--quick) $(ARGS)

bench-scaling: $(stamps)/system-test build
	@$(python) -m tests.bench --scaling $(if $(QUICK),--quick) $(ARGS)

bench-python: $(stamps)/system-test build
	@$(python) -m tests.bench --python $(if $(QUICK),--quick) $(ARGS)

clean:
	rm -rf build dist *.egg-info vhostblk/native/*.so vhostblk/native/_engine.c vhostblk/native/_load.c
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find vhostblk tests -name __pycache__ -type d -prune -exec rm -rf {} +
