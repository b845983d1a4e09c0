#!/usr/bin/env bash
# The tests marked `kernels` on the kernels that onnxruntime has for other processors, which Debian's qemu-user emulates:
# one with AVX2, one with SSE alone. They run natively first, which also builds the artifacts that the emulated ones read.
# usage: scripts/test-kernels.sh BIN [FILE...]   (all files with such tests, unless some are named)
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$1
files=("${@:2}")
logs=build/kernels

if [ "$(uname -m)" != x86_64 ]; then
    echo "test-kernels: needs an x86-64 machine, whose Python runs under qemu-x86_64; this one is $(uname -m)" >&2
    exit 1
fi
if ! command -v qemu-x86_64 >/dev/null; then
    echo "qemu-x86_64 is missing: installing Debian's qemu-user"
    { apt-get update --quiet && DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends qemu-user; } ||
        { echo "qemu-user could not be installed; as root: apt-get install -y qemu-user" >&2; exit 1; }
fi

declare -A processors=(
    [avx2]=Haswell,-pcid,-x2apic,-tsc-deadline,-hle,-invpcid,-rtm # without what qemu warns that it does not emulate
    [sse]=Nehalem
)
export PYTHONDONTWRITEBYTECODE= # compiling is what takes longest under emulation
if [ "${#files[@]}" = 0 ]; then
    mapfile -t files < <(grep --recursive --files-with-matches --include='test_*.py' '^pytestmark = pytest\.mark\.kernels' tests | sort)
fi
# Prompts of hundreds of tokens take minutes: qemu computes six million fused multiply-adds a second.
pytest=(-m pytest -m "kernels and not slow and not real_model" -k "not outgrow and not old_buffers" "${files[@]}")

mkdir -p "$logs"
"$bin/python" "${pytest[@]}" --numprocesses auto --dist worksteal --quiet

# One process each: the workers of pytest-xdist would leave the emulation, and tests/conftest.py would refuse to run them.
declare -A running=()
trap 'kill "${running[@]}" 2>/dev/null || true' EXIT
for kernels in "${!processors[@]}"; do
    echo "$kernels: qemu-x86_64 -cpu ${processors[$kernels]}, some minutes; its log is $logs/$kernels.log"
    EXPECTED_KERNELS=$kernels qemu-x86_64 -cpu "${processors[$kernels]}" "$bin/python" "${pytest[@]}" --numprocesses 0 \
        >"$logs/$kernels.log" 2>&1 &
    running[$kernels]=$!
done
failed=0
for kernels in "${!running[@]}"; do
    wait "${running[$kernels]}" || { failed=1 && sed -n '/^=* \(FAILURES\|ERRORS\)\|^ERROR/,$p' "$logs/$kernels.log"; }
    echo "$kernels: $(tail -n 1 "$logs/$kernels.log")"
done
exit "$failed"
