#!/usr/bin/env bash
# All GPU benchmarks, by one command: the gate, then timings, the most telling ones first.
#
#   benchmarks/run_gpu.sh [--budget SECONDS] [--steps LIST] [--continue FOLDER] [--quick]
#
# --budget    for everything together, 560 by default; what a step leaves goes to the next ones.
# --steps     of: gate,layer,ep,engine,tune,tuned,tiles (by default all, in this order).
# --continue  go on with the CSV files of an earlier run, from the same kind of device.
# --quick     tiny sizes; under Triton's interpreter where there is no GPU.
#
# CSV, plots, tuned configurations and logs go to $OUT, or to benchmarks/results. Rows are written
# as they are measured, so whatever ends a run leaves what was measured until then. Exit status: 1
# if a gate failed or a step broke. vLLM, as opponent and engine, is used if Python can import it.
set -uo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
budget=560
steps=gate,layer,ep,engine,tune,tuned,tiles
earlier=
quick=()
while (($#)); do
  case "$1" in
    --budget) budget="$2"; shift 2 ;;
    --steps) steps="$2"; shift 2 ;;
    --continue) earlier="$2"; shift 2 ;;
    --quick) quick=(--quick); shift ;;
    *) sed -n '2,15s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2 ;;
  esac
done

out="${OUT:-$root/benchmarks/results}"
mkdir -p "$out"
export OUT="$out"
export PYTHONPATH="$root:$root/kernels${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
python="${PYTHON:-python3}"
interpret=()
if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  ((${#quick[@]})) || { echo "run_gpu: torch finds no CUDA device; --quick runs without" >&2; exit 1; }
  interpret=(--interpret)
fi
if [[ -n "$earlier" ]]; then
  cp -r -n "$earlier"/. "$out"/
  first="$(ls "$out" | grep -m1 -oE '^[0-9]{4}-[0-9]{2}-[0-9]{2}')" || true
  [[ -n "$first" ]] && export BENCH_DATE="$first"
fi

# Shares of the budget, in seconds of 560. A step gets its share of what is left.
declare -A share=([gate]=60 [layer]=180 [ep]=60 [engine]=150 [tune]=60 [tuned]=30 [tiles]=20)
start=$SECONDS
status=0
IFS=, read -ra wanted <<<"$steps"
for step in "${wanted[@]}"; do
  [[ -n "${share[$step]:-}" ]] || { echo "run_gpu: no step '$step' in ${!share[*]}" >&2; exit 2; }
done

run() { # run STEP SECONDS COMMAND...: its output to the log, too; 124 if it had to be ended
  local step="$1" seconds="$2"
  shift 2
  timeout -k 10 "$((seconds + 15))" "$@" 2>&1 | tee "$out/$step.log"
  return "${PIPESTATUS[0]}"
}

for index in "${!wanted[@]}"; do
  step="${wanted[$index]}"
  sum=0
  for later in "${wanted[@]:$index}"; do sum=$((sum + share[$later])); done
  left=$((budget - (SECONDS - start)))
  seconds=$((left * share[$step] / sum))
  if ((seconds < 5)); then
    echo "== $step: no time left"
    continue
  fi
  echo "== $step: up to $seconds s"
  options=("${quick[@]}" --budget "$seconds")
  bench="$root/benchmarks"
  case "$step" in
    gate)
      run gate "$seconds" "$python" -m pytest -q -x -p no:cacheprovider \
        "$root/tests/kernels/test_routing.py" "$root/tests/kernels/test_experts.py" ;;
    layer)
      run layer "$seconds" "$python" "$bench/bench_moe_layer.py" "${options[@]}" "${interpret[@]}" ;;
    ep)
      run ep "$seconds" "$python" "$bench/emulate_ep.py" "${options[@]}" "${interpret[@]}" \
        --shapes mixtral-8x7b olmoe deepseek-v2-lite qwen1.5-moe ;;
    engine)
      if ! "$python" -c 'import vllm' 2>/dev/null; then
        echo "skipped: vLLM can't be imported"
        continue
      fi
      run engine "$seconds" "$python" "$bench/bench_engine.py" "${options[@]}" --layers 8 ;;
    tune)
      run tune "$seconds" "$python" "$bench/tune_experts.py" "${options[@]}" "${interpret[@]}" ;;
    tuned)
      CAPMOE_TUNED_CONFIG_FOLDER="$out/configs" run tuned "$seconds" \
        "$python" "$bench/bench_moe_layer.py" "${options[@]}" "${interpret[@]}" --label tuned ;;
    tiles)
      run tiles "$seconds" "$python" "$bench/bench_moe_layer.py" --round-capacity \
        "${options[@]}" "${interpret[@]}" --tokens 1024 4096 8192 ;;
  esac
  code=$?
  if ((code == 124 || code == 137)); then
    echo "== $step: ended after its time; what it wrote stays"
  elif ((code)); then
    status=1
    echo "== $step: exit status $code"
    if [[ "$step" == gate ]]; then
      echo "== no timings without a green gate"
      break
    fi
  fi
done
echo "== results in $out:"
ls "$out"
exit "$status"
