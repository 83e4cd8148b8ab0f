"""Constraints of an answer: schemas, patterns and grammars, checked before vLLM sees them.

`compiler` runs in the server and imports no vLLM; `compiler_process` runs beside it.
"""
