"""Reference implementations that tests compare with: NumPy loops from the formulas, never importing numdcn."""
