"""vLLM's front-end arguments, from the module that holds them: vLLM 0.33 moves it."""

from __future__ import annotations

try:
    from vllm.entrypoints.common.cli_args import FrontendArgs, make_arg_parser
except ModuleNotFoundError:  # before 0.33
    from vllm.entrypoints.launchers.cli_args import FrontendArgs, make_arg_parser

__all__ = ["FrontendArgs", "make_arg_parser"]
