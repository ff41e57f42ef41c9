# Everything a person or CI runs. `make` alone lists the targets; each one sets up what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help setup demo test test-containers lint docs format compile image submit status logs cancel watch schedule lock minio kube grafana clean

UV_VERSION := 0.13.8
PYTHONS := >=3.11,<3.15
MINIO_VERSION := v0.0.0-20260212201848-7aac2a2c5b7c
MINIO := .tools/bin/minio
KUBE := .tools/bin/kube-apiserver .tools/bin/etcd .tools/crds/kueue .tools/crds/prometheus-operator
KUEUE_VERSION := v0.15.0
OPERATOR_VERSION := v0.85.0
KUBE_LDFLAGS := -s -w -X k8s.io/component-base/version.gitVersion=v1.36.3 -X k8s.io/component-base/version.gitMajor=1 -X k8s.io/component-base/version.gitMinor=36

# A pyenv shim answers `command -v` for a uv that cannot start, so it is asked for its version.
UV := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo .tools/uv/bin/uv)
PY := .venv/bin/python
READY := .venv/.ready
COMPILE = $(UV) pip compile --universal --python-version 3.11 --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-header --quiet

# What `make image` can be told; an empty value is the default of images/build.py.
ENGINE := docker
VARIANT := gpu
BUILD = python3 -m images.build --engine '$(ENGINE)' --base '$(BASE)' --variant '$(VARIANT)' --network '$(NETWORK)' \
	--ca '$(CA)' --pip-conf '$(PIP_CONF)' --torch-index '$(TORCH_INDEX)'

export PATH := $(CURDIR)/.tools/bin:$(PATH)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## make .venv with the locked packages (minutes the first time, instant afterwards)
	@echo "ready: .venv/bin/distillery"

demo: $(READY) ## run the compiled pipeline on real data on this machine; ends with a leaderboard and a report
	@$(PY) -m pipelines.demo

test: $(READY) ## run the quick tests; ARGS="-m slow" or ARGS=tests/test_data.py chooses others
	@$(PY) -m pytest $(ARGS)

test-containers: VARIANT = cpu
test-containers: $(READY) ## build the image as `image` does and run the compiled pipeline in its containers (needs Docker)
	@$(BUILD) --tag distillery:test --push ''
	@$(PY) -m pytest -m containers $(ARGS)

lint: $(READY) ## check style, format and types
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

docs: $(READY) ## build the site of docs/ into build/site, warnings as errors
	@rm -rf build/site
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --quiet
	@echo "site: build/site/index.html"

format: $(READY) ## rewrite the sources in the project's format
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

compile: $(READY) ## compile the pipelines to the committed YAML
	@$(PY) -m pipelines.compile

image: ## build the image of the pods; ENGINE=docker|podman BASE= VARIANT=gpu|cpu PUSH=registry/name (docs/images.md)
	@$(BUILD) --tag '$(TAG)' --push '$(PUSH)'
	@$(if $(PUSH),$(MAKE) --no-print-directory compile)

submit: ## run on a cluster: ARGS="-x my.yaml --wait"; also: make status, logs, cancel, watch, schedule
submit status logs cancel watch schedule: $(READY)
	@$(PY) -m pipelines $@ $(ARGS)

lock: $(UV) ## resolve the newest allowed packages into the hashed requirement files
	@$(COMPILE) pyproject.toml --upgrade --extra pipeline --extra report --extra digits --extra metrics -o requirements.txt >/dev/null
	@$(COMPILE) pyproject.toml --extra dev -c requirements.txt -o requirements-dev.txt >/dev/null
	@$(COMPILE) pyproject.toml --extra report --extra digits --extra metrics -c requirements.txt > images/requirements.txt
	@echo kfp | $(COMPILE) - --no-deps -c requirements.txt >> images/requirements.txt
	@echo hatchling | $(COMPILE) - -c requirements-dev.txt > images/requirements-build.txt

minio: $(MINIO) ## build the MinIO server that the store tests talk to (needs Go; about 6 minutes once)

kube: $(KUBE) ## build the Kubernetes API server that ARGS="-m cluster" talks to (needs Go; about 20 minutes once)

grafana: .tools/grafana ## fetch Grafana's published schema for ARGS="-m monitoring" (needs npm; these tests also want apt's prometheus)

clean: ## remove caches and .venv; runs/ and .tools/ stay
	@rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist local_outputs
	@find . -name __pycache__ -type d -not -path './.tools/*' -prune -exec rm -rf {} +

$(READY): requirements-dev.txt pyproject.toml | $(UV)
	@test -x $(PY) || $(UV) venv --quiet --allow-existing --python '$(PYTHONS)' .venv
	@$(UV) pip sync --python $(PY) --require-hashes requirements-dev.txt
	@$(UV) pip install --quiet --python $(PY) --no-deps --no-build-isolation --editable .
	@touch $@

# A venv of its own suits Pythons managed by a distribution; --target suits those that ship without venv.
.tools/uv/bin/uv:
	@echo "uv $(UV_VERSION) is not installed: fetching it into .tools/uv" >&2
	@export PIP_USER=0 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1; \
	rm -rf .tools/uv; \
	if python3 -m venv .tools/uv >/dev/null 2>&1; then \
	  .tools/uv/bin/python -m pip install --quiet uv==$(UV_VERSION); \
	elif rm -rf .tools/uv; python3 -m pip --version >/dev/null 2>&1; then \
	  python3 -m pip install --quiet --target .tools/uv uv==$(UV_VERSION); \
	else \
	  echo "make: python3 has neither venv nor pip; install python3-venv (or uv itself) and run make again" >&2; exit 2; \
	fi

$(MINIO):
	@go version >/dev/null 2>&1 || { echo "make: building MinIO needs Go 1.24 or newer on PATH; the tests use Swift without it" >&2; exit 2; }
	@echo "building MinIO $(MINIO_VERSION): about 6 minutes on 2 cores the first time" >&2
	@mkdir -p $(@D)
	@GOBIN=$(CURDIR)/$(@D) go install github.com/minio/minio@$(MINIO_VERSION)

# One package at a time: the compiler takes 2 GiB for some of them.
.tools/bin/kube-apiserver: tests/kube/go.mod
	@echo "building kube-apiserver: about 20 minutes on 2 cores the first time" >&2
	@cd tests/kube && go build -p 1 -trimpath -ldflags '$(KUBE_LDFLAGS)' -o $(CURDIR)/$@ k8s.io/kubernetes/cmd/kube-apiserver

.tools/bin/etcd: tests/kube/go.mod
	@cd tests/kube && go build -trimpath -ldflags '-s -w' -o $(CURDIR)/$@ go.etcd.io/etcd/server/v3

# Objects of others cannot be checked without their definitions.
DEFINED = @mkdir -p $@; found=$$(cd $@ && GOFLAGS=-mod=mod go mod download -json $(1) | sed -n 's/.*"Dir": "\(.*\)".*/\1/p'); \
	install -m 644 $(addprefix "$$found"/,$(2)) $@/

.tools/crds/kueue:
	$(call DEFINED,sigs.k8s.io/kueue@$(KUEUE_VERSION),config/components/crd/bases/*.yaml)

.tools/crds/prometheus-operator:
	$(call DEFINED,github.com/prometheus-operator/prometheus-operator@$(OPERATOR_VERSION),$(foreach kind,servicemonitors prometheusrules,example/prometheus-operator-crd/monitoring.coreos.com_$(kind).yaml))

# Types of dashboards and of the panels that we use, as JSON Schema.
.tools/grafana: tests/monitoring/grafana/package-lock.json
	@rm -rf $@ && mkdir -p $@.part && cp $(<D)/package.json $< $@.part/ && cd $@.part && npm ci --silent --no-audit --no-fund; \
	types=node_modules/@grafana/schema/dist/types/raw; \
	schema() { npx --no-install ts-json-schema-generator --no-type-check --path "$$1" --type "$$2" --out "$$3.json"; }; \
	schema $$types/dashboard/x/dashboard_types.gen.d.ts Dashboard dashboard; \
	for kind in stat table bargauge timeseries; do schema "$$types/composable/$$kind/panelcfg/x/*.d.ts" Options $$kind; done; \
	schema "$$types/composable/timeseries/panelcfg/x/*.d.ts" FieldConfig timeseries-field
	@mv $@.part $@
