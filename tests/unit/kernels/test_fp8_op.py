"""Runs ``interpreted_fp8.py``."""

from tests.unit.kernels.interpreter import require_passes


def test_the_fp8_kernel_in_tritons_interpreter():
    require_passes("interpreted_fp8.py")
