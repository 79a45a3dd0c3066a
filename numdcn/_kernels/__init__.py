"""Compiled code. A suffix names the hardware (`_cpu`, `_cuda`); no suffix means both."""
