"""A model's files, in a folder or on the hub, and the shape that decides its memory.

Belongs here: reading config files and tensor headers, and downloads. No weights are loaded.
Start with `files`.
"""
