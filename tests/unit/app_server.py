"""An ASGI application on its own port."""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Self

import uvicorn

if TYPE_CHECKING:
    from starlette.types import ASGIApp


class AppServer:
    """Serves an application in a thread."""

    def __init__(self, app: ASGIApp, graceful_s: int = 0) -> None:
        self._sock = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._sock.getsockname()[1]}"
        config = uvicorn.Config(
            app, lifespan="off", log_config=None, access_log=False,
            timeout_graceful_shutdown=graceful_s,
        )  # fmt: skip
        self._uvicorn = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._uvicorn.run, args=([self._sock],))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
        self._sock.close()

    def stop(self) -> None:
        self._uvicorn.should_exit = True
        self._thread.join()
