"""What a cold load of a checkpoint answers: the truth that a switched engine is compared with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from e2e.engine.launch import PROMPTS, TOKENS
from e2e.zoo.forks import Forks, Unanswered
from localcluster import paths

Probes = list[dict[str, Any]]


def golden(cold: Forks, model: Path) -> Probes:
    """The probes that a batch and a prompt alone answer alike; kept beside the checkpoint. ``cold``
    runs `inside.cold`. Raises `Unanswered`.
    """
    record = model.with_name(f"{model.name}.golden.json")
    if not record.exists():
        answer = cold.ask({"model": str(model), "prompts": PROMPTS, "tokens": TOKENS})
        paths.write_atomically(record, json.dumps(answer["probes"]))
    found: Probes = json.loads(record.read_text())
    return found


def told_apart(versions: Sequence[Probes]) -> list[list[int]]:
    """The prompts that every version was asked and no two answer alike: by any other an engine
    could serve either. Raises `Unanswered` where there is none.
    """
    by_prompt = [
        {tuple(probe["promptTokenIds"]): tuple(probe["tokenIds"]) for probe in probes}
        for probes in versions
    ]
    found = [
        [*prompt]
        for prompt in by_prompt[0]
        if all(prompt in answers for answers in by_prompt)
        and len({answers[prompt] for answers in by_prompt}) == len(by_prompt)
    ]
    if not found:
        raise Unanswered("no prompt tells its versions apart: whatever was served, it would pass")
    return found
