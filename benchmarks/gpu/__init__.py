"""minifuse beside transformers on one GPU: `python -m benchmarks.gpu --help`."""
