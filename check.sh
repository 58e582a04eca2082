#!/bin/sh
# Every check, the same by hand and in CI: format, lint, types, docs, tests, package.
# Usage: ./check.sh [folder with python, ruff, mypy, mkdocs and pytest]
set -eu
cd "$(dirname "$0")"
bin="${1:+$1/}"

echo "== format"
"${bin}ruff" format --check .
echo "== lint"
"${bin}ruff" check .
echo "== types"
# The repository root is the package, and mypy wants a folder of the package's name.
mkdir -p .mypy && ln -sfn .. .mypy/lorsa
MYPYPATH=.mypy "${bin}mypy" -p lorsa
MYPYPATH=.mypy:tests:benchmarks:benchmarks/peers "${bin}mypy" benchmarks/*.py benchmarks/once/*.py \
    benchmarks/peers/*.py docs/*.py
echo "== docs"
NO_MKDOCS_2_WARNING=1 "${bin}mkdocs" build --strict --site-dir .site/html
echo "== tests"
# A process for every core, at most eight; each computes in one thread.
"${bin}python" -m pytest --numprocesses=logical --maxprocesses=8 --dist=worksteal
echo "== package"
"${bin}python" tests/release.py
