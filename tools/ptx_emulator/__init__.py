"""A CUDA driver that runs PTX on a CPU, so that real kernels can be tested without a GPU: see README.md."""
