"""vLLM: engines, their processes, and its request handlers.

The only package that imports vllm, torch and transformers: all code that uses a name of vLLM is
here. Start with `backend`, then `launcher`, `engine` and `handlers`.
"""
