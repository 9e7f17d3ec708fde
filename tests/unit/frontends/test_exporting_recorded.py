"""Programs made from recordings: what stops torch.export in a model's code does not stop them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from mfcompile.frontends.capture import capture
from mfcompile.frontends.constant_folding import fold_constants
from mfcompile.frontends.exporting import candidates
from mfcompile.frontends.recorder import record, replay
from mfcompile.graph import ExportedModel
from mfcompile.inputs import normalize_inputs, output_tensors

RTOL, ATOL = 1e-5, 1e-6
LAST_BUT_ONE = "transformers.exporters, shapes fixed"

GENERATOR = torch.Generator().manual_seed(0)


class Body(nn.Module):
    positions: Tensor

    def __init__(self, body: Callable[..., Any]) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(1, 4, 3, 3, generator=GENERATOR))
        self.experts = nn.Parameter(torch.randn(3, 4, 8, generator=GENERATOR))
        self.register_buffer("positions", torch.arange(6.0))

    def forward(self, image: Tensor, sizes: Tensor) -> Any:
        return self.body(self, image, sizes)


def branch(m: Any, image: Tensor, sizes: Tensor) -> Any:
    """A branch that follows from data."""
    return m.linear(image) if sizes.sum() > 2 else image


def interpolate(m: Any, image: Tensor, sizes: Tensor) -> Any:
    """Positions resized to a size that is read from a mask."""
    height, width = int(sizes[0, 0]), int(sizes[0, 1])
    table = nn.functional.interpolate(m.table, (height, width), mode="bilinear", align_corners=True)
    return m.linear(image) + table.flatten(2).transpose(1, 2)


def walk(m: Any, image: Any, sizes: Tensor) -> Any:
    """A loop on the host over sizes, whose pieces are as long as these say."""
    pieces = image[0].split([height * width // 2 for height, width in sizes.tolist()])
    return torch.cat([m.linear(piece) * (index + 1) for index, piece in enumerate(pieces)])


def scatter(m: Any, image: Tensor, sizes: Tensor) -> Any:
    """Features written into places of a mask, some of them in place and behind another dimension."""
    mask = torch.tensor([True, False, True, True, False, True])
    result = torch.zeros_like(image)
    result[:, mask] = m.linear(image[:, mask])
    result[0, ~mask] = image[0, 0] * 2
    positions = torch.zeros(2, *image.shape[:2], 4)
    positions[:, 0, mask] = image[0, mask]
    positions[0, mask.expand(2, 6)] = image[mask.expand(2, 6)]
    return result + positions.sum(0) + image.masked_select(mask.unsqueeze(1)).sum()


def repeats(m: Any, image: Tensor, sizes: Tensor) -> Any:
    """Rows repeated as often as sizes say, counted, and found again."""
    rows = m.linear(image)[0, :2].repeat_interleave(sizes[:, 0], dim=0)
    where = (sizes > 2).nonzero()
    counts = torch.bincount(sizes.flatten(), minlength=5)
    return rows.sum(0) + where.sum() + counts.sum() + torch.repeat_interleave(sizes[:, 1]).sum()


def experts(m: Any, image: Tensor, sizes: Tensor) -> Any:
    """A grouped product, whose shape function refuses float32."""
    rows = image.flatten(0, 1).sort(0)[0]
    ends = torch.bincount(rows[:, 0].abs().mul(3).long().clamp(max=2), minlength=3).cumsum(0).to(torch.int32)
    return torch._grouped_mm(rows, m.experts, offs=ends)


def written(m: Any, image: Tensor, sizes: Tensor) -> Any:
    """In-place writes into what begins as a constant, read before and after."""
    buffer = torch.zeros(6, 4)
    early = buffer + 1
    buffer[2:4] += m.linear(image)[0, :2]
    mask = torch.ones(6, 6).triu_()
    return mask @ buffer + early + m.positions.cos().unsqueeze(1)


def constant_output(m: Any, image: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """An output that no input reaches, read by another as well."""
    grid = torch.arange(4.0).cos()
    return m.linear(image) + grid, grid


BODIES = [constant_output, branch, interpolate, walk, scatter, repeats, experts, written]


def inputs(seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"image": torch.randn(2, 6, 4, generator=generator), "sizes": torch.tensor([[2, 3], [2, 3]])}


def recorded(model: nn.Module, given: dict[str, Tensor]) -> ExportedModel:
    ((attempt, found),) = candidates(capture(model, given), after=LAST_BUT_ONE)
    assert found is not None, attempt
    assert found.route == "recorded graph"
    return found


@pytest.mark.parametrize("body", BODIES)
def test_recordings_are_exported(body: Callable[..., Tensor]) -> None:
    model = Body(body).eval()
    found = recorded(model, inputs())
    for seed in (0, 1):
        given = inputs(seed)
        with torch.no_grad():
            expected, computed = output_tensors(model(**given)), output_tensors(found.program.module()(**given))
        for name, tensor in expected.items():
            torch.testing.assert_close(computed[name], tensor, rtol=RTOL, atol=ATOL)


def test_weights_keep_their_names_and_their_memory() -> None:
    model = Body(walk).eval()
    state = recorded(model, inputs()).program.state_dict
    assert state["linear.weight"].data_ptr() == model.linear.weight.data_ptr()
    assert state["linear.bias"].data_ptr() == model.linear.bias.data_ptr()


def folded(body: Callable[..., Tensor]) -> tuple[fx.GraphModule, fx.GraphModule]:
    recording = record(Body(body).eval(), normalize_inputs(Body(body), inputs()))
    return recording.graph_module, fold_constants(recording.graph_module)


def targets(graph_module: fx.GraphModule) -> list[str]:
    return [str(node.target) for node in graph_module.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("body", BODIES)
def test_folding_changes_no_value(body: Callable[..., Tensor]) -> None:
    before, after = folded(body)
    text = str(before.graph)
    for seed in (0, 1):
        given = normalize_inputs(Body(body), inputs(seed))
        for left, right in zip(replay(before, given), replay(after, given), strict=True):
            assert torch.equal(left, right)
    assert str(before.graph) == text


def test_what_no_input_reaches_is_folded_and_weights_are_not() -> None:
    def body(m: Any, image: Tensor, sizes: Tensor) -> Any:
        causal = torch.ones(6, 6).triu_(1).bool()
        return (image + m.table[0, :, 0, :1].T.cos() + m.positions.cos().sum()).masked_fill(causal[0, :, None], 0.0)

    _, after = folded(body)
    assert not [name for name in targets(after) if "triu" in name or "ones" in name]
    assert [name for name in targets(after) if "cos" in name] == ["aten.cos.default"], "the parameter's, not the buffer's"


def test_random_numbers_are_not_folded() -> None:
    def body(m: Any, image: Tensor, sizes: Tensor) -> Any:
        return image + torch.randn(4) * torch.full((4,), 2.0)

    _, after = folded(body)
    assert [name for name in targets(after) if "randn" in name]
    given = normalize_inputs(Body(body), inputs())
    assert not torch.equal(replay(after, given)[0], replay(after, given)[0])


def test_what_nothing_reads_is_dropped_with_assertions() -> None:
    def body(m: Any, image: Tensor, sizes: Tensor) -> Any:
        torch._assert_async((sizes > 0).all())
        m.linear(image).add_(1)
        result: Tensor = image * 2
        return result

    _, after = folded(body)
    assert targets(after) == ["aten.mul.Tensor"]
