"""What goes over the wire: endpoints, JSON, event streams, and the bounds of a body.

Belongs here: what a client sends or reads, whoever answers it. Knows no model that runs and
no vLLM. Start with `endpoints` (routes and error bodies), then `token_stream`.
"""
