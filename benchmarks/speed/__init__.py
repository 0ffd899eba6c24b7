"""Speed of this package and of its peers, in the same run: `python -m benchmarks.speed`."""
