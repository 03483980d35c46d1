"""The app on a socket: uvicorn in a thread of its own, so that whoever starts it keeps the signals and may block.

Knows start, attach, drain and end; nothing of what the app answers.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import TypeVar

import uvicorn

from pearl_ray.serving.app import create_app
from pearl_ray.serving.backend import Backend, Engine, Model
from pearl_ray.serving.errors import unavailable
from pearl_ray.serving.settings import ServerSettings

T = TypeVar("T")
BACKLOG = 2048
KEEP_ALIVE_S = 30
LAST_WORDS_S = 2.0  # for the final error events, once the drain is over


def bind(host: str, port: int) -> socket.socket:
    """A listening TCP socket; port 0 takes a free one. Raises ``OSError``."""
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    listener.setblocking(False)
    return listener


class HttpServer:
    """See the module. All methods may be called from any thread but the server's own.

    Use it as a context manager, or call :meth:`start` and :meth:`stop`.

    Args:
        settings: of the app.
        listener: from :func:`bind`; closed when the server ends.
    """

    def __init__(self, settings: ServerSettings, listener: socket.socket) -> None:
        self.settings = settings
        self.address: tuple[str, int] = listener.getsockname()[:2]
        self.failed = threading.Event()  # the engine has ended
        self._backend = Backend()
        self._app = create_app(self._backend, settings)
        self._listener = listener
        config = uvicorn.Config(
            self._app,
            log_config=None,
            access_log=False,
            ws="none",
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=int(LAST_WORDS_S),
        )
        self._server = uvicorn.Server(config)
        self._loop: Future[asyncio.AbstractEventLoop] = Future()
        self._hurry = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="http", daemon=True)

    @property
    def url(self) -> str:
        """Where it answers."""
        host, port = self.address
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def start(self) -> None:
        """Answer from now on; ``/ready`` says no until :meth:`attach`."""
        self._thread.start()
        self._loop.result()

    def report(self, phase: str, done: int, total: int) -> None:
        """How far the deployment has come, for ``/ready``."""
        self._backend.phase = f"{phase} ({done} of {total})" if total else phase

    def attach(self, engine: Engine, model: Model) -> None:
        """The deployment is up."""
        self._call(lambda: self._backend.attach(engine, model))

    def begin_stop(self, drain_s: float) -> Future[None]:
        """Take no new request, let those that run end for ``drain_s`` seconds, cut off the rest with an error.

        Returns at once; the future is done when all that is over and :meth:`join` won't wait long.
        """
        return asyncio.run_coroutine_threadsafe(self._drain(drain_s), self._loop.result())

    def hurry(self) -> None:
        """End a drain that is going on."""
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the drain with it
            self._loop.result().call_soon_threadsafe(self._hurry.set)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def stop(self, drain_s: float = 0.0) -> None:
        """Drain and end; does no harm a second time, or from two threads at once."""
        if self._thread.is_alive():
            with contextlib.suppress(RuntimeError):  # another thread's stop has just ended the loop
                self.begin_stop(drain_s)
            self.join()

    def __enter__(self) -> HttpServer:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        watch = asyncio.create_task(self._watch())
        self._loop.set_result(asyncio.get_running_loop())
        try:
            await self._server.serve(sockets=[self._listener])
        finally:
            watch.cancel()
            self._listener.close()

    async def _watch(self) -> None:
        await self._backend.failed.wait()
        self.failed.set()

    async def _drain(self, drain_s: float) -> None:
        gate = self._app.state.services.gate
        try:
            drained = asyncio.ensure_future(gate.drained(drain_s))
            hurried = asyncio.ensure_future(self._hurry.wait())
            await asyncio.wait({drained, hurried}, return_when=asyncio.FIRST_COMPLETED)
            for task in (drained, hurried):
                task.cancel()
            if gate.count:
                message = "the server is shutting down and could not finish the answer"
                self._backend.fail_all(unavailable(message, "shutting_down"))
                await gate.drained(LAST_WORDS_S)
        finally:
            self._server.should_exit = True

    def _call(self, function: Callable[[], T]) -> T:
        async def call() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(call(), self._loop.result()).result()
