# The two commands: `make tiny` trains a storyteller, `make test` checks everything.
PYTHON ?= python3
BIN := .venv/bin
# Compilers use one core each; the files stay together, since they share runs and models, and begin
# in the order of tests/conftest.py.
TWO_AT_ONCE := -n 2 --dist loadfile --no-loadscope-reorder

.PHONY: tiny test quick lint wheel lowest lowest-loggers clean

tiny: .venv/installed
	$(BIN)/python -m tinyllm_jax.train --config tiny

test: .venv/test
	$(BIN)/python -m pytest $(TWO_AT_ONCE)

quick: .venv/test
	$(BIN)/python -m pytest $(TWO_AT_ONCE) -m "not slow"

lint: .venv/test
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# What pip would install, in an environment that knows nothing of this folder.
wheel: .venv/test
	rm -rf .venv/dist .venv/wheel
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir .venv/dist .
	$(PYTHON) -m venv .venv/wheel
	.venv/wheel/bin/python -m pip install --quiet --disable-pip-version-check "$$(echo .venv/dist/*.whl)[serve]"
	cp tests/wheel_program.py .venv/wheel/
	cd .venv/wheel && bin/python wheel_program.py

# The oldest versions that pyproject.toml admits under $(PYTHON), without transformers and TRL, which
# need newer ones. LOWEST_TORCH= leaves out torch, where there is no build of it without CUDA. Ray 2.50
# leaves files open, which is a warning.
LOWEST_TORCH = torch==2.13.0
LOWEST_TESTS := batches corpus tokenizer prepare trained_tokenizer checkpoint engine convert_gguf
LOWEST_TESTS_OF_BOTH := optim model convert_tensor_file loggers
LOWEST_TOOLS := 'pytest>=8.3' 'hypothesis>=6.100' 'beartype>=0.20'
lowest:
	$(PYTHON) -m venv .venv/lowest
	.venv/lowest/bin/python -m pip install --quiet --disable-pip-version-check uv $(LOWEST_TORCH)
	.venv/lowest/bin/uv pip install --quiet --python .venv/lowest/bin/python --resolution lowest-direct \
		--editable '.[serve,gguf,tensorboard,ray]' $(LOWEST_TOOLS)
	.venv/lowest/bin/python -m pytest -k "not transformers" \
		$(patsubst %,tests/test_%.py,$(LOWEST_TESTS) $(if $(LOWEST_TORCH),$(LOWEST_TESTS_OF_BOTH)))
	.venv/lowest/bin/python -m pytest -o filterwarnings=default tests/test_ray.py

# By themselves, since they raise others. Nothing is sent.
lowest-loggers:
	$(PYTHON) -m venv .venv/lowest-loggers
	.venv/lowest-loggers/bin/python -m pip install --quiet --disable-pip-version-check uv $(LOWEST_TORCH)
	.venv/lowest-loggers/bin/uv pip install --quiet --python .venv/lowest-loggers/bin/python \
		--resolution lowest-direct --editable '.[tensorboard,wandb,swanlab,trackio]' $(LOWEST_TOOLS)
	.venv/lowest-loggers/bin/python -m pytest tests/test_loggers.py

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv

# A marker file each, so that what is installed already is not looked at again.
.venv/installed: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

.venv/test: pyproject.toml | .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ .venv/installed

clean:
	rm -rf .venv .cache
