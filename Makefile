# Needs make and Python ≥ 3.11; everything else is installed into .venv by the first command. Run `make` for the list.
SHELL := /bin/sh
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv/bin/python

.PHONY: help env book site serve lab test quick lint record pdf gpu bench address clean

help:
	@echo "make book      read it: environment, installation, site, and a local address that serves it"
	@echo "make site      build the site without serving it (_build/html)"
	@echo "make lab       open the chapters in JupyterLab"
	@echo "make test      everything: pytest, every notebook, the site in a real browser"
	@echo "make quick     the part of it that takes minutes: lints, fast tests"
	@echo "make pdf       one PDF for each chapter (_build/pdf)"
	@echo "make bench     what is timed, against whom"
	@echo "make record CHAPTER=09-scaling-laws   rerun a chapter's whole experiment and store it"
	@echo "make gpu       the tests and benchmarks that need an NVIDIA GPU"
	@echo "make address REPOSITORY=owner/name    for a host: the address from which the notebooks install llmlib on Colab"
	@echo "make clean     remove what was built"

env:
	@if [ -z "$(PYTHON)" ]; then \
	  echo "No Python 3.11 or newer was found. On Debian and Ubuntu: sudo apt install python3 python3-venv; elsewhere: python.org."; \
	  echo "If it has another name, say so: make book PYTHON=/path/to/python3.12"; exit 1; fi
	@$(PYTHON) book/tools/environment.py

book: env
	@$(VENV) book/tools/site.py build serve

site: env
	@$(VENV) book/tools/site.py build

serve: env
	@$(VENV) book/tools/site.py serve

lab: env
	@$(VENV) -m jupyterlab chapters

test: env
	@$(VENV) book/tools/check.py all

quick: env
	@$(VENV) book/tools/check.py quick

lint: env
	@$(VENV) book/tools/check.py lint

gpu: env
	@$(VENV) book/tools/check.py gpu

pdf: env
	@$(VENV) book/tools/site.py build pdf

record: env
	@$(VENV) book/tools/record.py "$(CHAPTER)"

bench: env
	@$(VENV) benchmarks/book.py

address:
	@$(PYTHON) book/tools/address.py "$(REPOSITORY)"

clean:
	rm -rf _build
