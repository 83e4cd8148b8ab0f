"""The command `llmserve`: starts a server, and controls a running one.

Contains options and output. Start with `main`.
"""
