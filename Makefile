# make demo    set everything up, classify, fine-tune and export on photographs, look at out/demo/report.html
# make test    set everything up, check style and types, run the first tier of tests on TensorFlow, JAX and PyTorch
# make help    the others

.DEFAULT_GOAL := help
PYTEST := .venv/bin/python -m pytest
RESULTS ?= out/bench

.PHONY: help setup demo lint test test-tensorflow test-jax test-torch test-all bench bench-data bench-train bench-load bench-fcmae clean

help:
	@echo "make demo                classify photographs, fine-tune on flowers, export, measure: out/demo/report.html"
	@echo "make demo DATA=folder    the same on your own class folders; WEIGHTS=imagenet, EPOCHS=, SEED=, LIMIT= too"
	@echo "make test                style, types, the tests on TensorFlow, JAX and PyTorch"
	@echo "make test-all            the second tier too: full-size models, exports, processes, notebooks, demo, benchmarks"
	@echo "make test-torch          the tests on one backend (also test-tensorflow, test-jax)"
	@echo "make lint                style, types and import direction only; what pre-commit runs"
	@echo "make bench RESULTS=folder  speed on every backend, against timm and others; about 40 minutes"
	@echo "make bench-data DATA=folder  the input pipelines on a folder of JPEGs, against timm and Keras layers"
	@echo "make bench-train         a step of the trainer, against the bare step (KERAS_BACKEND=... chooses)"
	@echo "make bench-load BEFORE=checkout  time and memory of loading a .pth file, against timm and another checkout"
	@echo "make bench-fcmae         a step of FCMAE pre-training: tall, masked and ordinary; about 8 minutes"
	@echo "make clean               remove .venv and what the commands wrote"

setup:
	@.ci/setup

demo: setup
	@.venv/bin/python -m demo.run --output out/demo $(if $(DATA),--data "$(DATA)") \
		$(if $(WEIGHTS),--weights "$(WEIGHTS)") $(if $(EPOCHS),--epochs $(EPOCHS)) \
		$(if $(SEED),--seed $(SEED)) $(if $(LIMIT),--limit $(LIMIT))

lint: setup
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy
	.venv/bin/lint-imports

# "once" tests need no backend; PyTorch's process starts fastest.
test-tensorflow: setup
	KERAS_BACKEND=tensorflow $(PYTEST) -m "not slow and not once"

test-jax: setup
	KERAS_BACKEND=jax $(PYTEST) -m "not slow and not once"

test-torch: setup
	KERAS_BACKEND=torch $(PYTEST) -m "not slow"

test: setup
	@.ci/test-backends

test-all: setup
	@.ci/test-backends all

bench-data: setup
	.venv/bin/python benchmarks/pipeline.py "$(DATA)"

bench-train: setup
	.venv/bin/python benchmarks/trainer_overhead.py

bench-load: setup
	.venv/bin/python benchmarks/loading.py $(if $(BEFORE),--before "$(BEFORE)")

bench: setup
	.venv/bin/python -m benchmarks.speed all --output "$(RESULTS)"
	.venv/bin/python -m benchmarks.speed startup --output "$(RESULTS)"

bench-fcmae: setup
	.venv/bin/python benchmarks/fcmae.py benchmarks/runs/fcmae/speed.csv

clean:
	rm -rf .venv out
