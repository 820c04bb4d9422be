#!/usr/bin/env bash
# All GPU benchmarks, by one command: the gate, then timings, the most telling ones first.
#
#   benchmarks/run_gpu.sh [--budget SECONDS] [--steps LIST] [--continue FOLDER] [--quick]
#
# --budget    for everything together, 560 by default; what a step leaves goes to the next ones.
# --steps     of: gate,float32,layer,ep,engine,tune,tuned,tiles,sanitize (by default all, in this
#             order).
# --continue  go on with the results of an earlier run, from the same kind of device: the folder
#             with its results.tgz, or with what was in it. A results.tgz in OUT is continued.
# --quick     tiny sizes, few tests; under Triton's interpreter where there is no GPU.
#
# Environment: OUT, the folder for results (benchmarks/results); PYTHON; VLLM_SITE, a folder with a
# vLLM that is not installed, put on PYTHONPATH; REVISION, for the CSV files where git isn't there.
#
# Two files are left in OUT, after every step and however the run ends: results.tgz (CSV, plots,
# tuned configurations, logs) and summary.txt. Rows are written as they are measured. Exit status:
# 1 if the gate was not green within its time (then nothing is measured), or a step broke.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
budget=560
steps=gate,float32,layer,ep,engine,tune,tuned,tiles,sanitize
earlier=
quick=()
while (($#)); do
  case "$1" in
    --budget) budget="$2"; shift 2 ;;
    --steps) steps="$2"; shift 2 ;;
    --continue) earlier="$2"; shift 2 ;;
    --quick) quick=(--quick); shift ;;
    *) sed -n '2,19s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
done

# Shares of the budget: a step gets its share of what is left. The gate compiles about 700 kernels.
declare -A share=([gate]=600 [float32]=30 [layer]=180 [ep]=60 [engine]=150 [tune]=60 [tuned]=30
  [tiles]=20 [sanitize]=40)
IFS=, read -ra wanted <<<"$steps"
for step in "${wanted[@]}"; do
  [[ -n "${share[$step]:-}" ]] || { echo "run_gpu: no step '$step' in ${!share[*]}" >&2; exit 2; }
done

result="${OUT:-$root/benchmarks/results}"
mkdir -p "$result"
result="$(cd "$result" && pwd)"
out="$(mktemp -d)" # what the steps write; packed into $result
[[ -z "$earlier" && -f "$result/results.tgz" ]] && earlier="$result" # else it would be lost
if [[ -n "$earlier" ]]; then
  if [[ -f "$earlier/results.tgz" ]]; then
    tar -xzf "$earlier/results.tgz" -C "$out" --exclude='./*.log' --exclude=./steps.txt ||
      exit 1
  else
    cp -r -n "$earlier"/. "$out"/ || exit 1
  fi
  first="$(ls "$out" | grep -m1 -oE '^[0-9]{4}-[0-9]{2}-[0-9]{2}')" || true
  [[ -n "$first" ]] && export BENCH_DATE="$first"
fi
export OUT="$out"
export PYTHONPATH="$root:$root/kernels:$root/tests/helpers${VLLM_SITE:+:$VLLM_SITE}${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
bench="$root/benchmarks"
start=$SECONDS
status=0
child=

say() {
  echo "$*"
  echo "$*" >>"$out/steps.txt"
}

pack() { # $out as results.tgz, its words as summary.txt
  {
    cat "$out/steps.txt"
    grep -hE '^(PASS|FAIL|WAITS) |^GATE: |^opponent .* not measured' "$out"/*.log
  } >"$result/summary.txt" 2>/dev/null
  tar -czf "$result/results.tgz.part" -C "$out" . &&
    mv "$result/results.tgz.part" "$result/results.tgz"
}

trap 'pack; rm -rf "$out"' EXIT
trap 'say "== ended from outside"; [[ -n "$child" ]] && kill "$child"; exit 143' TERM INT HUP

run() { # run STEP SECONDS COMMAND...: its output to the log, too; 124 if it had to be ended
  local step="$1" seconds="$2" log tee code
  shift 2
  exec {log}> >(tee "$out/$step.log")
  tee=$!
  timeout -k 10 "$((seconds + 15))" "$@" >&"$log" 2>&1 &
  child=$! # in the background, so that a signal is answered at once
  wait "$child"
  code=$?
  child=
  exec {log}>&-
  wait "$tee"
  return "$code"
}

say "run_gpu: $(date -u +%FT%TZ), steps $steps, $budget s"
interpret=()
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  ((${#quick[@]})) || { say "run_gpu: torch finds no CUDA device; --quick runs without"; exit 1; }
  interpret=(--interpret)
fi
has_vllm=1
if ! "$python" -c 'import vllm; from vllm import _custom_ops' >"$out/vllm-import.log" 2>&1; then
  has_vllm=
  say "######## vLLM CAN'T BE IMPORTED: $(tail -n 1 "$out/vllm-import.log")"
  say "######## The vllm columns stay empty, and so does the engine step. VLLM_SITE=FOLDER names a"
  say "######## folder with vLLM (see benchmarks/README.md)."
fi

# Neither this repository's pytest configuration nor its plugins: a bare pytest will do.
tests=("$python" -m pytest -c /dev/null --rootdir "$root" --import-mode=importlib
  -p no:cacheprovider -q -W ignore::pytest.PytestUnknownMarkWarning)
routing="$root/tests/kernels/test_routing.py"
experts="$root/tests/kernels/test_experts.py"
seats="$root/tests/kernels/test_seats.py"
# No benchmark is in float32: its tests are reported, and no gate. dtype2: how pytest names it there.
float32="test_dtypes and (dtype2 or float32)"
few=( # for the memory checker, and for --quick
  "$routing::test_random_cases_with_the_shipped_launch[0]"
  "$routing::test_random_cases_with_the_shipped_launch[1]"
  "$routing::test_sizes[130-60-4-config5]"
  "$routing::test_views_of_larger_tensors[shipped-dtype1]"
  "$routing::test_ids_out_of_range_stay_inside[shipped]"
  "$experts::test_dtypes[True-descriptors-dtype0]"
  "$experts::test_odd_sizes[pointers-7-3-4-33-17]"
  "$experts::test_lopsided_routing[one-row-swapped]"
  "$experts::test_lopsided_routing[all-to-one-descriptors]"
  "$experts::test_configuration_by_heuristics"
  "$seats::test_random_cases[shipped-0]"
)

for index in "${!wanted[@]}"; do
  step="${wanted[$index]}"
  sum=0
  for later in "${wanted[@]:$index}"; do sum=$((sum + share[$later])); done
  left=$((budget - (SECONDS - start)))
  seconds=$((left * share[$step] / sum))
  if ((seconds < 5)); then
    say "== $step: no time left"
    [[ "$step" == gate ]] && exit 1
    continue
  fi
  say "== $step: up to $seconds s"
  options=("${quick[@]}" --budget "$seconds")
  began=$SECONDS
  case "$step" in
    gate)
      which=("$routing" "$seats" "$experts")
      ((${#quick[@]})) && which=("${few[@]}")
      parallel=()
      "$python" -c 'import xdist' 2>/dev/null && ((!${#quick[@]})) && parallel=(-n 8)
      run gate "$seconds" "${tests[@]}" -x "${parallel[@]}" -k "not ($float32)" "${which[@]}" ;;
    float32)
      run float32 "$seconds" "${tests[@]}" -k "$float32" "$experts" ;;
    layer)
      run layer "$seconds" "$python" "$bench/bench_moe_layer.py" "${options[@]}" "${interpret[@]}" ;;
    ep)
      run ep "$seconds" "$python" "$bench/emulate_ep.py" "${options[@]}" "${interpret[@]}" \
        --shapes mixtral-8x7b olmoe deepseek-v2-lite qwen1.5-moe ;;
    engine)
      [[ -n "$has_vllm" ]] || { say "== engine: SKIPPED, vLLM can't be imported"; continue; }
      run engine "$seconds" "$python" "$bench/bench_engine.py" "${options[@]}" --layers 8 ;;
    tune)
      run tune "$seconds" "$python" "$bench/tune_experts.py" "${options[@]}" "${interpret[@]}" ;;
    tuned)
      CAPMOE_TUNED_CONFIG_FOLDER="$out/configs" run tuned "$seconds" \
        "$python" "$bench/bench_moe_layer.py" "${options[@]}" "${interpret[@]}" --label tuned ;;
    tiles)
      run tiles "$seconds" "$python" "$bench/bench_moe_layer.py" --round-capacity \
        "${options[@]}" "${interpret[@]}" --tokens 1024 4096 8192 ;;
    sanitize)
      checker="$(PATH="$PATH:/usr/local/cuda/bin" command -v compute-sanitizer)"
      if [[ -z "$checker" ]] || ((${#interpret[@]})); then
        say "== sanitize: SKIPPED, no compute-sanitizer or no GPU"
        continue
      fi
      PYTORCH_NO_CUDA_MEMORY_CACHING=1 run sanitize "$seconds" "$checker" --tool memcheck \
        --target-processes application-only --error-exitcode 9 "${tests[@]}" "${few[@]}" ;;
  esac
  code=$?
  took=$((SECONDS - began))
  if ((code == 0)); then
    say "== $step: done in $took s"
  elif [[ "$step" == gate ]]; then
    say "== gate: NOT GREEN (exit status $code after $took s; 124: out of time), so no timings"
    say "   Out of time? Give it a larger --budget, or install pytest-xdist. No pytest? Install it."
    exit 1
  elif ((code == 124 || code == 137)); then
    say "== $step: ended after its time; what it wrote stays"
  elif [[ "$step" == float32 ]]; then
    say "== float32: exit status $code; no benchmark is in float32, so the others go on"
  else
    status=1
    say "== $step: exit status $code"
  fi
  pack
done
say "== results in $result: results.tgz, summary.txt"
exit "$status"
