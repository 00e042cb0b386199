# make demo   set up, then ask a small real model a question
# make run    set up, then serve that model until Ctrl-C
# make test   set up, then run every test
# make check  lint, format and types
# make claims write docs/popular-claims.md again
# PYTHON=python3.12 chooses the interpreter (3.11 or newer).

BIN := .venv/bin
QUESTION ?= Why is the sky blue? Answer in one sentence.

.PHONY: demo run test check format bench claims clean

demo: .venv/.demo
	@$(BIN)/mgpu run smollm2-135m --max-tokens 300 --ask "$(QUESTION)"

run: .venv/.demo
	@$(BIN)/mgpu run smollm2-135m || [ $$? -eq 130 ] # Ctrl-C is how it ends

test: .venv/.test
	$(BIN)/python -m pytest $(TESTS)

check: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: .venv/.test
	$(BIN)/python -m benchmarks

claims: .venv/.test
	$(BIN)/python -m benchmarks.claims

clean:
	rm -rf .venv

# An environment of another place (the checkout was moved or copied), or that another PYTHON is to replace.
ifneq ($(shell PYTHON='$(PYTHON)' scripts/setup --fits 2>/dev/null && echo fits),fits)
.PHONY: .venv/.demo .venv/.test
endif

.venv/.demo: pyproject.toml scripts/setup
	@scripts/setup llamacpp
	@touch $@

.venv/.test: pyproject.toml scripts/setup
	@scripts/setup llamacpp,dev
	@touch .venv/.demo $@
