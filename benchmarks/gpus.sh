#!/usr/bin/env bash
# Plans and what became of them on real GPUs: KV cache, memory, seconds of the start, tokens/s.
#
#   benchmarks/gpus.sh MODELS OUT shares|five|explicit|tp|replicas ...
#
# MODELS: the folder that `python -m benchmarks.shapes` made. `vllm-rs` (vLLM's Rust front end and
# load client) must be on the path. `shares` takes one GPU, the others two.
set -uo pipefail
models=$1 out=$2
shift 2
mkdir -p "$out"
logs=$(mktemp -d)
rounds=0 # no two have the same prompts: engines keep what they have seen
engine='{load_format: dummy, max_model_len: 4096}'

registry() { # name port, then the models on standard input
    printf 'server: {port: %s, log_dir: %s/%s}\ndefaults: {max_in_flight: 4096, engine: %s}\nmodels:\n' \
        "$2" "$logs" "$1" "$engine"
    sed 's/^/  /'
}

up() { # name: plan it, start it, and say what it took
    llmserve plan "$out/$1.yaml"
    llmserve up "$out/$1.yaml" > "$out/$1.log" 2>&1 &
    server=$!
    until grep -q Serving "$out/$1.log" || ! kill -0 $server 2> /dev/null; do sleep 0.5; done
    grep -E 'ready|failed|Serving' "$out/$1.log"
    nvidia-smi --query-gpu=index,memory.used --format=csv,noheader
    grep -h 'KV cache size' "$logs/$1"/*/model-*.log | sed 's/.*KV/KV/'
    grep -h 'overhead planned' "$logs/$1"/*/server.log | sed 's/.*model=/model=/'
}

down() {
    kill $server
    wait $server
    echo "exit $?"
}

bench() { # tag port in-flight requests models...
    local tag=$1 port=$2 in_flight=$3 requests=$4 clients=()
    shift 4
    for model in "$@"; do
        vllm-rs bench serve --backend openai-chat --endpoint /v1/chat/completions \
            --base-url "http://127.0.0.1:$port" --model "$model" --tokenizer "$models/llama-1b" \
            --dataset-name random --random-input-len 256 --random-output-len 128 --ignore-eos \
            --num-prompts "$requests" --max-concurrency "$in_flight" --seed $((++rounds)) \
            --percentile-metrics ttft,tpot --metric-percentiles 50,99 --disable-tqdm \
            > "$out/$tag-$model.txt" 2>&1 &
        clients+=($!)
    done
    wait "${clients[@]}"
    for model in "$@"; do
        echo "$tag $model: $(grep -E 'Output token thr|Median TTFT|P99 TTFT|Failed' "$out/$tag-$model.txt" \
            | sed 's/  */ /g' | tr '\n' ';')"
    done
}

shares() { # the first round measures, the others start together
    registry shares 8130 > "$out/shares.yaml" << YAML
a: {model: $models/llama-1b, devices: [0], gpu_memory_utilization: 0.3}
b: {model: $models/llama-8b, devices: [0], gpu_memory_utilization: 0.5}
YAML
    for _ in 1 2 3; do
        up shares
        down
    done
}

five() { # placed by the planner
    registry five 8140 > "$out/five.yaml" << YAML
m8: {model: $models/llama-8b}
m3: {model: $models/llama-3b}
m1a: {model: $models/llama-1b}
m1b: {model: $models/llama-1b}
half: {model: $models/llama-half}
YAML
    up five
    bench five-1 8140 64 640 m8 m3 m1a m1b half
    bench five-2 8140 64 640 m8 m3 m1a m1b half
    down
}

explicit() { # the same five, as somebody might place them
    registry explicit 8141 > "$out/explicit.yaml" << YAML
m8: {model: $models/llama-8b, devices: [0], gpu_memory_utilization: 0.9}
m3: {model: $models/llama-3b, devices: [1], gpu_memory_utilization: 0.36}
m1a: {model: $models/llama-1b, devices: [1], gpu_memory_utilization: 0.2}
m1b: {model: $models/llama-1b, devices: [1], gpu_memory_utilization: 0.2}
half: {model: $models/llama-half, devices: [1], gpu_memory_utilization: 0.14}
YAML
    up explicit
    bench explicit-1 8141 64 640 m8 m3 m1a m1b half
    bench explicit-2 8141 64 640 m8 m3 m1a m1b half
    down
}

tp() { # tensor parallel over two GPUs, and a model beside it on one of them
    registry tp 8142 > "$out/tp.yaml" << YAML
big: {model: $models/llama-8b, devices: [0, 1], tensor_parallel_size: 2, gpu_memory_utilization: 0.5}
small: {model: $models/llama-1b, devices: [1], gpu_memory_utilization: 0.3}
YAML
    up tp
    bench tp 8142 128 1280 big small
    down
}

replicas() {
    for policy in lottery shortest_queue prefix_affinity; do
        registry $policy 8143 > "$out/$policy.yaml" << YAML
m: {model: $models/llama-1b, replicas: 2, dispatch: $policy}
YAML
        up $policy
        bench $policy-1 8143 256 2048 m
        bench $policy-2 8143 256 2048 m
        curl -s localhost:8143/metrics | grep '^llmserve_requests_dispatched_total'
        down
    done
}

for part in "$@"; do
    echo "== $part"
    $part
done
