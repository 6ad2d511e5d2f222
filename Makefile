# The one way in. Plain `make` prints every target. Everything is installed into .venv; nothing else on the machine is touched.

PYTHON ?= python3
# Which torch to train with. The CPU build by default; on a GPU machine: make setup TORCH=torch==2.13.0
TORCH ?= torch==2.13.0+cpu
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
SECONDS_DEMO ?= 20
INPUTS_FUZZ ?= 2200000

PIP = .venv/bin/pip --disable-pip-version-check install -q -c constraints.txt
KIZU = .venv/bin/kizu

# On a GPU machine that has packages of its own and no network: make test-gpu GPU_PYTHON=python3
GPU_PYTHON ?= .venv/bin/python
GPU_SETUP = $(if $(filter .venv/%,$(GPU_PYTHON)),setup)
GPU_DOCTOR = $(GPU_PYTHON) -c 'from edge.commands.doctor import doctor; doctor()'

.DEFAULT_GOAL := help
.PHONY: help demo demo-train setup test test-gpu check format pages fuzz test-system bench bench-gpu kernels images-check soak soak-kill power-cut compile-all clean

help:  ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv/bin/pip:
	@$(PYTHON) -m venv .venv || { echo "python venv is missing: apt-get install python3-venv"; rm -rf .venv; exit 1; }

.venv/.runtime: pyproject.toml constraints.txt | .venv/bin/pip
	$(PIP) -e .
	@touch $@

# The first try finds a CPU build wherever pip is already set up to look; the second asks PyTorch's own index for it.
.venv/.dev: .venv/.runtime
	$(PIP) "$(TORCH)" 2>/dev/null || $(PIP) "$(TORCH)" --index-url $(TORCH_INDEX)
	$(PIP) -e '.[train,console,dev]'
	@touch $@

demo: .venv/.runtime  ## watch a line being inspected: daemon, two cameras, subscriber (no torch, no GPU)
	$(KIZU) demo --seconds $(SECONDS_DEMO)

setup: .venv/.dev  ## install training and development tools into .venv

test: setup check  ## everything that CI runs: style, types, tests
	.venv/bin/python -m pytest

check: setup  ## ruff and mypy --strict
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup  ## let ruff rewrite the code
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

demo-train: setup  ## train the shipped demo bundle again, from the shipped photographs, into build/demo-bundle
	@mkdir -p build
	$(KIZU) train student-teacher --preset line --data edge/demo/photos --out build/demo-bundle

pages: setup  ## write docs/metrics.md and the Grafana dashboard again, from the code
	.venv/bin/python docs/metrics_page.py > docs/metrics.md
	.venv/bin/python deploy/grafana/build_dashboard.py > deploy/grafana/dashboards/kizu.json

fuzz: setup  ## over a million damaged inputs for every parser of what comes from outside, as JSON lines
	.venv/bin/python tests/helpers/fuzzing.py --inputs $(INPUTS_FUZZ)

test-system: setup  ## the unit under a real systemd in a container (root, systemd-container), Prometheus beside a line: three minutes
	.venv/bin/python tests/system/nspawn.py
	.venv/bin/python -m pytest -rs tests/system/test_prometheus_line.py

images-check: setup  ## build the images of deploy/ without a registry and run them (root, buildah, podman, debootstrap): minutes
	.venv/bin/python tests/system/images.py

bench: setup  ## every benchmark that needs no data beside the checkout, as JSON lines
	@for name in engine segmentation throughput overhead startup memory fdfe; do .venv/bin/python benchmarks/$$name.py || exit 1; done

power-cut: setup  ## cut the power of a virtual machine ten times (qemu, minutes): nothing acknowledged is lost; the control loses
	.venv/bin/python tests/system/power_cut.py

compile-all: setup  ## build every preset's graph for every GPU target at every precision (TensorRT for RTX, no GPU needed)
	.venv/bin/python benchmarks/compile_all.py

soak: setup  ## half an hour at full load: memory stands still after the warm-up, descriptors are constant
	.venv/bin/python tests/system/soak.py

soak-kill: setup  ## SIGKILL daemon, cameras and subscribers 1,000 times (hours): nothing lost, nothing twice
	.venv/bin/python tests/system/kill_line.py --kills 1000

test-gpu: $(GPU_SETUP)  ## the tests that need an NVIDIA GPU; prints device and versions
	-@$(GPU_DOCTOR)
	$(GPU_PYTHON) -m pytest -m gpu -s -rs $$(grep -rl --include='test_*.py' 'pytest.mark.gpu' tests)

bench-gpu: $(GPU_SETUP)  ## the benchmarks that need an NVIDIA GPU, as JSON lines; prints device and versions, fails without one
	-@$(GPU_DOCTOR)
	@for name in gpu gpu_fdfe gpu_host; do $(GPU_PYTHON) benchmarks/$$name.py || exit 1; done

kernels:  ## build our CUDA kernels for every supported GPU (needs nvcc)
	sh edge/engines/kernels/build.sh

clean:  ## remove .venv and build
	rm -rf .venv build
