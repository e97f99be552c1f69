"""However many versions came: memory, mappings and slabs stay within what is promised."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hotweights_planner.compaction import Limits, compact, relocated
from hotweights_planner.layout import NewSlab, Place, lay_out
from hotweights_planner.manifest import Manifest, Tensor

PAGE = 4096
SLAB = 16 * PAGE
PROMISED = 1.25  # held, relative to what the versions need
Places = dict[str, Place[Hashable]]


def manifest_of(contents: list[int], per_tensor: int = 10) -> Manifest:
    """Tensors of ``per_tensor`` chunks of one page each, named by the numbers. Not checked and not
    hashed: thousands are made.
    """
    tensors, offset = [], 0
    for at in range(0, len(contents), per_tensor):
        chunks = tuple(f"{content:064x}" for content in contents[at : at + per_tensor])
        nbytes = PAGE * len(chunks)
        tensors.append(
            Tensor.model_construct(
                name=f"t{at}", dtype="U8", shape=(nbytes,), nbytes=nbytes, file="a", offset=offset,
                chunks=chunks,
            )
        )  # fmt: skip
        offset += nbytes
    return Manifest.model_construct(chunk_bytes=PAGE, tensors=tuple(tensors))


@dataclass
class Node:
    """What a store does, without bytes: versions in order, the newest last."""

    limits: Limits
    versions: list[tuple[Manifest, Places]] = field(default_factory=list)
    sizes: dict[Hashable, int] = field(default_factory=dict)
    mappings: list[int] = field(default_factory=list)
    copied_nbytes: int = 0

    def stage(self, manifest: Manifest) -> None:
        plan = compact(
            manifest,
            [places for _, places in reversed(self.versions)],
            self.sizes.__getitem__,
            self.limits,
        )
        made, mappings = self.put(manifest, dict(plan.stays))
        self.mappings.append(mappings)
        self.copied_nbytes += sum(place.nbytes for place in plan.copies.values())
        newer, moved = dict(made), []
        for older, places in reversed(self.versions):
            if any(place.slab in plan.leaves for place in places.values()):
                places, _ = self.put(older, dict(relocated(places, newer, plan.leaves).stays))
            newer = places | newer
            moved.append((older, places))
        self.versions = [*reversed(moved), (manifest, made)]

    def put(self, manifest: Manifest, stays: Places) -> tuple[Places, int]:
        layout = lay_out(manifest, stays, self.limits.max_slab_nbytes)
        slabs: list[Hashable] = []
        for slab in layout.slabs:
            if isinstance(slab, NewSlab):
                slabs.append(("slab", len(self.sizes)))
                self.sizes[slabs[-1]] = slab.nbytes
            else:
                slabs.append(slab)
        places: Places = {
            digest: Place(slabs[index], offset, nbytes)
            for digest, (index, offset, nbytes) in layout.places.items()
        }
        return places, layout.mapping_count

    def release_oldest(self) -> None:
        del self.versions[0]

    @property
    def held(self) -> int:
        return sum(self.sizes[slab] for slab in self.slabs())

    @property
    def held_by_newest(self) -> int:
        """What remains when the older versions have gone."""
        slabs = {place.slab for place in self.versions[-1][1].values()}
        return sum(self.sizes[slab] for slab in slabs)

    @property
    def needed(self) -> int:
        return PAGE * len({digest for _, places in self.versions for digest in places})

    def slabs(self) -> set[Hashable]:
        return {place.slab for _, places in self.versions for place in places.values()}


def scattered(share: float, rng: random.Random) -> Callable[[list[int], int], list[int]]:
    """Every version changes this share of the chunks, anywhere."""

    def change(contents: list[int], new: int) -> list[int]:
        changed = set(rng.sample(range(len(contents)), max(1, round(share * len(contents)))))
        return [new + at if at in changed else old for at, old in enumerate(contents)]

    return change


@pytest.mark.parametrize("share", [0.02, 0.1, 0.5, 1.0])
def test_two_thousand_versions_hold_what_two_need(share: float) -> None:
    chunks, limits = 40, Limits(max_slab_nbytes=5 * PAGE)
    change = scattered(share, random.Random(1))
    node, contents = Node(limits), list(range(chunks))
    node.stage(manifest_of(contents))
    worst, alone, most_slabs, looked = 0.0, 0.0, 0, 0
    for version in range(1, 2000 if share == 0.1 else 500):
        contents = change(contents, version * chunks)
        node.stage(manifest_of(contents))
        if len(node.versions) > 2:
            node.release_oldest()
        worst = max(worst, node.held / node.needed)
        alone = max(alone, node.held_by_newest / (chunks * PAGE))
        most_slabs = max(most_slabs, len(node.slabs()))
        looked += 1
    assert looked >= 499
    assert 1.0 <= worst <= PROMISED
    assert 1.0 <= alone <= 1.5
    assert most_slabs <= 2 * (2 * -(-chunks // 5) + 64)
    # copying is what it costs: less than everything each time
    assert node.copied_nbytes / looked < 0.5 * chunks * PAGE


def test_one_chunk_at_a_time_makes_no_thousand_slabs() -> None:
    node, contents = Node(Limits(max_slab_nbytes=SLAB)), list(range(200))
    node.stage(manifest_of(contents))
    for version in range(1, 400):
        contents[version * 7 % 200] = 1000 + version
        node.stage(manifest_of(contents))
        if len(node.versions) > 2:
            node.release_oldest()
        assert len(node.slabs()) <= 2 * -(-200 * PAGE // SLAB) + 64 + 20
        assert node.held <= PROMISED * node.needed


def test_mappings_are_bounded_though_every_second_chunk_changes_in_turn() -> None:
    most = 40
    node, contents = Node(Limits(max_mappings=most, max_slab_nbytes=SLAB)), list(range(400))
    node.stage(manifest_of(contents))
    for version in range(1, 60):
        contents = [
            version * 1000 + at if (at + version) % 4 == 0 else old
            for at, old in enumerate(contents)
        ]
        node.stage(manifest_of(contents))
        if len(node.versions) > 2:
            node.release_oldest()
    new_slabs = -(-400 * PAGE // SLAB)
    assert max(node.mappings[1:]) <= most + new_slabs


def test_small_equal_tensors_between_others_cost_no_copy() -> None:
    """As INT4 experts are saved: each brings its numbers, and a shape that is the same as all."""
    node, shape = Node(Limits(max_mappings=80, max_slab_nbytes=SLAB)), 7
    for version in range(2):
        contents = [number for expert in range(100, 500) for number in (expert, shape)]
        contents[-2] += version  # one expert changes
        node.stage(manifest_of(contents, per_tensor=1))
    assert node.copied_nbytes == 0
    assert node.mappings[1] <= 80


@given(
    st.lists(st.lists(st.integers(0, 40), min_size=1, max_size=60), min_size=1, max_size=6),
    st.data(),
)
def test_whatever_comes(versions: list[list[int]], data: st.DataObject) -> None:
    """Every chunk of every version has a place of its own size, and the account is right."""
    node = Node(Limits(max_mappings=10**6, max_slab_nbytes=4 * PAGE))
    for contents in versions:
        node.stage(manifest_of(contents))
        for manifest, places in node.versions:
            assert set(places) == {d for tensor in manifest.tensors for d in tensor.chunks}
        used: dict[tuple[Hashable, int], str] = {}
        for _, places in node.versions:
            for digest, place in places.items():
                assert place.offset + PAGE <= node.sizes[place.slab]
                # nobody else's bytes lie there
                assert used.setdefault((place.slab, place.offset), digest) == digest
        if len(node.versions) > 2 or (len(node.versions) > 1 and data.draw(st.booleans())):
            node.release_oldest()
        if len(node.versions) == 2 and shares(node):
            assert node.held <= PROMISED * node.needed


def shares(node: Node) -> bool:
    first, second = (set(places) for _, places in node.versions)
    return bool(first & second)


def test_another_model_is_left_alone() -> None:
    limits = Limits(max_slab_nbytes=SLAB)
    node = Node(limits)
    node.stage(manifest_of(list(range(40))))
    (_, other), before = node.versions[0], dict(node.versions[0][1])
    plan = compact(manifest_of(list(range(100, 140))), [other], node.sizes.__getitem__, limits)
    assert not plan.leaves
    assert not plan.copies
    assert not plan.stays
    assert other == before


def test_what_both_need_is_not_copied() -> None:
    """Half changes, and the old version still needs the other half of its slabs."""
    limits = Limits(max_slab_nbytes=SLAB)
    node = Node(limits)
    node.stage(manifest_of(list(range(40))))
    plan = compact(
        manifest_of([*range(20), *range(100, 120)]),
        [node.versions[0][1]],
        node.sizes.__getitem__,
        limits,
    )
    assert not plan.copies
    assert len(plan.stays) == 20
