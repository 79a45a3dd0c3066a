"""What numdcn is compared with, and what the harness needs from each; imports nothing else of the benchmarks."""
