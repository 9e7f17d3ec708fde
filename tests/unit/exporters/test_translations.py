"""Operators that we translate to ONNX ourselves: onnxruntime gives what torch gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from mfcompile.errors import ExportError
from mfcompile.exporters.conversion import convert_program
from mfcompile.exporters.onnx_files import plan_files, write_files
from mfcompile.graph import ExportedModel
from mfcompile.inputs import normalize_inputs
from mfcompile.operators import grouped_mm

RTOL, ATOL = 1e-4, 1e-5

generator = torch.Generator().manual_seed(0)
CUBE = torch.randn(3, 5, 7, generator=generator)
TIES = torch.randint(0, 4, (3, 9), generator=generator)
MASK = torch.randn(3, 7, generator=generator) > 0
COUNT = int(MASK.sum())
SYSTEM = torch.randn(2, 5, 5, generator=generator) + torch.eye(5).flip(0)  # a pivot that is not on the diagonal
HEADS = torch.randn(2, 4, 3, 8, generator=generator)
BLIND = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])


class Body(nn.Module):
    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body

    def forward(self, *given: Tensor) -> Any:
        return self.body(*given)


def exported(body: Callable[..., Any], given: tuple[Tensor, ...]) -> ExportedModel:
    module = Body(body)
    program = torch.export.export(module, given, strict=False)
    inputs = normalize_inputs(module, given)
    return ExportedModel(program, "torch.export", inputs.names, (), {}, inputs)


def run(body: Callable[..., Any], given: tuple[Tensor, ...], folder: Path) -> list[Tensor]:
    model = convert_program(exported(body, given))
    path = folder / "model.onnx"
    write_files(plan_files(model, None), path, None)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    results = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)})
    return [torch.from_numpy(result) for result in results]


def attend(mask: Tensor) -> Callable[..., Tensor]:
    def body(heads: Tensor, given: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(heads, heads.flip(0), heads, attn_mask=given.to(mask.dtype))

    return body


CASES: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...]]] = {
    "cummax": (lambda x: tuple(x.cummax(1)), (CUBE,)),
    "cummax of equals": (lambda x: tuple(x.cummax(-1)), (TIES,)),
    "cummin": (lambda x: tuple(x.cummin(0)), (TIES,)),
    "gelu": (nn.functional.gelu, (CUBE * 3,)),
    "gelu by tanh": (lambda x: nn.functional.gelu(x, approximate="tanh"), (CUBE * 3,)),
    "cumprod": (lambda x: x.cumprod(2), (CUBE,)),
    "stable sort": (lambda x: tuple(x.sort(dim=1, stable=True, descending=True)), (TIES,)),
    "stable sort of bools": (lambda x: tuple(x.sort(dim=1, stable=True)), (MASK,)),
    "searchsorted": (lambda s, v: torch.searchsorted(s, v, right=True), (CUBE.sort(-1)[0], CUBE[..., :2] * 0.9)),
    "searchsorted of equals": (lambda s, v: torch.searchsorted(s, v), (TIES.sort(-1)[0], TIES)),
    "bucketize": (lambda v, s: torch.bucketize(v, s, out_int32=True), (CUBE, torch.linspace(-1, 1, 5))),
    "solve": (torch.linalg.solve, (SYSTEM, CUBE[:2, :, :3].contiguous())),
    "solve for a vector": (torch.linalg.solve, (SYSTEM, CUBE[:2, :, 0].contiguous())),
    "inverse": (torch.linalg.inv, (SYSTEM,)),
    "solve lower": (
        lambda a, b: torch.linalg.solve_triangular(a, b, upper=False, unitriangular=True),
        (SYSTEM / 4, SYSTEM.flip(1)),
    ),
    "solve upper": (lambda a, b: torch.linalg.solve_triangular(a + 3 * torch.eye(5), b, upper=True), (SYSTEM, SYSTEM.flip(1))),
    "masked_fill of bools": (lambda x, m: x.masked_fill(m, True), (MASK, MASK.roll(1))),
    "masked_fill": (lambda x, m: x.masked_fill(m, -1.5), (CUBE, CUBE > 0)),
    "masked_fill of integers": (lambda x, m: x.masked_fill(m, torch.tensor(3)), (TIES, TIES > 1)),
    "where of bools": (torch.where, (MASK, MASK.roll(1), ~MASK)),
    "number minus integers": (lambda x: 1.5 - x, (TIES,)),
    "rsub": (lambda x: torch.rsub(x, 2.0, alpha=3), (CUBE,)),
    "nonzero_static": (lambda x: torch.nonzero_static(x, size=COUNT), (MASK,)),
    "nonzero_static, padded": (lambda x: torch.nonzero_static(x, size=COUNT + 2, fill_value=7), (MASK,)),
    "squeeze of what is not 1": (lambda x: x.squeeze(1) + 1, (CUBE,)),
    "squeeze of some": (lambda x: x.unsqueeze(0).squeeze((0, 2)) + 1, (CUBE,)),
    "cdist": (torch.cdist, (CUBE, CUBE[:, :4] + 1)),
    "multinomial takes each once": (lambda x: x.multinomial(5).sort(-1)[0], (torch.ones(3, 5),)),
    "grouped product": (
        grouped_mm,
        (CUBE[0], torch.randn(4, 7, 2, generator=generator), torch.tensor([2, 2, 4, 5], dtype=torch.int32)),
    ),
    "attention of a blind query": (attend(BLIND), (HEADS, BLIND)),
    "attention of a blind query, added mask": (
        attend(torch.zeros(1)),
        (HEADS, torch.zeros(3, 3).masked_fill(~BLIND, float("-inf"))),
    ),
    "an idle cast is the output": (lambda x: (x + 1).to(torch.float32).to(torch.float32), (CUBE,)),
}


@pytest.mark.parametrize(("body", "given"), CASES.values(), ids=CASES.keys())
def test_onnxruntime_gives_what_torch_gives(body: Callable[..., Any], given: tuple[Tensor, ...], tmp_path: Path) -> None:
    expected = body(*given)
    expected = list(expected) if isinstance(expected, tuple) else [expected]
    found = run(body, given, tmp_path)
    assert len(found) == len(expected)
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(left, right, rtol=RTOL, atol=ATOL)


def test_groups_are_read_when_the_model_runs(tmp_path: Path) -> None:
    weights = torch.randn(3, 7, 2, generator=generator)
    given = (CUBE[0], weights, torch.tensor([1, 3, 5], dtype=torch.int32))
    model = convert_program(exported(grouped_mm, given))
    path = tmp_path / "model.onnx"
    write_files(plan_files(model, None), path, None)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    for ends in ([0, 0, 5], [5, 5, 5], [2, 4, 5]):
        other = (*given[:2], torch.tensor(ends, dtype=torch.int32))
        (found,) = session.run(None, {name: tensor.numpy() for name, tensor in zip(names, other, strict=True)})
        torch.testing.assert_close(torch.from_numpy(found), grouped_mm(*other), rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_grouped_product_is_torchs(dtype: torch.dtype) -> None:
    rows, weights = torch.randn(5, 8, dtype=dtype), torch.randn(3, 8, 16, dtype=dtype)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    expected = torch.cat([rows[:2] @ weights[0], rows[2:] @ weights[2]])
    torch.testing.assert_close(grouped_mm(rows, weights, ends), expected)


def test_what_is_not_translated_is_refused_with_a_reason() -> None:
    with pytest.raises(ExportError, match=r"cannot be converted to ONNX: a system of 70 equations is too large"):
        convert_program(exported(torch.linalg.solve, (torch.eye(70), torch.ones(70, 1))))
    with pytest.raises(ExportError, match="several samples with replacement"):
        convert_program(exported(lambda x: x.multinomial(3, replacement=True), (torch.ones(2, 5),)))


@pytest.mark.parametrize(("approximate", "kernel"), [("none", "Gelu"), ("tanh", "FastGelu")])
def test_onnxruntime_runs_gelu_as_one_kernel(approximate: str, kernel: str, tmp_path: Path) -> None:
    model = convert_program(exported(lambda x: nn.functional.gelu(x.exp(), approximate=approximate).abs(), (CUBE,)))
    path, optimized = tmp_path / "model.onnx", tmp_path / "optimized.onnx"
    write_files(plan_files(model, None), path, None)
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.optimized_model_filepath = 3, str(optimized)
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    operators = {node.op_type for node in onnx.load(optimized).graph.node}
    assert kernel in operators
    assert not operators & {"Erf", "Tanh"}
