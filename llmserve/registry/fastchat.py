"""FastChat's option names and their successors.

The names are those of `fastchat.serve.vllm_worker`, `.controller` and `.openai_api_server`.
"""

from __future__ import annotations

_NO_WORKERS = "was removed: one process serves all models, without registration"
_V1 = "was removed: vLLM's engine core is always a separate process"

SUCCESSORS: dict[str, str] = {
    "worker_address": _NO_WORKERS,
    "controller_address": _NO_WORKERS,
    "controller": _NO_WORKERS,
    "no_register": _NO_WORKERS,
    "dispatch_method": "is `dispatch` here, of a model with `replicas`",
    "model_path": "is `model` here",
    "model_names": "is the entry's key and its `aliases` here",
    "served_model_name": "is the entry's key and its `aliases` here",
    "limit_worker_concurrency": "is `max_in_flight` here",
    "num_gpus": "is `tensor_parallel_size` here; `devices` selects the GPUs",
    "gpus": "is `devices` here",
    "max_gpu_memory": "is `memory` or `kv_cache` here, with a size like 20GiB",
    "load_8bit": "is `engine: {quantization: bitsandbytes}` or `fp8` here",
    "conv_template": "is `chat_template` here (a Jinja file or text; the model's own is the default)",
    "worker_use_ray": "is `engine: {distributed_executor_backend: ray}` here",
    "engine_use_ray": _V1,
    "swap_space": "was removed: vLLM recomputes instead; nearest: `engine: {cpu_offload_gb: ...}`",
    "max_paddings": "was removed: vLLM does not pad batches",
    "max_context_len_to_capture": "is `engine: {max_cudagraph_capture_size: ...}` here",
    "disable_log_requests": "is `engine: {enable_log_requests: false}` here, the default",
    "max_log_len": "was removed: llmserve does not log prompts",
    "use_ssl": "is `server: {ssl_certfile, ssl_keyfile}` here",
    "ssl": "is `server: {ssl_certfile, ssl_keyfile}` here",
    "api_key": "is the list `server: {api_keys: [...]}` here",
}


def successor(key: str) -> str | None:
    """The successor of a FastChat option, in words; None for other keys."""
    text = SUCCESSORS.get(key.replace("-", "_").lower())
    return f"FastChat's {key} {text}" if text else None
