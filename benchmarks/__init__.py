"""Measurements, each a command: `python -m benchmarks.NAME`. Ratios within one run are what they are for; machines
differ."""
