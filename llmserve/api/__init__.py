"""The wire format: endpoints, JSON, event streams, and the limits of a body.

It knows neither running models nor vLLM. Start with `endpoints`, then `token_stream`.
"""
