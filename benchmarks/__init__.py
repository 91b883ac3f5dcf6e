"""Measurements, as ratios to the floor of the same run. Shown, never asserted: see docs/benchmarks.md."""
