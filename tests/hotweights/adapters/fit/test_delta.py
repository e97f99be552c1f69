"""What of a model a version changes, in parts that are finished as a whole."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from hotweights.adapters.vllm.rank.fit import delta
from hotweights.adapters.vllm.rank.fit.dry_load import Trace

GROUPS = {"embed": "embed", "0.qkv": "0", "0.scale": "0", "1.qkv": "1", "head": "head"}
SOURCES = {
    "embed": frozenset({"E"}),
    "0.qkv": frozenset({"0q", "0k"}),
    "1.qkv": frozenset({"1q", "1k"}),
    "head": frozenset({"H"}),
}
NAMES = {"E", "0q", "0k", "1q", "1k", "H", "rotary"}


def part(
    *changed: str, unexplained: frozenset[str] = frozenset(), **trace: object
) -> delta.Delta | None:
    found = Trace(sources=SOURCES, **trace)  # type: ignore[arg-type]
    return delta.between(frozenset(changed), NAMES, found, GROUPS, unexplained)


def test_a_part_is_loaded_from_all_of_its_tensors() -> None:
    assert part("0k") == delta.Delta(frozenset({"0"}), frozenset({"0q", "0k"}))


def test_a_version_that_changes_nothing_is_there_already() -> None:
    assert part() == delta.Delta(frozenset(), frozenset())


def test_what_no_loader_uses_changes_nothing() -> None:
    assert part("rotary") == delta.Delta(frozenset(), frozenset())


def test_what_may_have_filled_a_parameter_unseen_is_given_to_the_loaders() -> None:
    odd = frozenset({"0.scale"})
    assert part("rotary", unexplained=odd) is None
    assert part("0k", unexplained=odd) == delta.Delta(
        frozenset({"0"}), frozenset({"0q", "0k", "rotary"})
    )


def test_a_tensor_of_several_parts_joins_them() -> None:
    shared = Trace(sources={**SOURCES, "1.qkv": frozenset({"1q", "0q"})})
    assert delta.between(frozenset({"0k"}), NAMES, shared, GROUPS, ()) == delta.Delta(
        frozenset({"0", "1"}), frozenset({"0q", "0k", "1q"})
    )


def test_where_anything_is_unknown_it_is_all_of_the_version() -> None:
    assert part("0k", failed="0k") is None
    assert part("0k", read={"1k"}) is None, "its value may have chosen the other"
    assert part("0k", opaque=True) is None
    assert part("new") is None
    assert part("E", "0q", "1q", "H") is None, "that is all of it"


@given(
    st.dictionaries(
        st.sampled_from(sorted(GROUPS)),
        st.frozensets(st.sampled_from(sorted(NAMES)), min_size=1),
    ),
    st.frozensets(st.sampled_from(sorted(NAMES))),
)
def test_whatever_a_changed_tensor_reaches_is_done_from_everything_it_comes_from(
    sources: dict[str, frozenset[str]], changed: frozenset[str]
) -> None:
    found = delta.between(changed, NAMES, Trace(sources=sources), GROUPS, ())
    for target, origins in sources.items():
        if found is not None and origins & changed:
            assert GROUPS[target] in found.groups
        if found is not None and GROUPS[target] in found.groups:
            assert origins <= found.tensors
        if found is not None and GROUPS[target] not in found.groups:
            assert not origins & found.tensors
