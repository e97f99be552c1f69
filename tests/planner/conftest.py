"""Properties are tried often enough to find what they find, and without a clock: the machine may be
busy.
"""

from __future__ import annotations

from hypothesis import settings

settings.register_profile("planner", parent=settings.get_profile("hotweights"), max_examples=50)
settings.load_profile("planner")
