#!/usr/bin/env bash
# Builds the sdist, the wheel from the sdist, and tests the wheel in a fresh environment outside the checkout.
# Usage: scripts/test-wheel.sh [FOLDER OF python AND pyproject-build]
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
bin=$(cd "${1:-.venv/bin}" && pwd)

rm -rf build/dist
"$bin/pyproject-build" --quiet --outdir build/dist

outside=$(mktemp -d)
trap 'rm -rf "$outside"' EXIT
"$bin/python" -m venv --without-pip "$outside/venv"
"$bin/python" -m pip --python "$outside/venv/bin/python" install --quiet "$checkout"/build/dist/*.whl pytest

# A copy and a configuration of its own, because the checkout's puts the checkout on sys.path.
cp -r tests/wheel "$outside/tests"
cd "$outside"
printf '[pytest]\nfilterwarnings = error\n' >pytest.ini
venv/bin/python -m pytest --config-file=pytest.ini --zoo="$checkout/fixtures/zoo" tests
