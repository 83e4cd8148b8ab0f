"""The registry: the content of `models.yaml`, and the effects of a changed file.

Contains the specs of server and models, their defaults and their problems. Accesses no GPU and
reads no weights. Start with `spec`, then `loader`.
"""
