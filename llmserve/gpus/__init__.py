"""GPUs: what the driver says of them, and who may use which at a time.

Belongs here: devices as facts, claims on them, and memory pages that pass between processes.
What a model needs of them is decided in `planning`. Start with `device`.
"""
