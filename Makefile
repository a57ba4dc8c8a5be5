# Two targets are all a fresh clone needs: `make serve` and `make test`.

BINARY := target/release/tidegate
PYTHON := .venv/bin/python
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check

.PHONY: serve test setup build lint fmt test-rust test-clients models clean

serve: build
	exec ./$(BINARY) serve

test: test-rust test-clients

# Installs what is missing and fetches the ONNX Runtime library; quick when everything is there.
setup:
	@deploy/setup.sh

build: setup
	cargo build --release --locked

lint: setup
	cargo fmt --check
	cargo clippy --locked --all-targets -- -D warnings

fmt:
	cargo fmt

test-rust: setup
	cargo test --locked

test-clients: build .venv/clients.installed
	@deploy/apt.sh promtool=prometheus
	$(PYTHON) -m pytest -q tests/clients

# Trains the models in models/ anew; the files come out the same.
models: setup .venv/models.installed
	$(PYTHON) models/train.py

clean:
	cargo clean
	rm -rf .venv .onnxruntime

.venv/clients.installed: tests/clients/requirements.txt
	$(PIP) -r $<
	touch $@

.venv/models.installed: models/requirements.txt
	$(PIP) -r $<
	touch $@
