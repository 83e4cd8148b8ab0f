"""FastChat's option names and what became of them.

The names are those of `fastchat.serve.vllm_worker`, `.controller` and
`.openai_api_server`; a registry that uses one is told its successor.
"""

from __future__ import annotations

_GONE = "is gone: one process serves every model, there is nothing to register"
_V1 = "is gone: vLLM's engine core is always a process of its own"

SUCCESSORS: dict[str, str] = {
    "worker_address": _GONE,
    "controller_address": _GONE,
    "controller": _GONE,
    "no_register": _GONE,
    "dispatch_method": "is `dispatch` here, of a model with `replicas`",
    "model_path": "is `model` here",
    "model_names": "is the entry's key and its `aliases` here",
    "served_model_name": "is the entry's key and its `aliases` here",
    "limit_worker_concurrency": "is `max_in_flight` here",
    "num_gpus": "is `tensor_parallel_size` here; `devices` says which GPUs, if any will not do",
    "gpus": "is `devices` here",
    "max_gpu_memory": "is `memory` or `kv_cache` here, with a size like 20GiB",
    "load_8bit": "is `engine: {quantization: bitsandbytes}` or `fp8` here",
    "conv_template": "is `chat_template` here (a Jinja file or text; the model's own is the default)",
    "worker_use_ray": "is `engine: {distributed_executor_backend: ray}` here",
    "engine_use_ray": _V1,
    "swap_space": "is gone: vLLM recomputes instead; nearest: `engine: {cpu_offload_gb: ...}`",
    "max_paddings": "is gone: batches are no longer padded",
    "max_context_len_to_capture": "is `engine: {max_cudagraph_capture_size: ...}` now",
    "disable_log_requests": "is turned round: `engine: {enable_log_requests: false}` is the default",
    "max_log_len": "is gone: prompts are not logged",
    "use_ssl": "is `server: {ssl_certfile, ssl_keyfile}` here",
    "ssl": "is `server: {ssl_certfile, ssl_keyfile}` here",
    "api_key": "is the list `server: {api_keys: [...]}` here",
}


def successor(key: str) -> str | None:
    """What became of a FastChat option, or None if it is none of them."""
    told = SUCCESSORS.get(key.replace("-", "_").lower())
    return f"FastChat's {key} {told}" if told else None
