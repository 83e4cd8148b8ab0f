"""Streams of tokens without vLLM's generators.

`guards` says what may go this way; everything else goes vLLM's own. Start with `fast_path`.
"""
