"""Joining the Ray that runs, or starting one; following the cluster's authentication without the user's help.

Knows addresses, tokens' places and Ray's environment variables. Knows nothing of what is deployed.
Why it is as it is: docs/decisions/0005-ray-sessions.md.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pearl_ray.core.errors import ConfigError, PearlError

MODE_VARIABLE = "RAY_AUTH_MODE"
ADDRESS_VARIABLE = "RAY_ADDRESS"
LOCAL = "local"  # as an address: start a Ray of our own even if one runs
OBJECT_STORE_BYTES = 256 << 20  # of a Ray that we start: no large object ever travels through Ray here

_PROBE = Path(__file__).with_name("ray_probe.py")
_TOKEN_PLACES = "RAY_AUTH_TOKEN (the token), RAY_AUTH_TOKEN_PATH (a file), or ~/.ray/auth_token"

logger = logging.getLogger(__name__)


class ClusterConnectionError(PearlError, ConnectionError):
    """The Ray cluster can't be joined; one line that names the address or variable, and what to do."""


class RaySession:
    """A connection of this process to Ray.

    Attributes:
        address: the cluster's ``host:port``.
        started: whether this session started the cluster, which then ends with it.
        auth_mode: "disabled" or "token".
    """

    def __init__(self, address: str, started: bool, auth_mode: str, owned: bool, saved_mode: str | None) -> None:
        """Use :func:`open_session`."""
        self.address, self.started, self.auth_mode = address, started, auth_mode
        self._owned, self._saved_mode = owned, saved_mode
        self._closed = False

    def close(self) -> None:
        """Leave the cluster, and end it if this session started it. A connection found open at the start stays."""
        if self._closed:
            return
        self._closed = True
        if self._owned:
            import ray

            ray.shutdown()
            _restore_mode(self._saved_mode)


def open_session(
    address: str | None = None,
    *,
    namespace: str | None = None,
    start: bool = True,
    wanted: Callable[[], bool] | None = None,
    num_cpus: int | None = None,
    num_gpus: int | None = None,
    timeout_s: float = 60.0,
) -> RaySession:
    """Connect this process to Ray.

    A process that is connected already stays where it is. Else, in this order: ``address``; ``RAY_ADDRESS``; the
    cluster that ``ray start --head`` started on this machine; with ``start``, a new one; without, any Ray on this
    machine, such as one that ``pearl-ray serve`` started.

    Args:
        address: ``host:port``, "auto" (a Ray on this machine, never a new one), "local" (always a new one), or None.
        namespace: Ray's namespace for names of actors.
        start: whether to start a Ray when none is found.
        wanted: asked after joining a cluster that was found rather than named; False leaves it and tries the next, so
            that a client finds the deployment among several Rays on one machine.
        num_cpus, num_gpus: of a Ray that is started; None is what the machine has.
        timeout_s: for the probe of one cluster.

    Raises:
        ClusterConnectionError: nothing answers at the address, or the cluster wants a token that isn't found.
        ConfigError: the address is malformed.
    """
    import ray

    if ray.is_initialized():
        mode = os.environ.get(MODE_VARIABLE, "disabled")
        return RaySession(ray.get_runtime_context().gcs_address, False, mode, owned=False, saved_mode=None)
    source = "address"
    if address in (None, "", "auto") and os.environ.get(ADDRESS_VARIABLE):
        address, source = os.environ[ADDRESS_VARIABLE], ADDRESS_VARIABLE
    if address == LOCAL:
        return _start(namespace, num_cpus, num_gpus)
    if address not in (None, "", "auto"):
        assert address is not None
        host, port = _split(address, source)
        if not _listens(host, port):
            raise ClusterConnectionError(
                f"{source}={address!r}: no Ray listens there; is it running (ray start --head)?"
            )
        return _join(f"{host}:{port}", namespace, timeout_s)
    problem: ClusterConnectionError | None = None
    for candidate in _found_on_this_machine(any_ray=address == "auto" or not start):
        try:
            session = _join(candidate, namespace, timeout_s)
        except ClusterConnectionError as error:
            if wanted is None:
                raise
            problem = error
            continue
        if wanted is None or wanted():
            return session
        session.close()
    if start and address != "auto":
        return _start(namespace, num_cpus, num_gpus)
    raise problem or ClusterConnectionError(
        f"no Ray cluster {'with this deployment ' if wanted else ''}was found on this machine: run `ray start --head`, "
        f"or name one by {ADDRESS_VARIABLE}=host:port"
    )


def cluster_auth_mode(address: str, timeout_s: float = 60.0) -> str:
    """How the cluster at ``host:port`` authenticates: "disabled", or "token" with one that this process can find.

    Raises:
        ClusterConnectionError: it can't be reached, or its token isn't found or isn't this one.
    """
    command = [sys.executable, "-P", str(_PROBE), address]
    environment = {name: value for name, value in os.environ.items() if name != MODE_VARIABLE}
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired as error:
        raise ClusterConnectionError(f"the Ray cluster at {address} gave no answer within {timeout_s:g} s") from error
    lines = done.stdout.strip().splitlines()
    try:
        answer = json.loads(lines[-1]) if lines else {}
    except json.JSONDecodeError:
        answer = {}
    if "mode" in answer:
        return str(answer["mode"])
    detail = str(answer.get("detail", "")).strip().splitlines()
    reasons = {
        "no_token": f"the Ray cluster at {address} demands a token and none was found: set {_TOKEN_PLACES}",
        "wrong_token": f"the Ray cluster at {address} refused the token found: set the cluster's in {_TOKEN_PLACES}",
        "bad_token_file": f"the Ray token can't be read: correct RAY_AUTH_TOKEN_PATH ({' '.join(detail[:1])})",
    }
    fallback = detail or done.stderr.strip().splitlines()[-1:] or [f"the probe ended with {done.returncode}"]
    raise ClusterConnectionError(
        reasons.get(answer.get("problem", ""), f"the Ray cluster at {address} can't be joined: {fallback[0]}")
    )


def _found_on_this_machine(*, any_ray: bool) -> list[str]:
    """Addresses of Rays that run here: the one of ``ray start --head`` first; with ``any_ray``, the others too."""
    services: Any = importlib.import_module("ray._private.services")
    services.find_gcs_addresses.cache_clear()
    found = [services.find_bootstrap_address(None)]  # what `ray start` noted; stale after a crash
    if any_ray:
        found += sorted(services.find_gcs_addresses())
    unique = dict.fromkeys(address for address in found if address)
    return [address for address in unique if _listens(*_split(address, "address"))]


def _join(address: str, namespace: str | None, timeout_s: float) -> RaySession:
    mode = cluster_auth_mode(address, timeout_s)
    user_mode = os.environ.get(MODE_VARIABLE)
    if user_mode is not None and user_mode.lower() != mode:
        logger.warning("%s=%s, but the cluster at %s has %s: following it", MODE_VARIABLE, user_mode, address, mode)
    saved = _set_mode(mode)
    try:
        _init(address=address, namespace=namespace)
    except BaseException as error:
        _restore_mode(saved)
        if isinstance(error, (ConnectionError, RuntimeError)):
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ClusterConnectionError(f"the Ray cluster at {address} can't be joined: {reason[0]}") from error
        raise
    return RaySession(address, False, mode, owned=True, saved_mode=saved)


def _start(namespace: str | None, num_cpus: int | None, num_gpus: int | None) -> RaySession:
    mode = (os.environ.get(MODE_VARIABLE) or "disabled").lower()
    saved = _set_mode(mode)
    try:
        # "local" overrides RAY_ADDRESS; without a dashboard Ray starts in half the time
        _init(
            address=LOCAL,
            namespace=namespace,
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
        )
    except BaseException:
        _restore_mode(saved)
        raise
    import ray

    return RaySession(ray.get_runtime_context().gcs_address, True, mode, owned=True, saved_mode=saved)


def _init(**options: object) -> None:
    ray: Any = importlib.import_module("ray")
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)


def _set_mode(mode: str) -> str | None:
    """Set the mode of this process, and of all it starts; returns the variable's value before.

    Ray reads its environment once, when it is imported: what is set later counts only after ``Config.initialize``
    (as Ray itself does it), and tokens found earlier are forgotten.
    """
    saved = os.environ.get(MODE_VARIABLE)
    os.environ[MODE_VARIABLE] = mode
    _reread_environment()
    return saved


def _restore_mode(saved: str | None) -> None:
    if saved is None:
        os.environ.pop(MODE_VARIABLE, None)
    else:
        os.environ[MODE_VARIABLE] = saved
    _reread_environment()


def _reread_environment() -> None:
    _raylet: Any = importlib.import_module("ray._raylet")
    loader = getattr(_raylet, "AuthenticationTokenLoader", None)
    if loader is not None:  # since Ray 2.52
        _raylet.Config.initialize("")
        loader.instance().reset_cache()


def _split(address: str, source: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdecimal():
        raise ConfigError(
            source, address, 'host:port of a Ray cluster, "auto" or "local" (Ray Client isn\'t supported)'
        )
    return host.strip("[]"), int(port)


def _listens(host: str, port: int, timeout_s: float = 3.0) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, port), timeout_s):
        return True
    return False
