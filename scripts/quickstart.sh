#!/usr/bin/env bash
# Follows docs/quickstart.md in an empty folder and a fresh environment, with the wheels of build/wheels and no index,
# as the image of the Dockerfile has them.
# Usage: scripts/quickstart.sh [FOLDER OF python]
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
bin=$(cd "${1:-.venv/bin}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$bin/python" -m venv --without-pip "$work/venv"
"$bin/python" -m pip --python "$work/venv/bin/python" install --quiet --no-index --find-links "$checkout/build/wheels" pip
sed -n '/^```sh$/,/^```$/{/^```/d;p}' docs/quickstart.md >"$work/commands"
mkdir "$work/empty"
cd "$work/empty"
PATH=$work/venv/bin:$PATH PIP_NO_INDEX=1 PIP_FIND_LINKS=$checkout/build/wheels bash -euo pipefail ../commands | tee ../output
tail -n 1 ../output | grep -F "The capital of France is Paris."
