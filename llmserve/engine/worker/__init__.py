"""Code inside vLLM's processes. Imports nothing above `gpus`.

Start with `plugin`, which vLLM runs first in each of its processes.
"""
