"""What numdcn is compared with, and what the harness asks of each: imports nothing else of the benchmarks."""
