"""The operators, one file each, with cases, inputs, contenders and a float64 reference; listed in operators.py."""
