# What CI does (.ci/run), step by step. Each line works without make, too.
.PHONY: setup lint format test slow coverage docs serve check constraints

setup: ## a virtual environment with the versions of CI
	python3 -m venv .venv
	.venv/bin/pip install -e ".[dev]" -c constraints.txt
	@echo 'Now: . .venv/bin/activate'

lint:
	ruff check .
	ruff format --check .
	mypy
	lint-imports
	codespell

format:
	ruff check --fix .
	ruff format .

test:
	pytest -q

slow: ## proofs that take minutes
	pytest -q -m slow

coverage: ## the suite, with the lines that no test reaches
	pytest -q --cov --cov-report=term-missing:skip-covered

docs:
	mkdocs build --strict

serve: ## the site at http://localhost:8000, built anew on every change
	mkdocs serve

check:
	bash .ci/run

constraints: ## pin what is installed now
	pip freeze --exclude-editable | sed 's/+cpu$$//' > constraints.txt
