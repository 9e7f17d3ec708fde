"""The recorder: every model that runs eagerly replays bit for bit, and what the graph is fixed to is listed."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mfcompile.errors import CaptureError
from mfcompile.frontends.recorder import Recording, _Recorder, record, replay, tensor_aliases
from mfcompile.graph import ModuleCall, module_stack, tensor_values
from mfcompile.inputs import ExampleInputs, normalize_inputs, output_tensors
from tests.models import TwoLayers, tiny_vlm, vlm_batch


class Written(nn.Module):
    """Parameters, buffers and a plain attribute, and a function that uses them."""

    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body = body
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        self.register_buffer("table", torch.arange(12.0).view(3, 4))
        self.plain = torch.arange(4.0)

    def forward(self, image: Tensor) -> Any:
        return self.body(self, image)


def image(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(seed))


def recorded(model: nn.Module, inputs: Any) -> tuple[Recording, ExampleInputs]:
    normalized = normalize_inputs(model, inputs)
    return record(model, normalized), normalized


def eager(model: nn.Module, inputs: ExampleInputs) -> list[Tensor]:
    """Outputs of a second object, so that what the model writes stays in it."""
    own, given = copy.deepcopy(model), inputs.map_tensors(lambda _, tensor: tensor.clone())
    with torch.inference_mode():
        return list(output_tensors(given.call(own)).values())


def assert_replays(model: nn.Module, inputs: Any, others: Any = None) -> Recording:
    """A replay and the model agree bit for bit, also on other inputs of the same shapes."""
    found, normalized = recorded(model, inputs)
    for given in [normalized] if others is None else [normalized, normalize_inputs(model, others)]:
        expected = eager(model.eval(), given)
        again = replay(found.graph_module, given)
        assert len(again) == len(expected)
        for one, other in zip(again, expected, strict=True):
            assert torch.equal(one, other)
    # While it is recorded, torch may take another kernel for a linear layer: it does not see that weights are trainable.
    for one, other in zip(found.outputs.values(), eager(model, normalized), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    return found


def in_place(m: Any, x: Tensor) -> Tensor:
    states = m.linear(x)
    states.add_(1.0).mul_(m.scale)
    states[:, 0] = 0.0
    states.view(-1)[::2].clamp_(min=0.0)
    torch.tanh(states, out=states)
    return F.relu_(states)


def views(m: Any, x: Tensor) -> Any:
    a, b = m.linear(x).chunk(2, dim=-1)
    parts = torch.stack([a, b]).transpose(0, 1).flatten(1, 2).unbind(1)
    return sum(parts[1:], parts[0]) + x.permute(1, 0, 2)[0, :, :2].expand(2, 2)


def constants(m: Any, x: Tensor) -> Tensor:
    total = torch.tensor([1.0, 2.0, 3.0, 4.0])
    total += m.plain
    total *= x[0, 0]
    return x + total + torch.as_tensor([0.5])


def freed_memory(m: Any, x: Tensor) -> Tensor:
    """New constants lie where freed intermediates lay, as objects and as memory."""
    for index in range(64):
        freed = x[0, 0] * 0.5
        del freed
        x = x + torch.tensor([float(index)] * 4)
    return x


def tuples(m: Any, x: Tensor) -> dict[str, Any]:
    values, indices = x.topk(2, dim=-1)
    mean, (var, *_) = x.mean(-1), torch.split(x, [1, 3], dim=-1)
    return {"values": values, "nested": (indices, [mean, {"var": var}]), "none": None, "number": 3}


def data(m: Any, x: Tensor) -> Tensor:
    result: Tensor = F.linear(x.data, m.linear.weight.data, m.linear.bias.detach())
    return result


def written_state(m: Any, x: Tensor) -> Tensor:
    m.table[1] += x.sum((0, 1))
    m.scale.data.clamp_(max=2.5)
    m.linear.weight.data = m.linear.weight.data * 0.5
    x *= 2.0
    m.plain.add_(1.0)
    result: Tensor = m.linear(x) * m.scale + m.table.sum(0) + m.plain
    return result


def returned_state(m: Any, x: Tensor) -> list[Tensor]:
    m.table += x[0]
    return [m.table, x, m.scale]


BODIES: dict[str, Callable[[Any, Tensor], Any]] = {
    "in-place operators": in_place,
    "views": views,
    "constants": constants,
    "constants in freed memory": freed_memory,
    "nested outputs": tuples,
    "data": data,
    "written state": written_state,
    "returned state": returned_state,
    "buffer": lambda m, x: x + m.table[None, :, :],
    "index put": lambda m, x: x.masked_fill(x > 0, 2.0).index_put((torch.tensor([0]),), m.table[None]),
    "an input as an output": lambda m, x: (x, m.linear(x)),
    "one tensor twice": lambda m, x: [m.linear(x)] * 2,
    "a tensor that is freed early": lambda m, x: [(x + i).sum() for i in range(50)],
    "empty tensors": lambda m, x: torch.cat([x[:0], x[2:], x]),
    "other dtypes": lambda m, x: ((x > 0).sum(-1), x.double().exp(), torch.complex(x, x).abs()),
}


@pytest.mark.parametrize("name", BODIES)
def test_replay_is_exact(name: str) -> None:
    torch.manual_seed(0)
    assert_replays(Written(BODIES[name]), image(), image(1))


def test_what_the_run_writes_is_put_back() -> None:
    torch.manual_seed(0)
    model, given = Written(written_state), image()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    plain, inputs = model.plain.clone(), given.clone()
    found, normalized = recorded(model, given)
    replay(found.graph_module, normalized)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    assert torch.equal(model.plain, plain)
    assert torch.equal(given, inputs)


def test_parameters_are_shared_under_their_names() -> None:
    model = tiny_vlm()
    found = assert_replays(model, vlm_batch(), vlm_batch(seed=1))
    read = set(found.parameter_nodes.values())
    assert read == {name for name, _ in model.named_parameters()}
    assert all(found.graph_module.get_parameter(name) is model.get_parameter(name) for name in read)
    nodes = [node.name for node in found.graph_module.graph.nodes if node.op == "get_attr"]
    assert set(found.parameter_nodes) == set(nodes)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layers", [1, 2])
def test_torchs_own_encoder_keeps_its_operators(layers: int, bias: bool) -> None:
    """Its fast path is one fused operator that hides six weights."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, bias=bias)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
    found, normalized = recorded(model, torch.randn(2, 3, 8))
    names = {str(node.target) for node in found.graph_module.graph.nodes}
    assert not any("transformer_encoder_layer_fwd" in name or "native_multi_head" in name for name in names)
    assert set(found.parameter_nodes.values()) == {name for name, _ in model.named_parameters()}
    assert torch.backends.mha.get_fastpath_enabled()
    seen: list[bool] = []
    handle = model.register_forward_pre_hook(lambda *_: seen.append(torch.backends.mha.get_fastpath_enabled()))
    recorded(model, torch.randn(2, 3, 8))
    handle.remove()
    assert seen == [False]
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = eager(model.eval(), normalized)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    assert torch.equal(replay(found.graph_module, normalized)[0], expected[0])


def through_a_list(x: Tensor) -> Tensor:
    states = torch.zeros(2, 3)
    torch._foreach_add_([states], [x[..., 0]])
    return x + int(states.gt(0).sum())


def in_used_memory(x: Tensor) -> Tensor:
    """Four numbers that lie where a result of the input lay."""
    for _ in range(100):
        freed = x[0, 0] * 2.0
        address = freed.data_ptr()
        del freed
        found = torch.full((4,), 2.0)
        if found.data_ptr() == address:
            break
    return found


READINGS: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[float], bool]] = {
    "item": (lambda m, x: x + (x > 0).sum().item(), [12], True),
    "branch": (lambda m, x: m.linear(x) if x[0, 0, 0] > 100 else x, [False], True),
    "float": (lambda m, x: x * float(m.scale[1]), [2.0], False),
    "range": (lambda m, x: x[: int((x[:, 0, 0] > -9).sum())], [2], True),
    "tolist": (lambda m, x: torch.stack([x[i] for i in (x[:, 0, 0] < 9).long().tolist()]), [1, 1], True),
    "numpy": (lambda m, x: x * float(m.table[1].numpy().sum()), [4.0, 5.0, 6.0, 7.0], False),
    "array": (lambda m, x: x[torch.from_numpy((x[:, 0, 0] < 9).numpy())], [True, True, 2], True),
    "bool index": (lambda m, x: x[x[..., 0] > 0], [5], True),
    "nonzero": (lambda m, x: (x[..., 0] > 0).nonzero(), [5], True),
    "index by numbers": (lambda m, x: x[torch.tensor([1, 0])], [], False),
    "through a written tensor": (lambda m, x: x + int(torch.zeros(2, 3).copy_(x[..., 0]).gt(0).sum()), [5], True),
    "through a list that is written": (lambda m, x: through_a_list(x), [5], True),
    "from memory that held inputs": (lambda m, x: x + in_used_memory(x).sum().item(), [8.0], False),
    "nothing": (lambda m, x: x + x.shape[0], [], False),
}


@pytest.mark.parametrize("name", READINGS)
def test_numbers_read_from_tensors_are_listed(name: str) -> None:
    body, values, from_input = READINGS[name]
    given = image()
    assert int((given > 0).sum()) == 12
    assert int((given[..., 0] > 0).sum()) == 5
    found = assert_replays(Written(body), given)
    assert [scalar.value for scalar in found.baked_scalars] == values
    assert [scalar.from_input for scalar in found.baked_scalars] == [from_input] * len(values)


def test_a_reading_names_the_submodule_and_the_node() -> None:
    model = nn.Sequential(nn.Identity(), Written(lambda m, x: x + x.sum().item()))
    (scalar,) = recorded(model, image())[0].baked_scalars
    assert scalar.module == "1"
    assert scalar.node == "sum_default"


def test_only_the_first_numbers_of_a_long_reading_are_listed() -> None:
    found, _ = recorded(Written(lambda m, x: x + len(x.flatten().tolist())), image())
    assert len(found.baked_scalars) == 16


class Shared(nn.Module):
    """One submodule called twice, another called directly and through its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = nn.ModuleList([TwoLayers()])
        self.twin = self.outer[0]

    def forward(self, image: Tensor) -> Tensor:
        result: Tensor = self.twin(self.outer[0](image) + 1.0)
        return result


def test_every_call_of_a_submodule_is_told_apart() -> None:
    found = assert_replays(Shared(), image())
    calls = [
        [(call.path, call.call) for call in module_stack(node)]
        for node in found.graph_module.graph.nodes
        if node.op == "call_function" and "linear" in str(node.target)
    ]
    assert calls[0] == [("", 0), ("outer.0", 0), ("outer.0.blocks.0", 0), ("outer.0.blocks.0.up", 0)]
    assert [call[1] for call in calls] == [("outer.0", 0)] * 4 + [("outer.0", 1)] * 4
    assert calls[-1][-1] == ("outer.0.blocks.1.down", 1)
    outside = next(node for node in found.graph_module.graph.nodes if "add" in node.name and len(module_stack(node)) == 1)
    assert module_stack(outside) == (ModuleCall("", 0),)
    assert tensor_aliases(Shared())["outer.0.blocks.0.up.weight"] == ("outer.0.blocks.0.up.weight", "twin.blocks.0.up.weight")


def test_values_hold_shape_and_dtype() -> None:
    found, _ = recorded(Written(lambda m, x: {"values": x.topk(2)[0], "more": [x]}), image())
    node = next(node for node in found.graph_module.graph.nodes if node.name == "topk_default")
    assert [(value.shape, value.dtype) for value in tensor_values(node)] == [
        ((2, 3, 2), torch.float32),
        ((2, 3, 2), torch.int64),
    ]
    assert found.inputs[0].shape == (2, 3, 4)
    assert found.output_names == ("values", "more.0")


class Awkward(nn.Module):
    """Inputs whose names are no identifiers, or collide when joined."""

    def forward(self, batch: dict[str, Any], batch_a: Tensor) -> Tensor:
        result: Tensor = batch["a"] - batch_a * batch["from"] + batch["pixel-values"][0]
        return result


def test_awkward_input_names() -> None:
    given = {"batch": {"a": image(), "from": image(1), "pixel-values": [image(2)]}, "batch_a": image(3)}
    found = assert_replays(Awkward(), given)
    assert [spec.name for spec in found.inputs] == ["batch.a", "batch.from", "batch.pixel-values.0", "batch_a"]
    assert len({spec.node for spec in found.inputs}) == 4


class Twice(nn.Module):
    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        return input_ids * 2 - labels


@pytest.mark.parametrize("second", ["same", "view"])
def test_inputs_that_are_one_tensor_are_told_apart(second: str) -> None:
    """Labels are often the very tensor that the token ids are."""
    ids = torch.arange(6).view(2, 3)
    given = {"input_ids": ids, "labels": ids if second == "same" else ids.view(2, 3)}
    found = assert_replays(Twice(), given, {"input_ids": ids, "labels": ids + 1})
    first, *_ = (node for node in found.graph_module.graph.nodes if node.op == "call_function")
    assert [node.name for node in first.all_input_nodes] == ["input_ids"]


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
def test_weights_of_a_scripted_submodule_keep_their_names() -> None:
    torch.manual_seed(0)
    scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    found = assert_replays(nn.Sequential(scripted, nn.Linear(4, 4)), image())
    assert set(found.parameter_nodes.values()) == {"0.0.weight", "0.0.bias", "1.weight", "1.bias"}
    assert found.lifted_constants == 0


def test_an_attribute_that_is_a_weight_is_that_weight() -> None:
    model = Written(lambda m, x: F.linear(x, m.alias, m.linear.bias))
    model.alias = model.linear.weight.data
    found = assert_replays(model, image())
    assert set(found.parameter_nodes.values()) == {"linear.weight", "linear.bias"}
    assert found.lifted_constants == 0


def test_an_entry_goes_with_its_tensor() -> None:
    """Another tensor may be the same object in the same memory later."""
    recorder = _Recorder(nn.Identity())
    with recorder:
        kept = torch.ones(3)
        freed = kept + 1
        assert len(recorder._nodes) == 2
        del freed
        assert list(recorder._nodes) == [id(kept)]


def test_random_operators_are_counted() -> None:
    def body(m: Any, x: Tensor) -> Tensor:
        states = F.dropout(x + torch.randn(4), 0.5, m.training)
        return F.scaled_dot_product_attention(states, states, states)

    assert recorded(Written(body), image())[0].random_operators == 1
    dropping = recorded(Written(lambda m, x: F.dropout(x, 0.5) + F.scaled_dot_product_attention(x, x, x, None, 0.5)), image())
    assert dropping[0].random_operators == 2


def test_the_training_flags_come_back() -> None:
    model = TwoLayers().train()
    model.blocks[1].eval()
    flags = [item.training for item in model.modules()]
    seen: list[bool] = []
    handle = model.register_forward_hook(lambda *_: seen.append(model.training))
    recorded(model, image())
    handle.remove()
    assert seen == [False]
    assert [item.training for item in model.modules()] == flags


def failing(m: Any, x: Tensor) -> Tensor:
    return m.linear(x[..., :3])  # type: ignore[no-any-return]


def caught(m: Any, x: Tensor) -> Tensor:
    try:
        failing(m, x)
    except RuntimeError:
        return x / 0 if x.dtype == torch.float32 and m.fail() else x
    raise AssertionError


@pytest.mark.parametrize(
    ("body", "where", "what"),
    [
        (failing, "1.linear", "RuntimeError .*mat1 and mat2 shapes cannot be multiplied"),
        (caught, "1", "AttributeError .*has no attribute 'fail'"),
    ],
)
def test_an_error_names_the_submodule_it_came_from(body: Callable[[Any, Tensor], Tensor], where: str, what: str) -> None:
    kind, _, text = what.partition(" ")
    model = nn.Sequential(nn.Identity(), Written(body)).train()
    with pytest.raises(CaptureError, match=rf"Sequential raised {kind} when .* \(in {where}\): {text}") as found:
        recorded(model, image())
    assert found.value.__cause__ is not None
    assert all(item.training for item in model.modules())
    assert not any(item._forward_hooks or item._forward_pre_hooks for item in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("result", [None, "text", {"loss": 3.0}])
def test_a_model_without_a_tensor_output_is_refused(result: Any) -> None:
    with pytest.raises(CaptureError, match=r"the model returned .* without a tensor in it: there is nothing to capture"):
        recorded(Written(lambda m, x: result), image())


def test_no_intermediate_is_kept_alive() -> None:
    """At most two of fifty intermediates live at a time while the model is recorded."""
    made: list[weakref.ref[Tensor]] = []
    peak = [0]

    def body(m: Any, x: Tensor) -> Tensor:
        for _ in range(50):
            x = x + 1
            made.append(weakref.ref(x))
            peak[0] = max(peak[0], sum(reference() is not None for reference in made))
        return x

    recorded(Written(body), image())
    assert peak[0] <= 2
