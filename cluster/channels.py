"""Plan and summary channels: typed messages from several senders to one inbox, over ZeroMQ.

Knows endpoints and ``core.messages``. Knows nothing of what a message means, or of Ray. On one host the socket file
lies in a private folder (0700); between hosts the socket is TCP with CURVE, whose server key only the deployment knows,
and every message carries the deployment's random token besides: a stranger's bytes are dropped and counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import os
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from types import TracebackType

import zmq

from pearl_ray.core.messages import Message, decode, encode

LINGER_MS = 1000  # how long a closing outbox waits to hand over what is queued
_TOKEN_BYTES = 16
_MAX_IPC_PATH = 100  # a Unix socket's path holds 107 bytes


class Inbox:
    """The receiving end; any number of :class:`Outbox` send to its ``endpoint``.

    ``endpoint`` contains the token (and the server key): a secret of the deployment, to be passed on by Ray calls and
    never logged. Use an inbox from one thread.

    Args:
        host: None for senders on this machine; this machine's IP address when some are on other machines.
        folder: an existing private folder for the socket file, e.g. one per deployment that its owner removes, which
            also serves processes that are killed; None makes one, removed by :meth:`close` or at the process's end.
    """

    def __init__(self, host: str | None = None, *, folder: str | None = None) -> None:
        self._token = secrets.token_bytes(_TOKEN_BYTES)
        self._remove_folder: weakref.finalize[..., Inbox] | None = None  # also when the process ends without close()
        self._path: str | None = None
        self.num_dropped = 0
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PULL)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        try:
            self.endpoint = self._bind_tcp(host) if host is not None else self._bind_ipc(folder)
        except zmq.ZMQError:
            self.close()
            raise

    def receive(self, timeout_s: float) -> Message | None:
        """The next message, or None if none comes within ``timeout_s``; 0 only looks."""
        deadline = time.monotonic() + timeout_s
        while True:
            left_ms = max(0, round((deadline - time.monotonic()) * 1000))
            if not self._socket.poll(left_ms, zmq.POLLIN):
                return None
            message = self._take()
            if message is not None:
                return message

    def drain(self) -> list[Message]:
        """All that has come, in order of arrival, without waiting."""
        messages = []
        while int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
            message = self._take()
            if message is not None:
                messages.append(message)
        return messages

    async def next(self) -> list[Message]:
        """All that has come, at least one message; waits in the running event loop. One waiter at a time."""
        loop = asyncio.get_running_loop()
        while not (messages := self.drain()):
            # The descriptor is readable once per change: drain() before waiting for it, and again after.
            readable = asyncio.Event()
            loop.add_reader(self.fileno(), readable.set)
            try:
                if int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN:
                    continue
                await readable.wait()
            finally:
                loop.remove_reader(self.fileno())
        return messages

    def fileno(self) -> int:
        """ZeroMQ's descriptor, for ``loop.add_reader``. Edge-triggered: call :meth:`drain` after each event."""
        return int(self._socket.get(zmq.FD))

    def close(self) -> None:
        """Drop what is unread and remove the socket file."""
        self._socket.close()
        self._context.term()
        if self._path is not None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
        if self._remove_folder is not None:
            self._remove_folder()

    def __enter__(self) -> Inbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _take(self) -> Message | None:
        """One message off the socket; None if it was a stranger's."""
        parts = self._socket.recv_multipart(zmq.NOBLOCK)
        if len(parts) != 2 or not hmac.compare_digest(parts[0], self._token):
            self.num_dropped += 1
            return None
        return decode(parts[1])

    def _bind_ipc(self, folder: str | None) -> str:
        if folder is None:
            folder = tempfile.mkdtemp(prefix="pearl-")
            if len(folder) > _MAX_IPC_PATH - 24:  # a deep TMPDIR
                shutil.rmtree(folder)
                folder = tempfile.mkdtemp(prefix="pearl-", dir="/tmp")
            self._remove_folder = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._path = os.path.join(folder, f"{secrets.token_hex(8)}.sock")
        self._socket.bind(f"ipc://{self._path}")
        return f"ipc://{self._path}#{self._token.hex()}"

    def _bind_tcp(self, host: str) -> str:
        public, secret = zmq.curve_keypair()
        self._socket.curve_server = True
        self._socket.curve_secretkey = secret
        bracketed = f"[{host}]" if ":" in host else host
        if ":" in host:
            self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.bind(f"tcp://{bracketed}:*")  # the kernel chooses the port
        port = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2]
        return f"tcp://{bracketed}:{port}#{self._token.hex()}.{public.hex()}"


class Outbox:
    """A sending end; messages of one outbox arrive in order. Sending never blocks: the queue is unbounded."""

    def __init__(self, endpoint: str) -> None:
        address, _, key = endpoint.partition("#")
        token, _, server_key = key.partition(".")
        if len(token) != 2 * _TOKEN_BYTES:
            raise ValueError("endpoint is not an Inbox's: it lacks the deployment's token")
        self._token = bytes.fromhex(token)
        self._lock = threading.Lock()
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PUSH)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, LINGER_MS)
        if server_key:
            public, secret = zmq.curve_keypair()
            self._socket.curve_serverkey = bytes.fromhex(server_key)
            self._socket.curve_publickey = public
            self._socket.curve_secretkey = secret
        if "[" in address:
            self._socket.setsockopt(zmq.IPV6, 1)
        self._socket.connect(address)

    def send(self, message: Message) -> None:
        """Queue ``message``; safe from several threads."""
        with self._lock:
            self._socket.send_multipart((self._token, encode(message)))

    def close(self) -> None:
        """Hand over what is queued, for at most ``LINGER_MS``, then leave."""
        with self._lock:
            self._socket.close()
        self._context.term()

    def __enter__(self) -> Outbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
