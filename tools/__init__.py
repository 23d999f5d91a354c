"""Commands around models: `python -m tools.NAME`. They parse, call the package, and print."""
