"""The plugin's modules under vLLM's own Python, which has torch: no engine is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from e2e.engine.seed_world import INSIDE, ROOT, run_inside


@pytest.mark.parametrize("checks", sorted(path.name for path in INSIDE.glob("checks_*.py")))
def test_modules_of_torch(checks: str, tmp_path: Path) -> None:
    """Under vLLM's Python, which has torch, with the pytest of this environment."""
    here = Path(pytest.__file__).parents[1]
    start = (
        f"import sys; sys.path.append({str(here)!r}); import pytest; "
        "sys.exit(pytest.main(sys.argv[1:]))"
    )
    run_inside(
        tmp_path,
        "-c",
        start,
        "-p",
        "no:cacheprovider",
        f"--rootdir={ROOT}",
        f"-c{ROOT / 'pyproject.toml'}",
        "-W",
        "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",  # on import of vLLM
        str(INSIDE / checks),
    )
