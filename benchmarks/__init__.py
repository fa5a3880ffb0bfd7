"""How fast the engine is, beside its floor and its rivals. Run as `python -m benchmarks`."""
