# The same commands for people and for CI. `make help` lists them.
.DEFAULT_GOAL := help
PYTHON := python3
RUN := .venv/bin
export PYTHON REPO REF REGISTRY_PORT SERVER_PORT BASE

.PHONY: help setup builder-image demo demo-down check fix test test-docker cluster test-cluster cluster-down soak bench

help: ## List the commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

setup: ## Make .venv; install what Debian lacks (git, python3-venv, podman)
	@scripts/setup

builder-image: setup ## Build the image that runs the builds, and the base it stands on
	@$(RUN)/python -m scripts.images builder

demo: setup ## Fresh machine to pushed image, through Prefect. REPO=… REF=… builds another repository
	@$(RUN)/python -m scripts.demo up

demo-down: setup ## Stop and remove what the demo started
	@$(RUN)/python -m scripts.demo down

check: setup ## Format, lint and types, without changing anything
	@$(RUN)/ruff format --check .
	@$(RUN)/ruff check .
	@$(RUN)/mypy

fix: setup ## Format, and mend what ruff can mend
	@$(RUN)/ruff format .
	@$(RUN)/ruff check --fix .

test: ## Every test that needs no cluster: unit, wire, engine, flow
	@WITH_TESTS=1 scripts/setup
	@$(RUN)/python -m scripts.images
	@PODBUILD_REQUIRE_ENGINE=1 $(RUN)/python -m pytest -q

test-docker: ## The engine tests on a real Docker engine, in a network namespace of its own
	@WITH_TESTS=1 scripts/setup
	@$(RUN)/python -m scripts.images
	@$(RUN)/python -m scripts.docker_engine $(RUN)/python -m pytest -q tests/test_docker.py

cluster: setup ## Start a Kubernetes cluster for tests (as root), or prepare the one of KUBECONFIG; print its kubeconfig
	@tests/cluster/up

test-cluster: ## The tests that need a cluster
	@PODBUILD_REQUIRE_CLUSTER=1 $(RUN)/python -m pytest -q -m "cluster and not soak"

cluster-down: ## Stop and remove what `make cluster` started
	@tests/cluster/down

soak: ## The long proofs
	@WITH_TESTS=1 scripts/setup
	@$(RUN)/python -m scripts.images
	@PODBUILD_REQUIRE_ENGINE=1 $(RUN)/python -m pytest -q -m soak

bench: setup ## Measure, and print one line of JSON per program
	@$(RUN)/python -m scripts.images
	@for program in bench/*.py; do $(RUN)/python $$program; done
