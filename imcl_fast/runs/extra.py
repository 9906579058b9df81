"""The libraries that the commands need and the losses don't: the extra ``train``."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from importlib.util import find_spec

# What is installed by that name, of those that go with any torch: torchvision is of one.
PACKAGES = {
    "tabulate": "tabulate",
    "tqdm": "tqdm",
    "sklearn": "scikit-learn",
    "scipy": "scipy",
    "matplotlib": "matplotlib",
}


@contextlib.contextmanager
def needed_by(command: str) -> Iterator[None]:
    """Around what a command imports: where a library is missing, a line that names all that are
    ends the process."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name not in PACKAGES:
            raise
        names = " ".join(PACKAGES[name] for name in PACKAGES if find_spec(name) is None)
        print(
            f"{command}: of the extra `train` not everything is installed: pip install {names}",
            file=sys.stderr,
        )
        sys.exit(2)
