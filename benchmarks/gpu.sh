#!/usr/bin/env bash
# Front ends on the same engine on a GPU, one after the other, under vLLM's own load client.
#
#   benchmarks/gpu.sh MODEL OUT [FRONT...]      FRONT: ours rust stock (without: all three)
#
# MODEL is a folder; made-up weights do (LOAD_FORMAT=dummy, the default). Needs vllm and vllm-rs
# of vLLM 0.32 in PATH. IN_FLIGHT, ROUNDS and UTILIZATION can be set.
set -euo pipefail
model=$1 out=$2
shift 2
fronts=("$@")
[ ${#fronts[@]} -gt 0 ] || fronts=(ours rust stock)
port=8123
mkdir -p "$out"
cat > "$out/models.yaml" <<YAML
server: {port: $port}
models:
  m:
    model: $model
    gpu_memory_utilization: ${UTILIZATION:-0.85}
    max_in_flight: 4096
    engine: {load_format: ${LOAD_FORMAT:-dummy}, max_model_len: 4096}
YAML

start() { # FRONT: the command line of a server
    local engine=(--served-model-name m --load-format "${LOAD_FORMAT:-dummy}" --max-model-len 4096
        --gpu-memory-utilization "${UTILIZATION:-0.85}" --port $port)
    case $1 in
        ours) exec llmserve up "$out/models.yaml" ;;
        rust) VLLM_USE_RUST_FRONTEND=1 exec vllm serve "$model" "${engine[@]}" ;;
        stock) exec vllm serve "$model" "${engine[@]}" --disable-uvicorn-access-log ;;
    esac
}

load() { # FRONT ROUND
    for count in ${IN_FLIGHT:-16 256 512}; do
        local log="$out/$1-$2-$count.txt"
        vllm-rs bench serve --backend openai-chat --endpoint /v1/chat/completions \
            --base-url "http://127.0.0.1:$port" --model m --tokenizer "$model" \
            --dataset-name random --random-input-len 256 --random-output-len 128 \
            --num-prompts $((count * 8)) --max-concurrency "$count" --ignore-eos \
            --percentile-metrics ttft,tpot,itl,e2el --metric-percentiles 50,99 --disable-tqdm \
            > "$log" 2>&1 || true
        figures "$1" "$2" "$count" "$log"
    done
}

figures() { # FRONT ROUND IN-FLIGHT LOG: one line
    awk -v who="$1 round $2 in flight $3" '
        /Output token throughput/ { line = line "  tok/s " $NF }
        /Median TTFT/ { line = line "  TTFT p50 " $NF }
        /P99 TTFT/ { line = line " p99 " $NF }
        /Median TPOT/ { line = line "  TPOT p50 " $NF }
        /Median ITL/ { line = line "  ITL p50 " $NF }
        /P99 ITL/ { line = line " p99 " $NF }
        /Failed requests/ { line = line "  failed " $NF }
        END { print who line }' "$4"
}

await() { # PID LOG: until the model answers
    for _ in $(seq 600); do
        curl -sf "http://127.0.0.1:$port/v1/chat/completions" -H 'content-type: application/json' \
            -d '{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":1}' > /dev/null && return
        kill -0 "$1" || { tail -20 "$2"; return 1; }
        sleep 0.5
    done
    return 1
}

for front in "${fronts[@]}"; do
    started=$SECONDS
    start "$front" > "$out/$front.log" 2>&1 &
    pid=$!
    trap 'kill $pid 2> /dev/null || true' EXIT
    await $pid "$out/$front.log"
    echo "$front ready after $((SECONDS - started)) s"
    for round in $(seq "${ROUNDS:-2}"); do load "$front" "$round"; done
    kill $pid
    wait $pid || true
    # A server that was ended leaves nothing on the GPU before the next one starts.
    for _ in $(seq 60); do [ -z "$(nvidia-smi --query-compute-apps=pid --format=csv,noheader)" ] && break; sleep 0.5; done
done
