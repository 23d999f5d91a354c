"""How likely gold answers are under many ways to fuse: `python -m benchmarks.fusion_study`."""
