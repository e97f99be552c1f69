"""A pod as the table of failures sees it: which version it serves, by whatever says so, and somebody
who uses it meanwhile. What fails is known to `test_failures.py` alone.
"""

from __future__ import annotations

import http.client
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from e2e.engine.conftest import Engine, assert_serves, golden
from e2e.engine.images import Image
from hotweights_transports.handoff import frames


@dataclass
class Pod:
    """An engine that serves one version and is told to take the other."""

    engine: Engine
    models: list[Path]
    versions: list[Image]
    serves: int = 0
    """The number of the version."""

    @property
    def old(self) -> Image:
        return self.versions[self.serves]

    @property
    def new(self) -> Image:
        return self.versions[1 - self.serves]

    def begin(self) -> None:
        """With what the last row left, whether or not it ended as it should."""
        self.engine.behaves()
        named = self.engine.vllm.get("/weight_info")["weight_version"]
        self.serves = [image.digest for image in self.versions].index(named)

    def take_the_new(self) -> None:
        """As if nothing had happened before."""
        assert self.engine.agent.swap(self.new).probe == "Golden"
        self.serves = 1 - self.serves
        self.assert_right()

    def assert_right(self) -> None:
        """Tokens, vLLM's own label and the plugin's word are of one version."""
        self.engine.behaves()
        assert_serves(self.engine, self.models[self.serves])
        assert self.engine.vllm.get("/weight_info") == {"weight_version": self.old.digest}
        assert self.engine.vllm.get("/is_paused") == {"is_paused": False}

    @contextmanager
    def used(self) -> Iterator[list[list[int]]]:
        """Somebody's request is under way; the tokens that it got."""
        answers: list[list[int]] = []
        probe = golden(self.models[self.serves])[0]

        def use() -> None:
            with suppress(OSError, http.client.HTTPException):  # the engine has ended
                answers.append(
                    self.engine.vllm.complete(
                        probe["promptTokenIds"], len(probe["tokenIds"]), 300.0
                    )
                )

        user = threading.Thread(target=use)
        user.start()
        yield answers
        user.join(300)
        assert not user.is_alive(), "nobody answered it"

    def reconnect(self) -> frames.Hello:
        """The agent comes back; what the server says of itself then."""
        heard = len(self.engine.agent.hellos)
        self.engine.agent.up()
        self.engine.connected()
        return next(hello for hello in self.engine.agent.hellos[heard:] if hello.role == "server")
