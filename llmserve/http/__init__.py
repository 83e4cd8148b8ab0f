"""The ASGI application: routes, access, bodies, and the path of a request to its model.

It has everything between a connection and a model's handler. Start with `app`, then `inference`.
"""
