"""Translates PTX, the assembly language of NVIDIA's GPUs, to C.

Each kernel becomes a C function that represents one thread; registers are its local variables. Anything that touches
memory or other threads calls the functions of kernel/*.h with the PTX line, for reports.
"""
