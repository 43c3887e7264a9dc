"""What must be settled before any test module is imported.

Property tests repeat their examples: a failure that chance brings is found while looking for it (`pytest
--hypothesis-profile explore` draws new ones), not by who comes next. How Triton runs is decided when it is imported,
and other libraries import it.
"""

import os
from pathlib import Path

from hypothesis import settings

settings.register_profile("repeat", derandomize=True)
settings.register_profile("explore")
settings.load_profile("repeat")

if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")
