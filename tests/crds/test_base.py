"""What every custom resource shares."""

import pytest

from hotweights_crds.base import human_size


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0B"),
        (1023, "1023B"),
        (1024, "1.0KiB"),
        (2**20 - 1, "1.0MiB"),
        (13 * 2**30 + 2**29, "13.5GiB"),
        (3000 * 2**40, "3000.0TiB"),
    ],
)
def test_sizes_for_people(nbytes: int, text: str) -> None:
    assert human_size(nbytes) == text
