"""The log lines of an actor's process: to its stderr, which Ray keeps in its session's logs. Knows ``logging`` only."""

from __future__ import annotations

import logging

FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_stderr() -> None:
    """Our loggers' lines from INFO on, and other libraries' warnings; where the root logger has handlers, nothing.

    Called where an actor begins. A level that was given to our logger stays.
    """
    if logging.getLogger().handlers:  # Ray's ``logging_config``, or a set-up hook of the user's
        return
    logging.basicConfig(format=FORMAT)
    ours = logging.getLogger("pearl_ray")
    if ours.level == logging.NOTSET:
        ours.setLevel(logging.INFO)
