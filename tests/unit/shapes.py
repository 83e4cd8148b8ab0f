"""Shapes of well-known models, as their configs and headers give them."""

from __future__ import annotations

from dataclasses import replace

from llmserve.checkpoint.shape import Shape

LLAMA_8B = Shape(
    architecture="LlamaForCausalLM",
    weights=16_060_522_496,
    embeddings=2 * 2 * 128_256 * 4096,
    linear=2 * 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336),
    layers=32,
    attention_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    heads=32,
    kv_heads=8,
    head_dim=128,
    vocab_size=128_256,
    context=8192,
    dtype="bfloat16",
)
LLAMA_70B = replace(
    LLAMA_8B,
    weights=141_107_412_992,
    embeddings=2 * 2 * 128_256 * 8192,
    linear=136_902_082_560,
    layers=80,
    attention_layers=80,
    hidden_size=8192,
    intermediate_size=28672,
    heads=64,
)
MINI_LM = Shape(
    architecture="BertModel",
    weights=45_000_000,
    embeddings=23_000_000,
    linear=21_000_000,
    layers=6,
    attention_layers=0,
    hidden_size=384,
    intermediate_size=1536,
    heads=12,
    kv_heads=12,
    head_dim=32,
    vocab_size=30522,
    context=512,
    dtype="float32",
)
