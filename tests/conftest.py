"""The same examples at each run: a failure that chance brings is found while looking for it, not by who comes next.

`pytest --hypothesis-profile explore` draws new ones."""

from hypothesis import settings

settings.register_profile("repeat", derandomize=True)
settings.register_profile("explore")
settings.load_profile("repeat")
