"""A plugin of pytest: an example that Hypothesis has drawn and that fails isn't made smaller,
which takes most of the time there. Nobody is going to read it."""

from __future__ import annotations

from hypothesis import Phase, settings


def pytest_configure() -> None:
    settings.register_profile(
        "unshrunk", settings.default, phases=(Phase.explicit, Phase.generate)
    )
    settings.load_profile("unshrunk")
