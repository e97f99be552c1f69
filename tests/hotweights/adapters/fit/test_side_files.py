"""A version that brings another configuration is refused by name; what no cold load reads, or what
the version lacks, is nobody's business.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from blake3 import blake3

from hotweights.adapters.vllm.rank.fit.side_files import SideFiles

FILES = {
    "config.json": b'{"rope_theta": 10000}',
    "tokenizer.json": b"a, b",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"trained on Monday",
}


def digests(**changed: bytes) -> dict[str, str]:
    renamed = {name.replace("__", "."): data for name, data in changed.items()}
    return {name: blake3(data).hexdigest() for name, data in (FILES | renamed).items()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "checkpoint.jinja").mkdir()
    return tmp_path


def test_the_same_files_fit(folder: Path) -> None:
    assert SideFiles(folder, own_tokenizer=True).check(digests()) is None


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "chat_template.jinja"])
def test_another_file_is_refused_with_the_remedy(folder: Path, name: str) -> None:
    changed = digests(**{name.replace(".", "__"): b"other"})
    misfit = SideFiles(folder, own_tokenizer=True).check(changed)
    assert misfit is not None
    assert misfit.reason == "ConfigDiffers"
    assert misfit.message.startswith(f"{name} is not what this engine booted with")
    assert "restart the pods" in misfit.message
    assert f"--ignore {name}" in misfit.message


def test_a_file_that_is_new_is_refused(folder: Path) -> None:
    misfit = SideFiles(folder, own_tokenizer=True).check(digests(merges__txt=b"a b"))
    assert misfit is not None
    assert misfit.message.startswith("merges.txt was not there when this engine booted")


def test_what_a_version_lacks_stays_and_what_nobody_reads_may_change(folder: Path) -> None:
    files = digests(README__md=b"trained on Tuesday")
    del files["tokenizer.json"]
    assert SideFiles(folder, own_tokenizer=True).check(files) is None


def test_another_tokenizer_than_the_folder_s_is_not_compared(folder: Path) -> None:
    named = SideFiles(folder, own_tokenizer=False)
    assert named.check(digests(tokenizer__json=b"other")) is None
    assert named.check(digests(config__json=b"other")) is not None


def test_an_engine_whose_folder_is_not_known_takes_every_version(tmp_path: Path) -> None:
    assert SideFiles(tmp_path / "org" / "name", own_tokenizer=True).check(digests()) is None


def test_a_configuration_in_other_bytes_that_means_the_same_fits(folder: Path) -> None:
    new = b'{"transformers_version": "5.19.0", "rope_theta": 10000}'
    files = digests(config__json=new)
    known = SideFiles(folder, own_tokenizer=True)
    assert known.check(files) is not None, "without its text nobody can say so"
    assert known.check(files, {"config.json": new.decode()}) is None
    other = known.check(digests(config__json=b"{}"), {"config.json": new.decode()})
    assert other is not None, "a text that is not of that digest proves nothing"
    tokenizer = digests(config__json=new, tokenizer__json=b"other")
    misfit = known.check(tokenizer, {"config.json": new.decode()})
    assert misfit is not None
    assert misfit.message.startswith("tokenizer.json is not")


def test_what_differs_in_a_configuration_is_named(folder: Path) -> None:
    new = b'{"rope_theta": 500000}'
    misfit = SideFiles(folder, own_tokenizer=True).check(
        digests(config__json=new), {"config.json": new.decode()}
    )
    assert misfit is not None
    assert misfit.reason == "ConfigDiffers"
    assert "booted with (rope_theta: 10000 → 500000), and only weights" in misfit.message
    assert "--ignore config.json" in misfit.message


def test_a_huge_configuration_is_compared_by_its_digest(folder: Path) -> None:
    new = b'{"rope_theta": 10000}' + b" " * (1 << 20)
    misfit = SideFiles(folder, own_tokenizer=True).check(
        digests(config__json=new), {"config.json": new.decode()}
    )
    assert misfit is not None
