"""The server's process: bind, serve, start models, drain, end.

Contains sockets, TLS, logs and signals. Start with `process`, or with `connection` for bytes.
"""
