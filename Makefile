# What a developer runs; `make` alone lists it. Anything longer than a line lives in scripts/.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The recorded layer (or layers) that `make demo` checks: directories like those in tests/golden/.
CASE ?= tests/golden/plain
# More flags for the program behind `make demo` (--backend cpu, --json), `make bench`, `make tax` or `make tune`.
ARGS ?=

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@printf '\nVariables: CASE=<directory> and ARGS=<flags> for demo; FUSED_LORA_CUDA_ARCHS=80,90,120+PTX to build for fewer GPUs;\n'
	@printf 'NVCC, CUDA_HOME, CUDA_PATH and LIBCLANG_PATH to name the tools; FUSED_LORA_REQUIRE_GPU=1: tests fail without a GPU.\n'

.PHONY: toolchain
toolchain: ## Find nvcc and libclang, or install them into .toolchain/
	@scripts/toolchain

.PHONY: demo
demo: toolchain ## Build; check CASE against what PEFT recorded; fine-tune a tiny Llama and let it speak
	@scripts/demo $(ARGS) $(CASE)

.PHONY: test
test: toolchain ## Run all tests: unit, property, emulator, documentation, README; on the GPU where there is one
	@scripts/test

.PHONY: soak
soak: toolchain ## Random calls against the oracle for three minutes (or FUSED_LORA_SOAK_SECONDS), on the CPU, the emulator and the GPU
	@. .toolchain/env; FUSED_LORA_SOAK_SECONDS=$${FUSED_LORA_SOAK_SECONDS:-180} cargo test --features candle,peft --test soak -- --nocapture

.PHONY: check
check: ## Check formatting, lints on all feature sets, documentation, dependencies, packages and the compiled kernels
	@scripts/toolchain check
	@scripts/check

.PHONY: advisories
advisories: ## Hold the dependencies against RustSec's advisories, which it fetches from GitHub
	@scripts/toolchain check
	@.toolchain/cargo-deny/bin/cargo-deny check advisories

.PHONY: package
package: toolchain ## Build both crates from what `cargo package` packs, outside this folder, and their documentation as docs.rs does
	@scripts/package-check

.PHONY: fuzz
fuzz: ## Fuzz the PTX parser, adapter files and the planner; ARGS='<seconds> <targets>'
	@scripts/fuzz $(ARGS)

.PHONY: semver
semver: ## Hold the public API against that of BASE, the last release's tag
	@scripts/semver-check $(BASE)

.PHONY: cute-check
cute-check: toolchain ## Hold the emulator's matrix layouts against CuTe's headers, which it installs
	@scripts/cute-check

.PHONY: burn-check
burn-check: toolchain ## Type-check interop/burn, which takes some minutes and gigabytes
	@. .toolchain/env; cd interop/burn && DOCS_RS=1 cargo check

.PHONY: candle-cuda
candle-cuda: toolchain ## Lint the candle op on GPUs against candle's CUDA backend, its kernels left out
	@scripts/candle-cuda check

.PHONY: peft-check
peft-check: toolchain ## Hold saved adapters against PEFT itself, which it installs (several gigabytes)
	@scripts/peft-check

# What was typed, for the files of results; as a variable, so that no shell reads it.
bench tax: export FUSED_LORA_COMMAND = make $@$(if $(ARGS), ARGS="$(ARGS)")

.PHONY: bench
bench: toolchain ## Measure on this machine
	@. .toolchain/env; cargo bench --features candle,peft -- $(ARGS)

.PHONY: tax
tax: toolchain ## Measure the LoRA tax over cuBLASLt on the GPU; ARGS=--help says what it takes
	@. .toolchain/env; cargo run --release --example tax -- $(ARGS)

.PHONY: tune
tune: toolchain ## Measure what the Hopper kernels leave open (GPU.md); ARGS=<questions>
	@. .toolchain/env; scripts/tune run $(ARGS)

.PHONY: bundle
bundle: toolchain ## Pack tests, benches and examples for a GPU machine without Rust, into target/bundle/
	@scripts/bundle

.PHONY: clean-toolchain
clean-toolchain: ## Remove .toolchain/
	rm -rf .toolchain
