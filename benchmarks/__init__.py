"""Side-by-side runs against other engines: python -m benchmarks.NAME."""
