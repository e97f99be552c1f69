"""The list of mutants: one line of the operator made wrong, and one sentence that says what users
would see of it.

They stand in the ``.txt`` files beside this one, in the form of a diff without context. A mutant
must fit exactly one place of its file; so the list cannot rot silently when the operator changes.

    == its name | file of the operator | the test file that kills it
    What would be wrong.
    Equivalent: why nobody could tell it from the original (only where that is so).
    -the old text, or a part of a line
    +the new text; nothing: it is taken out
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PACKAGE = HERE.parents[2] / "operator" / "hotweights_operator"


class Misfit(ValueError):
    """A mutant that does not fit the operator as it is: find out what became of its line, or take
    it out.
    """


@dataclass(frozen=True, slots=True)
class Mutant:
    """A change that some test must notice."""

    name: str
    file: str
    killer: str  # the test file that kills it; empty: none is known
    wrong: str
    old: str
    new: str
    equivalent: str = ""  # why it is no mutant at all

    def applied(self, text: str) -> str:
        """The file's text with the mutant in it. Raises `Misfit` unless there is exactly one place
        for it, and Python in the end.
        """
        if (count := text.count(self.old)) != 1:
            raise Misfit(
                f"{self.name}: {self.file} has its old text {count} times, not once: {self.old!r}"
            )
        mutated = text.replace(self.old, self.new)
        try:
            compile(mutated, self.file, "exec")
        except SyntaxError as error:
            raise Misfit(f"{self.name}: {self.file} would be no Python: {error}") from error
        return mutated


def everything() -> list[Mutant]:
    """All mutants, in the order of the files' names. Raises `Misfit` for what is not written as it
    must be.
    """
    found = [mutant for path in sorted(HERE.glob("*.txt")) for mutant in _read(path)]
    names = [mutant.name for mutant in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Misfit(f"two mutants have the same name: {sorted(twice)}")
    return found


def _read(path: Path) -> list[Mutant]:
    blocks = path.read_text().split("\n== ")
    return [_parse(f"{path.name}, {block.splitlines()[0]}", block) for block in blocks[1:]]


def _parse(place: str, block: str) -> Mutant:
    head, *lines = block.rstrip("\n").splitlines()
    try:
        name, file, killer = (part.strip() for part in head.split("|"))
    except ValueError as error:
        raise Misfit(f"{place}: the first line is: == name | file | test file") from error
    old = [line[1:] for line in lines if line.startswith("-")]
    new = [line[1:] for line in lines if line.startswith("+")]
    said = [line for line in lines if line and line[0] not in "-+"]
    reasons = [
        line.removeprefix("Equivalent: ") for line in said if line.startswith("Equivalent: ")
    ]
    wrong = " ".join(line for line in said if not line.startswith("Equivalent: "))
    if not old or not wrong or old == new:
        raise Misfit(f"{place}: it needs a sentence, an old text and another new one")
    return Mutant(name, file, killer, wrong, "\n".join(old), "\n".join(new), " ".join(reasons))
