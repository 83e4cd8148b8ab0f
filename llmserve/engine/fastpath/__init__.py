"""Streams of tokens without vLLM's generators.

`guards` lists what may take the fast path; all else takes vLLM's path. Start with `fast_path`.
"""
