"""GPUs: what the driver reports, and which replica may use which GPU at a time.

Belongs here: devices as facts, claims on them, and memory pages that pass between processes.
What a model needs of them is decided in `planning`. Start with `device`.
"""
