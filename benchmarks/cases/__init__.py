"""The operators: one file each, with its cases, inputs, contenders and a float64 reference; operators.py lists them."""
