"""Folders with the shape of a Llama, for engines with `load_format: dummy`.

The file of weights is a header alone, which says how large the model is.

python -m benchmarks.shapes models/SmolLM2-135M-Instruct /tmp/models
"""

from __future__ import annotations

import argparse
import json
import shutil
import struct
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

# hidden_size, intermediate_size, layers, heads; 8 of the heads have keys and values
SHAPES = {
    "llama-half": (1024, 4096, 24, 16),
    "llama-1b": (2048, 8192, 16, 32),
    "llama-3b": (3072, 8192, 28, 24),
    "llama-8b": (4096, 14336, 32, 32),
}
WEIGHTS = "model.safetensors"


def make(name: str, source: Path, folder: Path) -> Path:
    """A shape by its name, in a new folder, with the tokenizer of a model with Llama's config."""
    hidden, intermediate, layers, heads = SHAPES[name]
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": hidden // heads,
        "max_position_embeddings": 8192,
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / WEIGHTS).write_bytes(_header(_tensors(config)))
    return folder


def _tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    keys, vocabulary = config["num_key_value_heads"] * config["head_dim"], config["vocab_size"]
    layer = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    head = {} if config["tie_word_embeddings"] else {"lm_head.weight": (vocabulary, hidden)}
    return {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        **head,
        **{
            f"model.layers.{number}.{name}.weight": shape
            for number in range(config["num_hidden_layers"])
            for name, shape in layer.items()
        },
    }


def _header(tensors: dict[str, tuple[int, ...]]) -> bytes:
    """The beginning of a safetensors file of bfloat16, whose data does not follow."""
    ends = [*accumulate((2 * prod(shape) for shape in tensors.values()), initial=0)]
    header = {
        name: {"dtype": "BF16", "shape": shape, "data_offsets": ends[i : i + 2]}
        for i, (name, shape) in enumerate(tensors.items())
    }
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    for name in SHAPES:
        print(make(name, arguments.source, arguments.folder / name))


if __name__ == "__main__":
    main()
