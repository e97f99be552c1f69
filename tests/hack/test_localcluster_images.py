"""Archives of images: built again when something changed, and then the old one of that tag goes and
no other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from localcluster import images

BUILDAH = """#!/bin/sh
echo "$*" >> "$0.log"
case "$*" in
*" push "*) for last; do :; done; last=${last#docker-archive:}; echo "$*" > "${last%%:*}" ;;
*" images "*) echo %s ;;
esac
"""


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Builds, with a buildah that writes down what it was asked for and pushes a line of text."""
    program = tmp_path / "bin" / "buildah"
    program.parent.mkdir()
    program.write_text(BUILDAH.replace("%s", images.BASE_IMAGE))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/usr/bin:/bin")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:1")
    monkeypatch.setenv("HOTWEIGHTS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(images, "base", lambda: tmp_path / "base.tar")
    context = tmp_path / "context"
    context.mkdir()
    (context / "Dockerfile").write_text("FROM scratch")

    def built(tag: str, **arguments: str) -> Path:
        return images.build(context, tag, arguments=arguments)

    return built


def test_the_old_archive_of_the_tag_goes_and_no_other(build: Callable[..., Path]) -> None:
    other = build("localhost/agent:dev-gpu", EXTRAS="a")
    named_like_an_argument = build("localhost/EXTRAS:a", EXTRAS="a")
    old = build("localhost/agent:dev", EXTRAS="a")
    new = build("localhost/agent:dev", EXTRAS="b")
    assert new != old
    assert sorted(new.parent.glob("*.tar")) == sorted([new, other, named_like_an_argument])


def test_what_is_unchanged_is_not_built_again(build: Callable[..., Path], tmp_path: Path) -> None:
    log = tmp_path / "bin" / "buildah.log"
    first = build("localhost/agent:dev", EXTRAS="a")
    said = log.read_text()
    assert f"--build-arg BASE={images.BASE_IMAGE}" in said
    assert "--build-arg EXTRAS=a" in said
    assert build("localhost/agent:dev", EXTRAS="a") == first
    assert log.read_text() == said
