"""Clients and suites of other projects against `llmserve up`: `make conformance`.

One module per client; the Node clients are in `node/`, run by `test_node`. They have an environment
of their own (requirements/conformance.lock, node/package-lock.json). `known.yaml` lists the
failures that are known, with their reasons. Results: docs/conformance.md.
"""
