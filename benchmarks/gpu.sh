#!/usr/bin/env bash
# Everything that only a GPU can tell, in under ten minutes: tests, what choosing costs, the table, profiles.
#
#   bash benchmarks/gpu.sh OUT              tests, table, what choosing costs, profiles
#   bash benchmarks/gpu.sh OUT variants     the table at 8K without graphs, compiled, and with other attention, instead
#   bash benchmarks/gpu.sh OUT million      a prompt of 1,000,000 tokens, instead
#
# Needs python3 with torch (2.11 or later), safetensors, tokenizers, huggingface-hub and pytest; no network, and nothing
# is installed: the package is found through a link to this checkout. Results go to the folder OUT.
set -uo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
out=${1:?"usage: bash benchmarks/gpu.sh OUT [variants|million]"}
mkdir -p "$out" && out=$(cd "$out" && pwd)
links=$(mktemp -d)
trap 'rm -rf "$links"' EXIT
ln -s "$root" "$links/fastkv"
export PYTHONPATH=$links PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
day=$(date +%F)
failed=0

step() {  # step NAME COMMAND...: run it, keep what it prints, go on whatever comes of it
    local name=$1
    shift
    echo "== $name: $*"
    local started=$SECONDS
    "$@" 2>&1 | tee "$out/$name.txt"
    local status=${PIPESTATUS[0]}
    echo "== $name: exit $status after $((SECONDS - started)) s"
    [ "$status" -eq 0 ] || failed=1
}

cd "$root" || exit 1
latency=(python3 benchmarks/latency.py --model llama-3.1-8b --device cuda)
if [ "${2:-}" = million ]; then
    step "$day-gpu-million" "${latency[@]}" --context 1000000 --policy fastkv --new-tokens 33 --rounds 1 --warm-ups 0 \
        --json "$out/$day-gpu-million.json"
    exit "$failed"
fi
if [ "${2:-}" = variants ]; then
    for variant in "--no-cuda-graph" "--compile" "--attention flash" "--attention cudnn"; do
        # shellcheck disable=SC2086 # the variant is one or two words
        step "$day-gpu-latency${variant// /}" "${latency[@]}" --context 8192 --new-tokens 129 --rounds 3 $variant \
            --json "$out/$day-gpu-latency${variant// /}.json"
    done
    exit "$failed"
fi
nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv
step tests python3 -m pytest -q -p no:cacheprovider tests/gpu
step "$day-gpu-latency" "${latency[@]}" --context 1024 8192 32768 131072 --new-tokens 129 --rounds 3 \
    --json "$out/$day-gpu-latency.json"
step "$day-gpu-selection" python3 benchmarks/selection.py --model llama-3.1-8b --context 8192 32768 131072 --rounds 2
step "$day-gpu-profile-8k" python3 benchmarks/kernels.py --model llama-3.1-8b --context 8192 --policy fastkv
step "$day-gpu-profile-128k" python3 benchmarks/kernels.py --model llama-3.1-8b --context 131072 --policy fastkv
exit "$failed"
