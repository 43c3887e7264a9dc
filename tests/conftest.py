"""Before any test module is imported: how Triton runs is decided when it is imported, and other libraries import it."""

import os
from pathlib import Path

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
