#!/usr/bin/env bash
# Every figure that the documents give about answers on a GPU, measured in one run on a machine with one GPU (half an hour).
#
#   finetune data prepare benchmarks/answers.yaml                 (before; on any machine)
#   bash benchmarks/answers_on_gpu.sh OUT model seven train small ships endpoint       (or some of these parts, in this order)
#
# model, seven: Mistral-7B's shape with random weights: 1,034 questions through `finetune evaluate` with vllm and with hf.
# train, small: SmolLM2-135M trained on Spider: scored by both generators, greedy, a vote of 8, pass@8 and a retry; each verdict
#        that differs between the generators is explained.
# ships: its exports merged, q8_0 and q4_k_m scored again; the adapter in plain vLLM.
# endpoint: the answers of `finetune serve` compared with those of the evaluation.
# OUT gets one log for each step, with its seconds, and the JSON files. Models go to WORK (/tmp/answers). A step that fails is named
# at the end, and the next one goes on.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?folder to write to}
shift
work=${WORK:-/tmp/answers}
mkdir -p "$out" "$work"
failed=()

step() {  # NAME COMMAND...: its output and seconds go to OUT/NAME.log
  local name=$1 began=$SECONDS code=0
  shift
  "$@" >"$out/$name.log" 2>&1 || code=$?
  echo "$name: $((SECONDS - began)) s, exit code $code" | tee -a "$out/seconds.txt"
  [ "$code" = 0 ] || failed+=("$name")
}

tune() { python3 -m finetune "$@"; }

model() {
  step model python3 -m benchmarks.random_model mistral-7b "$work/mistral-7b" --corpus data/prepared/answers/train.jsonl
}

seven() {
  local run=$work/seven/seven
  step seven-train tune train benchmarks/answers.yaml model.name="$work/mistral-7b" model.max_seq_length=512 \
    quantization.load_in_4bit=true training.output_dir="$work/seven" training.run_name=seven training.max_steps=2 \
    training.gradient_checkpointing=true
  for generator in vllm hf; do
    rm -rf "$work/seven/base" "$run/eval"
    step "seven-$generator" tune evaluate "$run" evaluation.generator=$generator evaluation.split=val \
      evaluation.max_questions=1034 evaluation.max_new_tokens=64 evaluation.batch_size=16
    cp "$run/eval.json" "$out/seven-$generator.json"
  done
}

train() {
  step train tune train benchmarks/answers.yaml training.output_dir="$work/small"
}

small() {
  local run=$work/small/answers
  cp -r "$work/small" "$work/with-hf"
  step small-hf tune evaluate "$work/with-hf/answers" evaluation.generator=hf
  cp "$work/with-hf/answers/eval.json" "$out/small-hf.json"
  step small-vllm tune evaluate "$run" evaluation.generator=vllm evaluation.samples=8 evaluation.retries=1
  cp "$run/eval.json" "$out/small-vllm.json"
  step small-agreement python3 -m benchmarks.generation_agreement "$work/with-hf/answers" "$run"
}

ships() {
  local run=$work/small/answers
  step ships-merged tune export "$run" --to merged --accept-loss
  step ships-adapter tune export "$run" --to adapter --no-score
  step ships-vllm-lora python3 -m benchmarks.vllm_lora "$run" "$run/exports/adapter"
  step ships-gguf tune export "$run" --to gguf --accept-loss
}

endpoint() {
  local run=$work/small/answers server
  python3 -m finetune serve "$run" --backend vllm --port 8123 --max-hours 0.3 >"$out/serve.log" 2>&1 &
  server=$!
  until grep -q "ready after" "$out/serve.log" || ! kill -0 $server 2>/dev/null; do sleep 1; done
  step endpoint python3 -m benchmarks.endpoint "$run" http://127.0.0.1:8123
  kill $server && wait $server
}

for part in "$@"; do
  case $part in
    model | seven | train | small | ships | endpoint) "$part" ;;
    *) echo "answers_on_gpu.sh: no part is called $part; expected model, seven, train, small, ships or endpoint" >&2; exit 2 ;;
  esac
done
[ "${#failed[@]}" = 0 ] || { echo "failed: ${failed[*]}; their logs are in $out"; exit 1; }
