"""Constraints of an answer: schemas, patterns and grammars, checked before vLLM receives them.

`compiler` runs in the server and imports no vLLM; `compiler_process` is a process of its own.
"""
