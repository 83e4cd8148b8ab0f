"""Runs first in each process that vLLM starts (entry point `vllm.general_plugins`).

An engine core and its workers write into their model's log file, and see their own GPUs only.
`llmserve.engine.parent_watch`, which runs earlier, ends them with the server.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

LOG_DIR = "LLMSERVE_LOG_DIR"  # the variable with the folder of log files
_NAME_LIMIT = 160  # characters of a model in a file's name, which can have 255 bytes


def enter() -> None:
    config = _config_of(multiprocessing.current_process())
    if config is None or LOG_DIR not in os.environ:
        return  # the server itself
    _hide_other_gpus(config)
    replica = _replica_of(config.instance_id)
    file = log_file(Path(os.environ[LOG_DIR]), config.model_config.served_model_name, replica)
    write_to(file)
    _enable_logging(config)


def _hide_other_gpus(config: Any) -> None:
    """Number the engine's GPUs from 0, before CUDA is initialized.

    torch.compile caches code that contains the device's number, and vLLM's cache key does not:
    code compiled on one GPU fails on another with "invalid argument". vLLM maps its physical ids
    through this variable (vllm/platforms/interface.py, logical_device_id_to_visible_device_id).
    """
    ids = config.parallel_config.assigned_physical_gpu_ids
    if ids is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(str(each) for each in ids)


def log_file(folder: Path, model: str, replica: int | None = None) -> Path:
    """Return the log file of an engine; `server.log` in the same folder is the server's.

    `replica` is its number if the model has several.
    """
    number = "" if replica is None else f"+{replica}"  # `quote` leaves no + and no = in a name
    name = quote(model, safe="@ ")
    if len(name) > _NAME_LIMIT:  # a character can take twelve
        name = f"{name[:_NAME_LIMIT]}={sha256(model.encode()).hexdigest()[:32]}"
    return folder / f"model-{name}{number}.log"


def instance_of(replica: int, own: str) -> str:
    """Return an `instance_id` by which an engine core knows its replica's number.

    `instance_id` of a VllmConfig is free text that names things on the host, so vLLM's own
    unique one stays in it. It is not part of the config's hash: replicas share the cache of
    torch.compile.
    """
    return f"{replica}-{own}"


def _replica_of(instance: str) -> int | None:
    number, separator, _ = instance.partition("-")
    return int(number) if separator else None


def _config_of(process: BaseProcess) -> Any:
    """Return the VllmConfig of an engine core process; None in other processes.

    vLLM passes it to the process as a keyword argument (vllm/v1/engine/utils.py,
    CoreEngineProcManager), and calls plugins without arguments.
    """
    return getattr(process, "_kwargs", {}).get("vllm_config")


def _enable_logging(config: Any) -> None:
    """Turn vLLM's logging on, which the server turns off for its own process."""
    if not config.logging_config.configure_logging:
        from vllm.logger import configure_logging  # noqa: PLC0415  # not in the server

        config.logging_config = dataclasses.replace(config.logging_config, configure_logging=True)
        configure_logging(config.logging_config)


def write_to(file: Path) -> None:
    """Send this process's output to a file."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
