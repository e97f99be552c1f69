"""What the zoo's list holds, which tensors its part of a version changes, and what its table says."""

from __future__ import annotations

import re

import pytest

from e2e.engine.images import Tensor
from e2e.zoo.architectures import LEFT_OUT, ZOO
from e2e.zoo.checkpoints import last_layer
from e2e.zoo.cold import Probes, told_apart
from e2e.zoo.forks import Unanswered
from e2e.zoo.row import EQUAL, FAILED, NOT_RUN, REFUSED, Row, Switch, remarks, table
from e2e.zoo.tensors import smallest_part
from localvllm import models


def probes(**answers: int) -> Probes:
    """A prompt for each letter, and the token that answers it."""
    return [{"promptTokenIds": [ord(one)], "tokenIds": [token]} for one, token in answers.items()]


def tensors(*names: str) -> list[Tensor]:
    return [Tensor(name, "F32", [1], b"\0\0\0\0") for name in names]


def test_each_name_is_there_once_and_none_that_tests_have_already() -> None:
    names = [one.name for one in ZOO]
    assert len(names) >= 20
    assert len(set(names)) == len(names)
    assert not set(names) & (set(LEFT_OUT) | set(models.ARCHITECTURES))
    assert all(re.fullmatch(r"[a-z0-9-]+", name) for name in names)  # they name folders


def test_other_settings_are_another_checkpoint() -> None:
    digests = [one.digest for one in ZOO]
    assert len(set(digests)) == len(digests)


def test_widths_are_those_that_attention_on_cpus_takes() -> None:
    looked_at = 0
    for one in ZOO:
        settings = one.settings
        heads, width = settings.get("num_attention_heads"), settings.get("hidden_size")
        head = settings.get("head_dim") or (width // heads if heads and width else 64)
        assert head % 32 == 0, one.name
        looked_at += 1
    assert looked_at >= 20


def test_the_last_layer_is_that_of_each_list() -> None:
    every = tensors(
        "model.embed.weight",
        "model.layers.0.up.weight",
        "model.layers.9.up.weight",
        "model.layers.10.experts.0.up.weight",
        "model.layers.10.experts.1.up.weight",
        "vision.blocks.0.weight",
        "vision.blocks.1.weight",
    )
    assert [tensor.name for tensor in last_layer(every)] == [
        "model.layers.10.experts.0.up.weight",
        "model.layers.10.experts.1.up.weight",
        "vision.blocks.1.weight",
    ]


def test_without_layers_there_is_no_part() -> None:
    with pytest.raises(ValueError, match="no tensor's name has the number of a layer"):
        last_layer(tensors("up.weight", "down.weight"))


def test_only_prompts_that_tell_all_versions_apart_are_asked() -> None:
    versions = [probes(a=1, b=1, c=1), probes(a=2, b=2), probes(a=3, b=1, c=3)]
    assert told_apart(versions) == [[ord("a")]]


def test_versions_that_answer_alike_prove_nothing() -> None:
    with pytest.raises(Unanswered, match="no prompt tells its versions apart"):
        told_apart([probes(a=1), probes(a=1)])


EQUAL_ROW = Row(
    "one",
    "",
    [
        Switch("v1", "Beside", "Beside", EQUAL, 0.05),
        Switch("v0", "InPause", "", REFUSED, None, "InsufficientMemory: no part"),
        Switch("v0", "Auto", "Beside", EQUAL, 0.5),
    ],
    "1 of 3",
)


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (EQUAL_ROW, EQUAL),
        (Row("two", "", refused="it answers no tokens"), REFUSED),
        (Row("three", "", not_run="a width"), NOT_RUN),
        (Row("five", "", [Switch("v1", "Beside", "Beside", FAILED)]), FAILED),
        (Row("four", "", not_run="a width", failed="other tokens"), FAILED),
    ],
)
def test_a_row_in_one_word(row: Row, expected: str) -> None:
    assert row.result() == expected


def test_the_table_has_the_worst_of_each_way_and_its_longest_pause() -> None:
    made = table([EQUAL_ROW])
    assert [next(iter(column.cells)) for column in made.columns] == [
        "one",
        "equal 500 ms",
        "refused",
        "-",
        "1 of 3",
        "equal",
    ]


def test_the_part_is_that_of_the_version_that_changed_least() -> None:
    line = "sha256:0123 differs from what serves in {} of 12 parts of the model\n"
    assert smallest_part(line.format(9) + line.format(10) + "INFO\n") == "9 of 12"
    assert smallest_part("INFO\n") == ""


def test_what_was_refused_is_said_in_its_own_words_and_once() -> None:
    row = Row("one", "", EQUAL_ROW.switches * 2)
    assert remarks([row]) == ["one, InPause: InsufficientMemory: no part"]
