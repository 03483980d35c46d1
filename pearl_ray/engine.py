"""An engine of one's own: a private deployment that lives as long as the object. Everything else is `Client`."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from pearl_ray import env
from pearl_ray.client import Client
from pearl_ray.cluster.ray_session import open_session
from pearl_ray.config import PearlConfig
from pearl_ray.core.errors import PearlError
from pearl_ray.deployment import check_models, deploy
from pearl_ray.model.loading import model_path
from pearl_ray.model.tokenizer import Tokenizer, load_tokenizer
from pearl_ray.running import stop_deployment


class PearlEngine(Client):
    """Draft, target and coordinator for this process alone.

    Joins the Ray cluster that runs here, or starts one for itself. Use it as a context manager, or call
    :meth:`close`.

    Args:
        config: see :class:`PearlConfig`; the default is the embedded pair.
        progress: called with (phase, done, total) while the engine comes up.

    Raises:
        PearlError: its subclasses name what is wrong and the remedy.
    """

    def __init__(self, config: PearlConfig | None = None, progress: Callable[[str, int, int], None] | None = None):
        self.config = config or PearlConfig()
        self._tokenizer: Tokenizer | None = None
        self._closed = False
        models = check_models(self.config, progress)  # before Ray: what is wrong there is said at once
        session = open_session(self.config.ray_address)
        try:
            client = deploy(self.config, f"engine-{uuid.uuid4().hex[:12]}", progress=progress, models=models)
        except BaseException:
            session.close()
            raise
        super().__init__(client.name, client.coordinator, session)

    @property
    def tokenizer(self) -> Tokenizer:
        """The target's tokenizer."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(model_path("target", self.config.target_model, str(env.cache_dir())))
        return self._tokenizer

    def close(self) -> None:
        """End the shards, and the Ray that was started for them; writes ``config.trace`` if it is set."""
        if self._closed:
            return
        self._closed = True
        try:
            if self.config.trace is not None:
                Path(self.config.trace).write_text(json.dumps(self.trace()))
            stop_deployment(self.name)
        except PearlError:
            pass  # it has failed and removed itself; whoever ran a request has been told
        finally:
            super().close()

    def __enter__(self) -> PearlEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
