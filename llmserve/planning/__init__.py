"""The memory plan: which GPUs each replica has, and what lies on them.

Belongs here: arithmetic from values to values. Nothing here starts an engine or waits.
Start with `survey`, then `planner` and `placement`.
"""
