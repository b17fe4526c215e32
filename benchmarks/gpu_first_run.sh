#!/usr/bin/env bash
# The first run on a GPU: what may fail comes first, the figures last. Each line has a time limit
# and goes to a file of its own, so that an end after ten minutes still leaves the earlier ones.
#
#   benchmarks/gpu_first_run.sh [FOLDER]      needs this repository, torch for CUDA and pytest
set -u
cd "$(dirname "$0")/.."
out=${1:-${OUT:-gpu-first-run}}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
failed=()

# step NAME SECONDS COMMAND...: runs a command, shows and keeps its output, and notes a failure.
step() {
  local name=$1 limit=$2
  shift 2
  echo "== $name: $*"
  timeout "$limit" "$@" 2>&1 | tee "$out/$name.txt"
  local status=${PIPESTATUS[0]}
  [ "$status" -eq 0 ] || failed+=("$name ($status)")
}

tests() { # NAME SECONDS PYTEST-ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -m pytest -m gpu tests/test_gpu.py -p no:cacheprovider -q "$@"
}

bench() { # NAME SECONDS ARGUMENTS...
  local name=$1 limit=$2
  shift 2
  step "$name" "$limit" "$python" -m medusa_chat.cli bench --device cuda --json "$out/$name.json" "$@"
}

step machine 30 nvidia-smi
step compiler 5 sh -c 'command -v "${CC:-gcc}" || command -v clang'
step doctor 60 "$python" -m medusa_chat.cli doctor
step attention 60 "$python" benchmarks/gpu_facts.py attention
tests kernel 90 -x -k "(kernel_is_its_twin and 128-torch.bfloat16) or rule_takes"
tests layers 60 -x -k "operations_of_layers"
tests captured 60 -x -k "captured_steps_say and chain"
tests recorded 60 -k "after_one_reply or (with_the_kernel and llama)"
tests as_cpu 60 -k "gpu_says"
step profile 90 "$python" benchmarks/gpu_facts.py profile bundled vicuna-7b:nf4
bench nf4 120 --shape vicuna-7b:nf4 --context 512
bench bf16 120 --shape vicuna-7b --context 512
tests models 90 -k "random_models and (llama or gemma2)"
tests refused 60 -k "cannot_be_recorded" # last: it breaks a recording on purpose

echo
if [ "${#failed[@]}" -gt 0 ]; then
  echo "failed: ${failed[*]}; the output of each is in $out/"
  echo "If a recording failed, try --eager, then MEDUSA_CHAT_ATTENTION=torch and MEDUSA_CHAT_LAYERS=plain."
  exit 1
fi
echo "all passed; figures are in $out/"
