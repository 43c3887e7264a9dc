"""The user's cache directory: what can be made again, and should not have to be."""

import os
from pathlib import Path


def cache_directory() -> Path:
    """$XDG_CACHE_HOME/ringserve or ~/.cache/ringserve; not necessarily there yet."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ringserve"
