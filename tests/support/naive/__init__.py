"""Reference implementations for the tests: NumPy loops written from the formulas, never importing numdcn."""
