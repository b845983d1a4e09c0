#!/usr/bin/env bash
# Runs a command, at full speed, on the kernels that onnxruntime and numpy have for other x86-64 processors than this one.
# usage: scripts/with-kernels.sh avx2|sse COMMAND [ARG...]
# Exit status 75: this processor or kernel cannot hide instruction sets; `make test-kernels` emulates instead.
set -euo pipefail
case "${1-}" in avx2 | sse) ;; *) echo "usage: $0 avx2|sse COMMAND [ARG...]" >&2 && exit 2 ;; esac
folder=$(cd "$(dirname "$0")/.." && pwd)/build/kernels
library=$folder/mask_cpuid.so
if [ ! -e "$library" ] || [ "$(dirname "$0")/mask_cpuid.c" -nt "$library" ]; then
    mkdir -p "$folder"
    made=$(mktemp "$folder/XXXXXX.so")
    gcc -O2 -Wall -Wextra -shared -fPIC -o "$made" "$(dirname "$0")/mask_cpuid.c" -ldl
    mv "$made" "$library" # whole or not there, if several begin at once
fi
export MASK_CPUID=$1 EXPECTED_KERNELS=$1 LD_PRELOAD="$library${LD_PRELOAD:+:$LD_PRELOAD}"
shift
exec "$@"
