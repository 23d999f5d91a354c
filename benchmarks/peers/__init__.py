"""The race against other engines, for the same answers: `python -m benchmarks.peers --help`."""
