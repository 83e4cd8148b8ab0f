"""Models that are served: their replicas, queues, starts, sleep, eviction and reload.

Belongs here: the state of replicas and who may change it, without vLLM: an engine is what
`replica.Running` says. Start with `replica`, then `pool` and `transitions`.
"""
