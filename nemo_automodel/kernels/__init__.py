"""Kernels and their fp32 oracles. They import nothing of the rest of the package."""
