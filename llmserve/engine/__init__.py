"""vLLM: engines, their processes, and its request handlers.

The only package that imports vllm, torch and transformers. Belongs here: code that
uses a name of vLLM. Start with `backend`, then `engine` and `handlers`.
"""
