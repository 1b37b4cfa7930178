# make train   from scratch: environment, tokenizer, a tiny model trained on real text, a sample, plots (in run/);
#              ARGS="--config.train.steps=50" overrides config keys
# make test    the CPU suite          make lint    ruff, pyright
# make readme  runs the README's commands, as printed and in order, in a clean clone of the last commit
# make cluster runs of several processes started by Slurm and Open MPI, if these are installed
# make bench   speed compared with transformers, a dense product and ragged_dot: same machine, same run
# make kernels compiles only the Hopper kernels, with the GPU's compiler (two minutes)
# make aot     compiles the Hopper kernels, and training steps up to 671B, for hardware you don't have (two to four hours)
# make rehearse   benchmarks.gpu without a GPU, with the packages for a machine that has one (Python 3.12; minutes)
# make studies-quick   the studies in their short form (all but sparse_attention)
# make docs    builds the site in build/site; fails on a dead link
# make notebooks   runs the notebooks      make colab   runs them with the versions that Colab preinstalls
# make clean   removes environments, caches and run/
#
# Uses the first of Python 3.12, 3.13, 3.11 that works; `make PYTHON=/path/to/python` overrides this.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help train test readme cluster lint bench kernels aot rehearse studies-quick notebooks colab docs clean

# A version manager's shim may exist and fail, so each candidate has to import what an environment needs.
find_python = for v in $(1); do for p in "$$(command -v python$$v)" $$(ls -d $$HOME/.pyenv/versions/*/bin/python$$v 2>/dev/null); do \
	if [ -n "$$p" ] && "$$p" -c 'import sys, venv, ensurepip; assert (3, 11) <= sys.version_info < (3, 14)' \
	>/dev/null 2>&1; then echo "$$p"; exit; fi; done; done

PYTHON ?= $(shell $(call find_python,3.12 3.13 3.11))
RUN := .venv/bin/python
# Huge pages for the CPU; the commands set the other glibc options themselves.
export GLIBC_TUNABLES ?= glibc.malloc.hugetlb=1

help:
	@sed -n 's/^# \{0,1\}//p;/^$$/q' Makefile

# When setup.py changes, a working environment is updated, and packages added to it are kept; `make clean` removes it.
.venv/stamp: setup.py
	@"$(PYTHON)" -c 'import sys, venv, ensurepip; assert (3, 11) <= sys.version_info < (3, 14)' >/dev/null 2>&1 \
	|| { echo "No working Python 3.12, 3.13 or 3.11 (with venv and ensurepip) found; install one, or say make PYTHON=/path/to/python." >&2; exit 2; }
	@$(RUN) -c '' 2>/dev/null || { rm -rf .venv && "$(PYTHON)" -m venv .venv; }
	@echo "Environment .venv with $$($(RUN) --version): installing (a minute or two)"
	@$(RUN) -m pip install -qq --disable-pip-version-check -e '.[dev]'
	@touch $@

# Only for tests: lm-eval, whose tasks are run on the engine and the server.
.venv/eval-stamp: .venv/stamp
	@$(RUN) -m pip install -qq --disable-pip-version-check -e '.[eval]'
	@touch $@

train: .venv/stamp
	$(RUN) -m deepseek_jax.train --config tiny --workdir run $(ARGS)

test: .venv/stamp .venv/eval-stamp
	JAX_PLATFORMS=cpu $(RUN) -m pytest -n 2 -m "not slow"

readme: .venv/stamp
	JAX_PLATFORMS=cpu $(RUN) -m pytest -m slow tests/docs/test_readme_in_order.py

cluster: .venv/stamp
	JAX_PLATFORMS=cpu $(RUN) -m pytest -rs -m slow tests/examples/test_cluster.py

lint: .venv/stamp
	$(RUN) -m ruff check .
	$(RUN) -m pyright --pythonpath $(RUN)

# The peer needs a CPU wheel of torch, which exists for Python 3.11; without it, only our side is timed.
.venv-peer/stamp: benchmarks/peer.txt
	@python=$$($(call find_python,3.11)); rm -rf .venv-peer; mkdir .venv-peer; \
	if [ -z "$$python" ]; then echo "No Python 3.11 for the peer's torch: timing our side alone." >&2; exit 0; fi; \
	echo "Environment .venv-peer with $$("$$python" --version): installing torch and transformers"; \
	"$$python" -m venv .venv-peer && \
	.venv-peer/bin/python -m pip install -qq --disable-pip-version-check -r benchmarks/peer.txt || \
	{ echo "torch or transformers could not be installed: timing our side alone." >&2; rm -rf .venv-peer; mkdir .venv-peer; }
	@touch $@

bench: .venv/stamp .venv-peer/stamp
	$(RUN) -m benchmarks.run --json benchmarks/results/train_cpu.json
	$(RUN) -m benchmarks.grouped_matmul --json benchmarks/results/grouped_matmul.json
	$(RUN) -m benchmarks.decode --json benchmarks/results/decode_cpu.json

STUDIES := load_balance mtp bias_rule routing_limit experts balance_scope mla dense specialization optimizers larger long_context pipeline fp8 two_hop post_training
studies-quick: .venv/stamp
	for s in $(STUDIES); do $(RUN) -m experiments.studies.$$s.run --quick || exit 1; done

notebooks: .venv/stamp
	$(RUN) -m pip install -qq --disable-pip-version-check -e '.[notebooks]'
	$(RUN) notebooks/execute.py

# base.txt lists Colab's packages: colab.py removes all others before each run. Without Python or packages nothing is run.
.venv-colab/stamp: notebooks/colab_pins.txt
	@python=$$($(call find_python,3.13 3.12 3.11)); rm -rf .venv-colab; \
	if [ -z "$$python" ]; then echo "make colab skipped: no Python 3.13, 3.12 or 3.11 here." >&2; exit 0; fi; \
	echo "Environment .venv-colab with $$("$$python" --version): installing Colab's versions (two minutes)"; \
	"$$python" -m venv .venv-colab && \
	.venv-colab/bin/python -m pip install -qq --disable-pip-version-check -r notebooks/colab_pins.txt nbclient nbformat && \
	.venv-colab/bin/python -m pip freeze --all > .venv-colab/base.txt && touch $@ || \
	{ echo "make colab skipped: the packages of notebooks/colab_pins.txt could not be installed." >&2; rm -rf .venv-colab; }

colab: .venv-colab/stamp
	@if [ -e $< ]; then .venv-colab/bin/python -m notebooks.colab; fi

# Other versions get a separate environment: make kernels AOT_JAX=0.11.2 AOT_NVCC=13.0.88 REPORT=FILE
AOT := .venv-aot$(AOT_JAX:%=-jax-%)$(AOT_NVCC:%=-nvcc-%)
$(AOT)/stamp: setup.py
	@$(AOT)/bin/python -c '' 2>/dev/null || { rm -rf $(AOT) && "$(PYTHON)" -m venv $(AOT); }
	@$(AOT)/bin/python -m pip install -qq --disable-pip-version-check -e '.[aot]' \
		$(AOT_JAX:%=jax==%) $(AOT_JAX:%=jaxlib==%) $(AOT_JAX:%=jax-cuda13-plugin==%) $(AOT_NVCC:%=nvidia-cuda-nvcc==%)
	@touch $@

kernels: $(AOT)/stamp
	$(AOT)/bin/python -m kernels_pallas.tools.compile_report --shapes v3-train v3-decode $(REPORT:%=--json %)

# Each takes seconds to twenty minutes, except the last. The last two also need libtpu; their failure is ignored.
COMPILE = $(AOT)/bin/python -m deepseek_jax.compile
V3 := --model v3_671b --pipe 16 --expert 64 --remat full --deferred 0
report = --json experiments/scale/$(1).json --plot experiments/scale/$(1).png
aot: $(AOT)/stamp
	$(AOT)/bin/python -m kernels_pallas.tools.compile_report --shapes v3-train v3-decode --json experiments/studies/fp8/compile_sm90a.json
	$(AOT)/bin/python -m kernels_pallas.tools.predict --rows experiments/studies/fp8/compile_sm90a.json \
		--json experiments/studies/fp8/predicted_h100.json
	$(COMPILE) --model tiny --target h100:1 --sequences 32 --rows 8 --sequence-length 1024 --remat report $(call report,tiny_h100_1)
	$(COMPILE) --model tiny --target h100:8 --expert 8 --sequences 128 --rows 4 --sequence-length 1024 --remat report \
		$(call report,tiny_h100_8)
	$(COMPILE) --model small --target h100:16 --expert 16 --sequences 256 --rows 8 --sequence-length 2048 --remat report \
		$(call report,small_h100_16)
	$(COMPILE) --model small --target h100:8 --expert 8 --sequences 128 --rows 8 --sequence-length 2048 --remat full \
		$(call report,small_h100_8)
	$(COMPILE) --model small --target h100:8 --expert 8 --sequences 64 --rows 8 --sequence-length 1024 --remat full --fp8 \
		$(call report,small_h100_8_fp8)
	$(COMPILE) --model v2_lite_16b --target h100:8 --expert 8 --sequences 512 --capacity 1.5 $(call report,v2_lite_16b_h100_8)
	$(COMPILE) --model v2_lite_16b --target h100:64 --expert 16 --sequences 1024 --remat full $(call report,v2_lite_16b_h100_64)
	$(COMPILE) --model v2_lite_16b --target h100:8 --decode 32 --length 4096 $(call report,v2_lite_16b_h100_8_decode)
	-$(COMPILE) --model v2_236b --target h100:128 --expert 32 --sequences 2048 --remat full $(call report,v2_236b_h100_128)  # does not fit
	$(COMPILE) --layout report $(call report,v3_671b_h100_2048_report)
	$(COMPILE) --layout report --program evaluate $(call report,v3_671b_h100_2048_evaluate)
	$(COMPILE) --layout report --program sample $(call report,v3_671b_h100_2048_sample)
	$(COMPILE) $(V3) --target h100:2048 --fp8 $(call report,v3_671b_h100_2048_fp8)
	$(COMPILE) $(V3) --target h100:2048 --fp8 --capacity 5 $(call report,v3_671b_h100_2048_fp8_capacity_5)
	$(COMPILE) $(V3) --target h100:2048 $(call report,v3_671b_h100_2048_bf16)
	-$(COMPILE) $(V3) --target v5p:8x16x16 $(call report,v3_671b_v5p_8x16x16_bf16)
	-$(COMPILE) $(V3) --target 7x:8x8x16 $(call report,v3_671b_7x_8x8x16_bf16)  # another hour or two
	$(AOT)/bin/python -m experiments.scale.agreement

# deepseek-jax is not installed: it runs from the checkout, and its dependencies are not on such a machine either.
.venv-rehearse/stamp: benchmarks/gpu/pins.txt
	@python=$$($(call find_python,3.12)); rm -rf .venv-rehearse; \
	if [ -z "$$python" ]; then echo "make rehearse needs Python 3.12, as the pinned packages do." >&2; exit 2; fi; \
	"$$python" -m venv .venv-rehearse && \
	.venv-rehearse/bin/python -m pip install -qq --disable-pip-version-check -r benchmarks/gpu/pins.txt
	@touch $@

rehearse: .venv-rehearse/stamp
	PATH="$(CURDIR)/.venv-rehearse/bin:$$PATH" .venv-rehearse/bin/python -m benchmarks.gpu --rehearse

.venv-docs/stamp: setup.py
	@.venv-docs/bin/python -c '' 2>/dev/null || { rm -rf .venv-docs && "$(PYTHON)" -m venv .venv-docs; }
	@.venv-docs/bin/python -m pip install -qq --disable-pip-version-check -e '.[docs]'
	@touch $@

docs: .venv-docs/stamp
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/python -m mkdocs build --strict

clean:
	rm -rf .venv .venv-peer .venv-aot* .venv-colab .venv-docs .venv-rehearse .cache .pytest_cache .hypothesis .ruff_cache build run *.egg-info
