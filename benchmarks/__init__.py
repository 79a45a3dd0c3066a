"""The benchmarks of numdcn: `python benchmarks/run.py` on a CPU, `python -m benchmarks.gpu` on a GPU.

Imports go one way: run.py -> harness -> cases -> rivals, and gpu -> harness and cases.
"""
