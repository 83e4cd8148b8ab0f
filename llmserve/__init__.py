"""Every model of a GPU box behind one OpenAI endpoint, in one process."""

__version__ = "0.1.0"
