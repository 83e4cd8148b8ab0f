"""The fields and attributes of vLLM that the fast path supports, by name.

A field that a later vLLM adds is in no list. Where it is set, `guards` sends the request to vLLM's
path. `tests/contract/test_guards.py` compares the lists with the installed vLLM.
"""

from __future__ import annotations

from typing import Any

from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.entrypoints.openai.chat_completion.protocol import (
    ChatCompletionResponseStreamChoice,
    ChatCompletionStreamResponse,
)
from vllm.entrypoints.openai.completion.protocol import (
    CompletionResponseStreamChoice,
    CompletionStreamResponse,
)
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Fields of chat and completion requests that only affect the prompt, the sampling parameters or
# the other arguments of `generate`, which vLLM's handler creates.
FREE = _names(
    """
    model messages prompt stream stream_options max_tokens max_completion_tokens seed user
    frequency_penalty presence_penalty repetition_penalty logit_bias temperature top_p top_k min_p
    stop stop_token_ids include_stop_str_in_output ignore_eos min_tokens length_penalty watermarking
    skip_special_tokens spaces_between_special_tokens truncate_prompt_tokens truncation_side
    allowed_token_ids bad_words response_format structured_outputs add_generation_prompt
    continue_final_message add_special_tokens documents chat_template chat_template_kwargs
    reasoning_effort media_io_kwargs mm_processor_kwargs priority cache_salt request_id session_id
    tool_choice parallel_tool_calls include_reasoning top_logprobs return_tokens_as_token_ids
    """
)
# Fields that can change the events of a stream, and the values that do not.
PLAIN: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "logprobs": (None, False),
    "prompt_logprobs": (None,),
    "logprob_token_ids": (None,),
    "echo": (None, False),
    "tools": (None, []),
    "use_beam_search": (None, False),
    "return_token_ids": (None, False),
    "return_prompt_text": (None, False),
    "suffix": (None,),
    "prompt_embeds": (None,),
    "mm_payload": (None, "tensors"),
}
REQUEST_FIELDS = FREE | frozenset(PLAIN)
STREAM_OPTIONS = frozenset({"include_usage", "continuous_usage_stats"})
# Sampling parameters that may have any value in a request template. The others depend on the
# prompt, change the events, or are checked against `max_tokens`.
REPEATED = _names(
    """
    n presence_penalty frequency_penalty repetition_penalty temperature watermarking top_p top_k
    min_p seed stop stop_token_ids ignore_eos max_tokens skip_special_tokens
    spaces_between_special_tokens include_stop_str_in_output output_kind skip_clone
    output_text_buffer_length _eos_token_id _all_stop_token_ids _watermarking_skipped logit_bias
    allowed_token_ids
    """
)
# Sampling parameters that change no event of a stream.
EVENTLESS = REPEATED | {"min_tokens", "bad_words", "_bad_words_token_ids", "structured_outputs"}
# Fields of an engine request that a request template sets, or copies from the first request.
ENGINE_FIELDS = _names(
    """
    request_id prompt_token_ids sampling_params arrival_time lora_request cache_salt priority
    external_req_id mm_features pooling_params data_parallel_rank
    """
)
# Keys of a prompt that vLLM's renderer returns.
PROMPT_KEYS = frozenset({"type", "prompt_token_ids", "prompt", "cache_salt", "arrival_time"})

# Attributes of vLLM's handlers that may have any value; all others must be off.
HANDLER = _names(
    """
    models model_config engine_client renderer input_processor online_renderer system_fingerprint
    response_role chat_template chat_template_content_format trust_request_chat_template
    default_chat_template_kwargs default_sampling_params override_max_tokens parser_cls
    enable_auto_tools exclude_tools_when_tool_choice_none enable_log_deltas
    return_tokens_as_token_ids
    """
)
# The same for an engine's config, and for three of its parts.
CONFIG = _names(
    """
    model_config cache_config parallel_config scheduler_config device_config load_config
    offload_config attention_config aux_output_config engram_config mamba_config
    kernel_config lora_config watermark_config diffusion_config structured_outputs_config
    observability_config logging_config quant_config compilation_config profiler_config
    kv_transfer_config kv_events_config ec_transfer_config ec_manager_config
    reasoning_config additional_config instance_id optimization_level performance_mode
    weight_transfer_config shutdown_timeout
    """
)
OBSERVABILITY = _names(
    """
    show_hidden_metrics_for_version collect_detailed_traces per_request_spec_decode_metrics
    kv_cache_metrics kv_cache_metrics_sample custom_histogram_buckets cudagraph_metrics
    enable_layerwise_nvtx_tracing enable_mfu_metrics enable_mm_processor_stats
    enable_logging_iteration_details jit_monitor_mode jit_monitor_verbose
    """
)
SCHEDULER = _names(
    """
    runner_type max_num_batched_tokens max_num_scheduled_tokens max_num_seqs
    max_num_active_seqs long_prefill_token_threshold long_prefill_token_threshold_adaptive
    max_num_queued_reqs max_num_queued_tokens enable_chunked_prefill is_multimodal_model
    max_num_encoder_input_tokens encoder_cache_size policy disable_chunked_mm_input
    scheduler_cls disable_hybrid_kv_cache_manager scheduler_reserve_full_isl watermark
    prefill_schedule_interval async_scheduling stream_interval
    """
)
MODEL = _names(
    """
    model model_weights runner convert tokenizer tokenizer_mode trust_remote_code dtype seed
    hf_config hf_text_config is_submodel_config word_embeddings_untied_by_checkpoint
    hf_config_path allowed_local_media_path allowed_media_domains revision code_revision
    tokenizer_revision max_model_len spec_target_max_model_len quantization
    quantization_config allow_deprecated_quantization enforce_eager return_sampling_mask
    max_logprobs logprobs_mode use_fp64_gumbel enable_trace_replay disable_sliding_window
    disable_cascade_attn served_model_name config_format hf_token hf_overrides
    model_class_overrides generation_config override_generation_config enable_sleep_mode
    sleep_preserve_parameter_names sleep_mode_backend sleep_mode_offload_cudagraph
    enable_nccl_comm_suspend enable_cumem_allocator model_impl logits_processors
    io_processor_plugin renderer_num_workers pooler_config multimodal_config
    """
)
PARSER = frozenset({"reasoning_parser_cls", "tool_parser_cls", "tool_strict_level"})

# All fields of an engine's output and of a stream's events. A further field may need handling, so
# with one vLLM's own output processor and tasks stay.
KNOWN: dict[type, frozenset[str]] = {
    EngineCoreOutput: _names(
        """
        request_id new_token_ids new_logprobs new_prompt_logprobs_tensors pooling_output
        finish_reason stop_reason events kv_transfer_params ec_transfer_params trace_headers
        prefill_stats routed_experts num_nans_in_logits mm_cache_miss_hashes new_sampling_mask
        spec_decode_metrics prompt_token_id_logprobs
        """
    ),
    EngineCoreOutputs: _names(
        """
        engine_index outputs scheduler_stats timestamp utility_output finished_requests
        wave_complete start_wave weight_version
        """
    ),
    DeltaMessage: _names("role content reasoning tool_calls"),
    ChatCompletionResponseStreamChoice: _names(
        "index delta logprobs finish_reason stop_reason token_ids"
    ),
    ChatCompletionStreamResponse: _names(
        """
        id object created model choices usage system_fingerprint prompt_token_ids prompt_text
        metrics
        """
    ),
    CompletionResponseStreamChoice: _names(
        "index text logprobs finish_reason stop_reason prompt_token_ids token_ids"
    ),
    CompletionStreamResponse: _names(
        "id object created model choices usage system_fingerprint metrics"
    ),
    UsageInfo: _names(
        """
        prompt_tokens total_tokens completion_tokens prompt_tokens_details
        completion_tokens_details
        """
    ),
}
