"""Everything that needs a GPU, one command: `python -m benchmarks.gpu`; see run.py."""
