"""Where golden tokens end: before the first step that another machine may take otherwise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from hotweights.adapters.vllm import golden, probe
from hotweights.adapters.vllm.errors import CommitError
from hotweights.adapters.vllm.probe import ProbePrompts

NAN = float("nan")


def answer(tokens: list[int], gaps: list[float]) -> dict[str, Any]:
    return {"tokens": tokens, "nan": False, "gaps": gaps}


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (([1, 2, 3], [9.0, 9.0, 9.0]), ([1, 2, 3], [9.0, 9.0, 9.0]), [1, 2, 3]),
        (([1, 2, 3], [9.0, 0.4, 9.0]), ([1, 2, 3], [9.0, 9.0, 9.0]), [1]),
        (([1, 2, 3], [9.0, 9.0, 9.0]), ([1, 2, 3], [9.0, 9.0, 0.4]), [1, 2]),
        (([1, 2, 3], [9.0, 9.0, 9.0]), ([1, 7, 8], [9.0, 9.0, 9.0]), [1]),
        (([1, 2, 3], [0.5, 0.5, 0.5]), ([1, 2, 3], [0.5, 0.5, 0.5]), [1, 2, 3]),
        (([1, 2, 3], [0.0, 9.0, 9.0]), ([1, 2, 3], [9.0, 9.0, 9.0]), []),
        (([1, 2, 3], [9.0, NAN, 9.0]), ([1, 2, 3], [9.0, 9.0, 9.0]), [1]),
    ],
    ids=["clear", "near in the batch", "near alone", "differ", "just clear", "at once", "no gap"],
)
def test_tokens_end_before_the_first_near_tie(
    first: tuple[list[int], list[float]],
    second: tuple[list[int], list[float]],
    expected: list[int],
) -> None:
    assert golden.sure_tokens([answer(*first), answer(*second)], 0.5) == expected


def test_a_tolerance_of_nothing_cuts_only_where_two_answers_differ() -> None:
    assert golden.sure_tokens([answer([1, 2], [0.0, 0.0]), answer([1, 2], [0.0, 0.0])], 0.0) == [
        1,
        2,
    ]


def test_gaps_that_were_not_asked_for_are_no_reason_to_record_anything() -> None:
    with pytest.raises(ValueError, match="shorter"):
        golden.sure_tokens([answer([1, 2], [])], 0.5)


def test_a_gap_is_that_of_the_two_best_whichever_was_sampled() -> None:
    """As vLLM lists them: the sampled token, then the best ones."""
    rows = [[-0.25, -0.25, -2.25], [-3.0, -0.5, -1.0]]
    assert probe._gaps(SimpleNamespace(logprobs=rows)) == [2.0, 0.5]
    assert probe._gaps(None) == []


def table(*tokens: list[int]) -> list[dict[str, Any]]:
    return [{"engine": "x", "promptTokenIds": [1, 2], "tokenIds": found} for found in tokens]


def answers(*tokens: list[int]) -> list[dict[str, Any]]:
    return [answer(found, []) for found in tokens]


def test_what_comes_after_the_golden_tokens_is_asked_and_not_compared() -> None:
    questions = ProbePrompts.from_table(table([3], [4, 5, 6]))
    assert questions.lengths == [probe.DEFAULT_LENGTH, 3]
    right = probe.right_tokens(answers([3, 99], [4, 5, 6]), questions)
    assert right == [[3], [4, 5, 6]]
    with pytest.raises(CommitError, match=r"probe 0 answered \[9\], expected \[3\]"):
        probe.right_tokens(answers([9, 4], [4, 5, 6]), questions)


def test_what_was_cut_is_not_compared_in_a_repair_either() -> None:
    questions = ProbePrompts.from_table(table([3]))
    tokens = probe.right_tokens(answers([3, 99]), questions)
    again = ProbePrompts(questions.prompts, questions.lengths, tokens)
    assert probe.right_tokens(answers([3, 98]), again) == [[3]]


@pytest.mark.parametrize("probes", [[], table([]), table([], [])])
def test_with_nothing_left_to_compare_the_engine_is_only_run(probes: list[dict[str, Any]]) -> None:
    assert ProbePrompts.from_table(probes) == ProbePrompts.default()
    assert ProbePrompts.from_table(probes).tokens is None


def test_a_prompt_with_nothing_left_is_not_asked() -> None:
    assert ProbePrompts.from_table(table([], [7])).tokens == [[7]]
