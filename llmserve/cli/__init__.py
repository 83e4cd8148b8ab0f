"""The command `llmserve`: starting a server, and talking to one that runs.

Belongs here: options, and what is printed. Start with `main`.
"""
