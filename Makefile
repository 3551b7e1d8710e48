# Two commands: `make demo` and `make test`. Everything else is a part of them.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:

export EVENKEEL_STATE ?= $(HOME)/.local/state/evenkeel
export PIP_CACHE_DIR ?= $(EVENKEEL_STATE)/pip-cache
export ANSIBLE_CONFIG := $(CURDIR)/ansible.cfg
export ANSIBLE_HOME := $(CURDIR)/.ansible
export ANSIBLE_FORCE_COLOR ?= $(if $(CI),0,$(shell test -t 1 && echo 1 || echo 0))
export PATH := $(CURDIR)/.venv/bin:$(PATH)
SUDO := $(if $(filter 0,$(shell id -u)),,sudo)

help: ## list these commands
	@echo "Evenkeel: deploy and keep alive a web platform on plain Debian hosts. State folder: $(EVENKEEL_STATE)"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

setup: .venv/.ready ## install what the controller needs into .venv (Python packages, pinned with hashes)

.venv/.ready: requirements.lock
	@command -v python3 >/dev/null || { echo "python3 (3.11 or newer) is missing: apt-get install python3 python3-venv"; exit 1; }
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3 is $$(python3 -V): 3.11 or newer is needed"; exit 1; }
	if ! python3 -c 'import ensurepip' 2>/dev/null; then
	  echo "Installing python3-venv (Debian package) ..."
	  $(SUDO) apt-get update -qq && $(SUDO) apt-get install -y -qq --no-install-recommends python3-venv
	fi
	echo "Installing $$(grep -c '^[a-z]' requirements.lock) pinned Python packages into .venv (ansible, molecule, linters; about a minute) ..."
	python3 -m venv --clear .venv
	.venv/bin/pip install -qq --disable-pip-version-check --require-hashes --requirement requirements.lock
	touch $@

demo: setup ## boot a real systemd host, converge a whole platform on it, deploy a release, verify it
	@bin/demo

lab: setup ## the same on the full topology: 13 hosts, pairs of everything (inventories/lab; about 6 GiB of memory)
	@bin/demo lab

third-party: setup ## an application that is not ours, from the package index: deployed, upgraded with its migrations, brought back (docs/third-party.md)
	@bin/third-party

lab-down: setup ## remove the hosts of the full topology
	@ansible-playbook -i inventories/lab playbooks/lab.yml -e lab_state=absent

test: setup ## everything CI runs: lint, unit tests, the application's tests, the lab scenarios
	@bin/test

lint: setup ## ansible-lint (production), yamllint, ruff, mypy
	@bin/lint

unit: setup ## the fast tests that need no host
	@python -m pytest tests/unit

proof: ## 4,000 accepted jobs while workers, broker, databases and web are killed: none lost, none done twice (about 5 minutes)
	@bin/proof

soak: setup ## ten minutes of writes, requests and jobs on the full topology, two random faults every two minutes (after make lab)
	@bin/soak

deliveries: setup ## 20 deploys and 20 rollbacks under load, on two hosts and on the demo: nothing fails, nothing is lost (after make demo; about 2 hours)
	@bin/deliveries

bench: setup ## the job engine beside plain Celery, a deploy and a rollback beside a plain playbook (WHAT=jobs or WHAT=deploy: one of them)
	@bin/bench $(WHAT)

docs: setup ## write docs/reference from the roles' specs
	@python docs/generate.py

lock: setup ## resolve requirements.lock again from pyproject.toml
	@uv pip compile --quiet --universal --python-version 3.11 --group dev --generate-hashes --no-emit-index-url --no-header pyproject.toml --output-file requirements.lock

clean: ## stop and remove every lab host (processes, mounts, bridges, nft rules); keeps secrets, releases and caches
	@$(SUDO) python3 roles/lab/files/lab.py down --all "$(EVENKEEL_STATE)"

.PHONY: help setup demo lab third-party lab-down test lint unit proof soak deliveries bench docs lock clean
