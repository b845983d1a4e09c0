#!/usr/bin/env bash
# Tests the wheel of build/dist on every Python from 3.11 to 3.14 that is here, with the newest and the lowest allowed
# version of every dependency, and prints what passed. Fails if a row fails, or if there is none.
# Usage: scripts/test-versions.sh [FOLDER OF python] ; PYTHONS="3.12 3.13" tests fewer
set -euo pipefail
cd "$(dirname "$0")/.."
checkout=$PWD
bin=$(cd "${1:-.venv/bin}" && pwd)
wheel=$(ls "$checkout"/build/dist/*.whl)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The lower bound of each dependency of the wheel, with the extra `serve`, as pip's constraints.
"$bin/python" - "$wheel" >"$work/lowest" <<'PROGRAM'
import sys, zipfile
from email import message_from_bytes
from packaging.requirements import Requirement

with zipfile.ZipFile(sys.argv[1]) as wheel:
    (name,) = (n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    metadata = message_from_bytes(wheel.read(name))
for text in metadata.get_all("Requires-Dist"):
    requirement = Requirement(text)
    lower = [s.version for s in requirement.specifier if s.operator == ">="]
    if lower and (requirement.marker is None or requirement.marker.evaluate({"extra": "serve"})):
        print(f"{requirement.name}=={lower[0]}")
PROGRAM

# pyenv's shims are there for versions that are not chosen, too, and do not run.
find_python() {
    for python in "$(command -v "python$1")" "${PYENV_ROOT:-$HOME/.pyenv}"/versions/"$1".*/bin/python; do
        ! "$python" --version >/dev/null 2>&1 || { echo "$python"; return; }
    done
    return 1
}

cp -r tests/wheel "$work/tests"
printf '[pytest]\nfilterwarnings = error\n' >"$work/pytest.ini"
rows=0 failed=0
for version in ${PYTHONS:-3.11 3.12 3.13 3.14}; do
    if ! python=$(find_python "$version"); then
        printf 'python %s: not here\n' "$version"
        continue
    fi
    for versions in newest lowest; do
        venv=$work/$version-$versions
        constraints=()
        [[ $versions == newest ]] || constraints=(--constraint "$work/lowest")
        outcome=passed
        if ! { "$python" -m venv --without-pip "$venv" &&
            "$bin/python" -m pip --python "$venv/bin/python" install --quiet --upgrade "${constraints[@]}" "$wheel" pytest &&
            (cd "$work" && "$venv/bin/python" -m pytest --quiet --config-file=pytest.ini --zoo="$checkout/fixtures/zoo" tests) &&
            "$bin/python" -m pip --python "$venv/bin/python" install --quiet "${constraints[@]}" "$wheel[serve]" &&
            (cd "$work" && "$venv/bin/python" -c "import furiosa_llm.server.app"); } \
            >"$venv.log" 2>&1; then
            outcome=FAILED failed=$((failed + 1))
            tail -n 40 "$venv.log" >&2
        fi
        rows=$((rows + 1))
        printf 'python %s, %s dependencies: %s\n' "$version" "$versions" "$outcome"
        rm -rf "$venv"
    done
done
[[ $rows -gt 0 && $failed -eq 0 ]]
