"""The registry: what `models.yaml` says, and what a changed one changes.

Belongs here: the specs of the server and of models, their defaults, and their problems.
Nothing here looks at a GPU or at a model's files. Start with `config`.
"""
