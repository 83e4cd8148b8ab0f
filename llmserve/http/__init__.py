"""The ASGI application: routes, access, bodies, and a request's way to its model.

Belongs here: what stands between a connection and a model's handler. Start with `app`,
then `inference`.
"""
