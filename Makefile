# Two commands are enough: `make train`, `make test`. Also: venv, build, bench, study, lint, clean; on
# a machine with a GPU: gpu, gpu-sanitize.
#
#   PYTHON=python3.12          the interpreter (3.10 or newer)
#   TORCH='torch==2.13.0 --index-url …'   the torch build, as pip writes it
#   VENV=none                  use the current environment as it is, without any network
#   RUN=runs/fashion-mnist     where `make train` puts its run; ARGS='--loss huber' adds options
#   RESULTS=benchmarks/results the folder where `make bench` and `make gpu` write
#   RESULT=cpu                 name of the file that `make bench` writes there
#   ARGS=--quick               `make gpu` in a minute, without the parity tests; --full: in an hour;
#                              --parity-only and --no-parity: its two halves, each with all the time
#   ENGINE_CUDA_ARCH=90a       GPU architectures to build for; another value than the last builds again
#   MAX_JOBS=2                 compilers at a time

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
RUN ?= runs/fashion-mnist
ARGS ?=
RESULTS ?= benchmarks/results
RESULT ?= cpu
MAX_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export MAX_JOBS

ifeq ($(VENV),none)
  PY := $(PYTHON)
  BIN :=
  STAMPS := build/stamps$(subst /,_,$(PYTHON))
  PIP_INSTALL := $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-index --no-deps
else
  PY := $(VENV)/bin/python
  BIN := $(VENV)/bin/
  STAMPS := $(VENV)
  PIP_INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check
endif

# A stamp is touched when its step is done; make repeats the step when something it rests on is newer.
VENV_STAMP := $(STAMPS)/.engine-venv
PACKAGES_STAMP := $(STAMPS)/.engine-packages
BUILD_STAMP := $(STAMPS)/.engine-build
ARCH_STAMP := $(STAMPS)/.engine-arch
DATA_STAMP := $(STAMPS)/.engine-data
SOURCES := setup.py pyproject.toml $(wildcard csrc/* csrc/cpu/* csrc/cuda/*)

.DEFAULT_GOAL := train
.PHONY: train test venv build data bench study gpu gpu-sanitize lint clean always

train: build data
	@if [ -f '$(RUN)/checkpoint.safetensors' ]; then \
	  $(PY) -m engine.train --resume '$(RUN)' $(ARGS); \
	else \
	  $(PY) -m engine.train --dataset fashion-mnist --out '$(RUN)' $(ARGS); \
	fi

CONTENDERS := openvino openvino-telemetry

# Side by side where pytest-xdist is there: half the minutes on two cores.
test: build
	@side=$$($(PY) -c 'import xdist' 2>/dev/null && printf '%s' '-n auto --maxprocesses 8 --dist loadfile'); \
	echo "$(PY) -m pytest $$side $(ARGS)"; $(PY) -m pytest $$side $(ARGS)

venv: $(PACKAGES_STAMP)
build: $(BUILD_STAMP)

# OpenVINO is one of the contenders, where it can be had.
bench: build
	@$(PY) -c 'import openvino' 2>/dev/null || $(PIP_INSTALL) --no-deps $(CONTENDERS) 2>/dev/null \
	  || echo 'OpenVINO is not installed and could not be: the results will say "not measured"'
	@mkdir -p '$(RESULTS)'
	$(PY) -m pytest benchmarks --benchmark-json='$(RESULTS)/$(RESULT).json' $(ARGS)
	$(PY) benchmarks/report.py --results '$(RESULTS)'

# One model in an hour on two CPU cores: trained, its likelihood, FID and guidance scored.
study: build data
	$(PY) benchmarks/fashion_mnist.py --out runs/hour --results '$(RESULTS)/fashion-mnist' $(ARGS)

# On a machine with a GPU, in nine minutes and without a network: the extension for that GPU, the op
# tests on it (they write engine/evidence.json), the benchmarks, tables and plots.
gpu: $(PACKAGES_STAMP)
	@started=$$(date +%s) && arch=$$($(PY) benchmarks/gpu.py --arch) && \
	ENGINE_CUDA_ARCH=$${ENGINE_CUDA_ARCH:-$$arch} $(MAKE) --no-print-directory build && \
	$(PY) benchmarks/gpu.py --started $$started --results '$(RESULTS)' $(ARGS)

# Small cases of every CUDA kernel under compute-sanitizer's memcheck and racecheck.
gpu-sanitize: $(PACKAGES_STAMP)
	@arch=$$($(PY) benchmarks/gpu.py --arch) && \
	ENGINE_CUDA_ARCH=$${ENGINE_CUDA_ARCH:-$$arch} $(MAKE) --no-print-directory build && \
	$(PY) benchmarks/sanitize.py $(ARGS)

lint: venv
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	@files=$$(find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh'); \
	  echo "clang-format --dry-run -Werror $$(echo "$$files" | wc -l) files"; \
	  $(BIN)clang-format --dry-run -Werror $$files

# Debian's package, where apt-get and the rights are there; if not, training downloads the data.
data: $(DATA_STAMP)
$(DATA_STAMP): $(PACKAGES_STAMP)
	@if [ '$(VENV)' != none ] && [ ! -f /usr/share/datasets/fashion-mnist/train-images-idx3-ubyte.gz ] \
	    && command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
	  echo 'installing the Debian package dataset-fashion-mnist'; \
	  export DEBIAN_FRONTEND=noninteractive; \
	  apt='apt-get -qq -o Acquire::Retries=0 -o Acquire::http::Timeout=20'; \
	  install="$$apt install --no-install-recommends dataset-fashion-mnist"; \
	  { $$install || { $$apt update && $$install; }; } >/dev/null 2>&1 </dev/null \
	    || echo 'that failed; training will download the data'; \
	fi
	@touch $@

ifeq ($(VENV),none)

$(PACKAGES_STAMP):
	@$(PY) -c 'import torch' || { echo 'VENV=none needs torch in the current environment' >&2; exit 2; }
	@mkdir -p $(@D) && touch $@

else

# TORCH=… on the command line or in the environment exchanges the torch of a finished set-up; without
# it, what is installed stays.
ifneq ($(origin TORCH),file)
  ifneq ($(shell cat $(VENV)/.engine-torch 2>/dev/null),$(TORCH))
    TORCH_CHANGED := always
  endif
endif
# Debian keeps venv in a package of its own; virtualenv from pip serves as well.
$(VENV_STAMP):
	@echo 'creating $(VENV)'
	@$(PYTHON) -c 'import sys; raise SystemExit(0 if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed: make PYTHON=python3.12")'
	@if [ -e '$(VENV)' ] && [ ! -f '$(VENV)/pyvenv.cfg' ]; then \
	  echo '$(VENV) exists and is no virtual environment: give another VENV=, or VENV=none' >&2; exit 2; fi
	@keep=; [ ! -e '$(VENV)' ] || keep=1; remove() { [ -n "$$keep" ] || rm -rf '$(VENV)'; }; \
	$(PYTHON) -m venv $(VENV) >/dev/null 2>&1 || { remove; \
	  $(PYTHON) -m virtualenv --quiet $(VENV) 2>/dev/null; } || { remove; \
	  $(PYTHON) -m pip install --quiet --disable-pip-version-check --target $(VENV).virtualenv virtualenv && \
	  PYTHONPATH=$(VENV).virtualenv $(PYTHON) -m virtualenv --quiet $(VENV); rm -rf $(VENV).virtualenv; }
	@test -x $(PY) || { echo 'no virtual environment could be made: install python3-venv, or use VENV=none' >&2; exit 2; }
	@touch $@

# A library that the tests read, without its own requirements: torchvision would bring another torch.
UNDEMANDING := denoising-diffusion-pytorch

# torch first and pinned, so that no later step brings another one.
$(PACKAGES_STAMP): $(VENV_STAMP) pyproject.toml $(TORCH_CHANGED)
	@echo 'installing $(TORCH)'
	@$(PY) -m pip install --disable-pip-version-check $(TORCH)
	@echo '$(TORCH)' > $(VENV)/.engine-torch
	@echo 'installing the packages of pyproject.toml'
	@$(PY) -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > $(VENV)/torch.txt
	@$(PY) -c "$$LIST_REQUIREMENTS" > $(VENV)/requirements.txt
	@$(PIP_INSTALL) -c $(VENV)/torch.txt -r $(VENV)/requirements.txt
	@$(PIP_INSTALL) --no-deps $(UNDEMANDING)
	@touch $@

endif

# ENGINE_CUDA_ARCH exchanges the library of a finished build; without it, what is built stays.
ifdef ENGINE_CUDA_ARCH
  ifneq ($(shell cat '$(ARCH_STAMP)' 2>/dev/null),$(ENGINE_CUDA_ARCH))
    ARCH_CHANGED := always
  endif
endif
$(BUILD_STAMP): $(PACKAGES_STAMP) $(SOURCES) $(ARCH_CHANGED) $(if $(wildcard engine/_C*.so),,always)
	@echo 'building the kernels'
	@$(PIP_INSTALL) --no-build-isolation --no-deps -e .
	@echo '$(ENGINE_CUDA_ARCH)' > '$(ARCH_STAMP)'
	@touch $@

clean:
	rm -rf build *.egg-info engine/*.so .pytest_cache .ruff_cache

# What the build and the extra "test" need, from pyproject.toml (Python 3.10 has no tomllib; pip does).
define LIST_REQUIREMENTS
import re
try:
    import tomllib
except ImportError:
    from pip._vendor import tomli as tomllib
with open("pyproject.toml", "rb") as file:
    config = tomllib.load(file)
extras = config["project"]["optional-dependencies"]
def expand(names):
    for name in names:
        if name.startswith("diffusion-engine["):
            for extra in name[name.index("[") + 1 : -1].split(","):
                yield from expand(extras[extra])
        else:
            yield name
found = [*config["build-system"]["requires"], *config["project"]["dependencies"], *expand(["diffusion-engine[test]"])]
print("\n".join(dict.fromkeys(r for r in found if re.match(r"[\w.-]+", r)[0] != "torch")))
endef
export LIST_REQUIREMENTS
