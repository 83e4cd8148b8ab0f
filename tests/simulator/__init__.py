"""The server's request and lifecycle code under random interleavings, in virtual time.

Real: the ASGI app, admission, pool, lifecycle, reload, health, drain and the backend that
starts engines. Simulated: engines, their memory, clients, an operator and the event loop, all
driven by one seed. `python -m tests.simulator --help` runs and replays seeds.
"""
