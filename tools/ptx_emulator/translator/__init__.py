"""PTX, the assembler of NVIDIA's GPUs, to C.

Each kernel becomes a C function that is one thread; registers are its local variables. What touches memory or other threads
calls the functions of kernel/*.h with the line of the PTX, for reports.
"""
