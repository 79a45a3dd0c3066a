"""numdcn inside other frameworks: one module for each, which imports it. `import numdcn` imports none of them."""
