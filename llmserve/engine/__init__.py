"""vLLM: engines, their processes, and its request handlers.

The only package that imports vllm, torch and transformers. Belongs here: whatever uses a
name of vLLM. Start with `backend`, then `engine` and `handlers`.
"""
