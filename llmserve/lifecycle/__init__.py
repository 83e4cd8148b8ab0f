"""Models that are served: their replicas, queues, starts, sleep, eviction and reload.

Belongs here: the state of replicas and its transitions, without vLLM: an engine is a
`replica.Running`. Start with `replica`, then `pool`, `router` and `transitions`.
"""
