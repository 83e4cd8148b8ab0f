"""What goes over the wire: endpoints, JSON, event streams, and the bounds of a body.

Belongs here: what a client sends or reads. Knows no running model and no vLLM. Start with `endpoints` (routes and error bodies), then `token_stream`.
"""
