"""Benchmarks: the command `diffkern bench`, and what the scripts in benchmarks/ share with it."""
