"""The very scheduler, block pool, prefix cache and cost model of the server, on a clock that costs nothing.

    python -m ringserve.simulate --loads 0.8 1.0 1.2 --seconds 3600 --chart docs/images/policies.svg
"""
