"""The limits of one client's connection."""

from __future__ import annotations

import resource
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """Times in seconds, sizes in bytes."""

    head_bytes: int = 64 * 2**10  # request line and headers; also chunk extensions and trailers
    headers: int = 256
    head_s: float = 30.0  # from a request's first byte, or the connection's start, to its headers
    body_idle_s: float = 60.0  # between bytes of a body
    body_s: float = 3600.0  # for a whole body
    keep_alive_s: float = 5.0  # between requests
    linger_s: float = 10.0  # for the rest of a body after its answer
    stuck_s: float = 60.0  # in which a client must accept `stuck_bytes` of a waiting answer
    stuck_bytes: int = 4096
    pipelined: int = 16  # requests that wait for an earlier answer
    connections: int = 49_152
    sweep_s: float = 1.0  # between two checks of all connections

    @classmethod
    def from_process(cls) -> Limits:
        """Leave a quarter of the process's file descriptors to engines and files."""
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if soft == resource.RLIM_INFINITY:
            return cls()
        return cls(connections=min(cls.connections, soft * 3 // 4))
