"""`benchmarks.floors` on a GPU: every workload's parts run on tiny shapes, and products are what they are said to be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benchmarks import floors, scale
from benchmarks.floor_work import Product
from nemo_automodel.kernels.fp8 import has_units

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda")


@pytest.mark.parametrize("name", floors.CASES)
def test_every_part_runs(name):
    case = floors.CASES[name]
    if case.fp8 and not has_units(CUDA):
        pytest.skip("no FP8 products")
    case = replace(case, workload=scale.SMALL if name == "C" else case.workload.tiny())
    rows = list(floors.run_case(name, case, 0.02, 4.0, CUDA))
    assert not [row["failed"] for row in rows if "failed" in row]
    assert rows[-1]["part"] == "sum"
    assert all(row["ms"] >= 0 for row in rows)


@pytest.mark.parametrize("kind", ["forward", "dX"])
def test_fp8_product_of_quantised_operands_is_that_of_the_numbers(kind):
    if not has_units(CUDA):
        pytest.skip("no FP8 products")
    operands = floors.Operands(CUDA)
    fp8 = operands.call(Product("layer", kind, 256, 512, 768, fp8=True))
    rows, columns = (512, 768) if kind == "dX" else (768, 512)
    x, weight = operands._numbers("", 256, columns), operands._numbers("layer", rows, columns)
    wanted = x.double() @ weight.double().t()
    assert fp8().shape == wanted.shape
    assert ((fp8().double() - wanted).norm() / wanted.norm()).item() < 0.06  # both operands rounded: 0.0375


@pytest.mark.parametrize("kind", ["forward", "dX", "dW"])
def test_bf16_products_have_the_shapes_of_a_linear_layer(kind):
    shape = {"forward": (256, 768), "dX": (256, 512), "dW": (768, 512)}[kind]
    assert floors.Operands(CUDA).call(Product("layer", kind, 256, 512, 768))().shape == shape


def test_a_chunk_adds_to_the_fp32_gradient_of_the_head():
    operands = floors.Operands(CUDA)
    first, second = (operands.call(Product("head", "dW", 256, 512, 768, beta=beta)) for beta in (0, 1))
    total = operands._room(torch.float32, 768, 512)
    first()
    once = total.clone()
    second()
    torch.testing.assert_close(total, 2 * once)
    assert total.abs().max() > 0
