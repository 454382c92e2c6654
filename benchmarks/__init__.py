"""Benchmarks of relay. Figures, not tests: `python -m benchmarks`. See README.md beside this file."""
