"""Speed of this package beside its peers: `python -m benchmarks.speed`."""
