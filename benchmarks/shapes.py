"""Folders with the shape of a Llama and no weights, for engines with `load_format: dummy`.

python -m benchmarks.shapes models/SmolLM2-135M-Instruct /tmp/models
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

# hidden_size, intermediate_size, layers, heads; 8 of the heads have keys and values
SHAPES = {
    "llama-half": (1024, 4096, 24, 16),
    "llama-1b": (2048, 8192, 16, 32),
    "llama-3b": (3072, 8192, 28, 24),
    "llama-8b": (4096, 14336, 32, 32),
}


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
    return folder


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
