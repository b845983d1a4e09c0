#!/usr/bin/env bash
# Splits SmolLM2 over 4, then 8 simulated PEs, asks each a question, and fails unless both answer it.
# Usage: scripts/demo.sh [FOLDER OF python AND furiosa-llm]
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${1:-.venv/bin}

question="What is the capital of France?"
answer="The capital of France is Paris."

model=$("$bin/furiosa-llm" example-model)
mkdir -p build/demo

for tp in 4 8; do
    artifact=build/demo/smollm2-tp$tp.artifact
    printf '\n== tensor_parallel_size %d\n' "$tp"
    "$bin/furiosa-llm" build --force -tp "$tp" "$model/model.onnx" "$artifact"
    printf '\n> %s\n' "$question"
    # The text comes on standard output as it is generated: shown here and kept.
    "$bin/furiosa-llm" generate "$artifact" --prompt "$question" --chat --max-tokens 32 | tee "build/demo/tp$tp.txt"
    if [[ "$(<"build/demo/tp$tp.txt")" != *"$answer" ]]; then
        printf '\ndemo: tp %d did not answer "%s"\n' "$tp" "$answer" >&2
        exit 1
    fi
done
