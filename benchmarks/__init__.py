"""The benchmark of numdcn: `python benchmarks/run.py`."""
