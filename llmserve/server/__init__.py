"""The process: bind, serve, start models, drain, end.

Belongs here: sockets, TLS, logs and signals of the server's own process. Start with `process`.
"""
