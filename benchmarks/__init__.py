"""How good dyncompile is, and where it is not: `python -m benchmarks` lists what is measured."""
