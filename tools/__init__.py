"""Tools that stand on their own: they know nothing of numdcn."""
