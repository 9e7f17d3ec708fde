"""Modules that are not plain: wrapped, compiled, parametrized, stateful, on other devices, in half precision."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.utils.checkpoint import checkpoint

import mfcompile
from mfcompile.errors import CaptureError, InputError
from mfcompile.frontends.recorder import replay
from mfcompile.frontends.unwrapping import check_devices, unwrap


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, states: Tensor) -> Tensor:
        mixed = nn.functional.scaled_dot_product_attention(self.q(states), self.k(states), self.v(states))
        states = states + self.o(mixed)
        result: Tensor = states + self.down(nn.functional.gelu(self.up(states)))
        return result


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, image: Tensor) -> Tensor:
        for layer in self.layers:
            image = layer(image)
        return image


def tower() -> Tower:
    torch.manual_seed(0)
    return Tower().eval()


def image(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)).to(dtype)


def sites(model: nn.Module, inputs: Any = None) -> list[tuple[str, str]]:
    regions = mfcompile.infer_regions(mfcompile.capture(model, image() if inputs is None else inputs))
    return [(site.name, site.region) for site in regions.pruned_sites]


def compile_layer(model: Any) -> nn.Module:
    model.layers[0] = torch.compile(model.layers[0])
    return model  # type: ignore[no-any-return]


def compile_layer_in_data_parallel(model: Any) -> nn.Module:
    compiled: Any = torch.compile(model.layers[1])
    model.layers[1] = nn.DataParallel(compiled)
    return model  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("wrap", "note"),
    [
        (torch.compile, "the Tower inside torch.compile"),
        (nn.DataParallel, "the Tower inside DataParallel"),
        (lambda model: nn.DataParallel(cast(nn.Module, torch.compile(model))), "the Tower inside torch.compile"),
        (compile_layer, "the eager code of layers.0, without torch.compile"),
        (compile_layer_in_data_parallel, "the eager code of layers.1, without DataParallel"),
    ],
)
def test_wrappers_are_taken_off_and_names_are_the_users(wrap: Callable[[Any], Any], note: str, tmp_path: Path) -> None:
    plain = mfcompile.compile_pruned(tower(), image(), sparsity=0.5)
    wrapped = wrap(tower())
    found = mfcompile.compile_pruned(wrapped, image(), sparsity=0.5)
    assert found.masks == plain.masks
    assert note in found.report["capture"]["specialised"]
    assert type(found.module) is Tower
    torch.testing.assert_close(found.module(image()), plain.module(image()))
    found.save(tmp_path / "out", onnx=False)
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(tower().state_dict())
    assert any("_orig_mod" in name or name.startswith("module.") for name in wrapped.state_dict()), "the user's stays wrapped"


def test_a_module_inside_shares_its_weights_with_the_wrapped_one() -> None:
    wrapped = compile_layer(tower())
    inside, _ = unwrap(wrapped)
    assert all(one is other for one, other in zip(inside.parameters(), wrapped.parameters(), strict=True))
    plain = tower()
    assert unwrap(plain) == (plain, ())


def test_a_module_compiled_in_place_and_compiled_functions_are_recorded() -> None:
    compiled_in_place = tower()
    compiled_in_place.compile()

    class Function(Tower):
        def forward(self, image: Tensor) -> Tensor:
            body: Callable[[Tensor], Tensor] = torch.compile(super().forward)
            return body(image)

    assert sites(compiled_in_place) == sites(Function().eval()) == sites(tower())


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_distributed_wrappers_are_taken_off_and_shards_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    cpu = torch.device("cpu")
    assert sites(nn.parallel.DistributedDataParallel(tower())) == sites(tower())
    assert sites(FullyShardedDataParallel(tower(), device_id=cpu, use_orig_params=True)) == sites(tower())
    with pytest.raises(CaptureError, match=r"_flat_param is flattened by FSDP: .*full_state_dict=True"):
        unwrap(FullyShardedDataParallel(tower(), device_id=cpu))
    sharded = tower()
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(CaptureError, match=r"layers\.0\.q\.weight is sharded over processes by FSDP"):
        unwrap(sharded)


class LowRank(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(2, 8)), nn.Parameter(torch.randn(8, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.b @ self.a


def weight_norm(layer: Layer) -> None:
    parametrizations.weight_norm(layer.q)


def spectral_norm(layer: Layer) -> None:
    parametrizations.spectral_norm(layer.q)


def low_rank(layer: Layer) -> None:
    parametrize.register_parametrization(layer.q, "weight", LowRank())


@pytest.mark.parametrize("change", [weight_norm, spectral_norm, low_rank])
def test_a_weight_that_is_computed_stays_dense_and_the_others_are_pruned(change: Callable[[Layer], None]) -> None:
    model = tower()
    for layer in model.layers:
        change(layer)  # type: ignore[arg-type]
    regions = mfcompile.infer_regions(mfcompile.capture(model, image()))
    assert {site.name for site in regions.pruned_sites} == {
        f"layers.{index}.{name}.weight" for index in range(2) for name in ("k", "v", "o", "up", "down")
    }
    said = {item.subject for item in regions.diagnostics} | {site.name for site in regions.skipped_sites}
    assert any(name.startswith("layers.1.q.parametrizations.weight") for name in said)
    compiled = mfcompile.compile_pruned(model, image(), sparsity=0.5)
    assert torch.isfinite(compiled.module(image())).all()


def test_a_model_with_masks_in_force_is_captured_and_not_pruned_again() -> None:
    masked = mfcompile.compile_pruned(tower(), image(), sparsity=0.5).module
    captured = mfcompile.capture(masked, image())
    torch.testing.assert_close(replay(captured.graph_module, captured.example_inputs)[0], masked(image()))
    with pytest.raises(InputError, match=r"masks in force.*strip"):
        mfcompile.compile_pruned(masked, image())


class Functional(nn.Module):
    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.inner, self.scale = tower(), scale
        self.given = nn.ParameterDict({name.replace(".", "/"): item for name, item in tower().named_parameters()})

    def forward(self, image: Tensor) -> Tensor:
        weights = {name.replace("/", "."): item for name, item in self.given.items()}
        if self.scale != 1:
            weights = {name: item * self.scale for name, item in weights.items()}
        return torch.func.functional_call(self.inner, weights, (image,))  # type: ignore[no-any-return]


def test_weights_given_to_functional_call_are_known_by_where_they_are_registered() -> None:
    expected = {f"given.{name.replace('.', '/')}" for name, _ in sites(tower())}
    assert {name for name, _ in sites(Functional().eval())} == expected
    regions = mfcompile.infer_regions(mfcompile.capture(Functional(2.0).eval(), image()))
    assert regions.pruned_sites == ()
    assert any("its values are changed by mul" in str(item) for item in regions.diagnostics)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_captured_calibrated_and_masked(dtype: torch.dtype) -> None:
    compiled = mfcompile.compile_pruned(tower().to(dtype), image(dtype), sparsity=0.5)
    assert {name for name, _ in sites(tower().to(dtype), image(dtype))} == set(compiled.masks)
    assert compiled.module(image(dtype)).dtype is dtype
    assert compiled.masks.kept_count == compiled.masks.weight_count - compiled.masks.weight_count // 2
    for fqn, mask in compiled.masks.items():
        owner, _, leaf = fqn.rpartition(".")
        weight = getattr(compiled.module.get_submodule(owner), leaf)
        assert weight.dtype is dtype
        assert not weight[~mask].any()


class Flow(nn.Module):
    def __init__(self, body: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.a, self.b, self.body = nn.Linear(4, 4), nn.Linear(4, 4), body

    def forward(self, image: Tensor) -> Any:
        return self.body(self, image)


def cond(m: Any, x: Tensor) -> Any:
    return torch.cond(x.sum() > 0, lambda x: m.a(x), lambda x: m.b(x), (x,))


def while_loop(m: Any, x: Tensor) -> Any:
    from torch._higher_order_ops.while_loop import while_loop

    loop: Any = while_loop
    return loop(lambda i, x: i < 3, lambda i, x: (i + 1, m.a(x)), (torch.tensor(0), x))


def mapped(m: Any, x: Tensor) -> Any:
    from torch._higher_order_ops.map import map

    over: Any = map
    return over(lambda x: m.a(x), x)


def scan(m: Any, x: Tensor) -> Any:
    from torch._higher_order_ops.scan import scan

    return scan(lambda carry, x: (carry + m.a(x), m.b(carry)), torch.zeros(4), x)


def flex_attention(m: Any, x: Tensor) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(m.a(x)[None, None], m.b(x)[None, None], x[None, None])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("body", [cond, while_loop, mapped, scan, flex_attention])
def test_operators_of_functions_are_recorded_as_the_example_takes_them(body: Callable[[Any, Tensor], Any]) -> None:
    model, inputs = Flow(body).eval(), torch.rand(6, 4)
    captured = mfcompile.capture(model, inputs)
    with torch.inference_mode():
        expected = torch.utils._pytree.tree_leaves(model(inputs))
    for one, other in zip(replay(captured.graph_module, captured.example_inputs), expected, strict=True):
        torch.testing.assert_close(one, other)
    (said,) = [note for note in captured.specialised if "branches and rounds" in note]
    assert f"in the model itself ({Path(__file__).name}:" in said
    assert set(captured.parameter_nodes.values()) >= {"a.weight"}


def test_the_other_branch_is_said_to_be_unused() -> None:
    regions = mfcompile.infer_regions(mfcompile.capture(Flow(cond).eval(), torch.rand(6, 4)))
    assert {site.name: site.skipped for site in regions.skipped_sites}["b.weight"] == "no call of the captured run uses it"


def test_calibration_follows_control_flow_as_well() -> None:
    """The example takes one branch, the batches both: the module is watched, since the graph holds one."""
    model = Flow(cond).eval()
    captured = mfcompile.capture(model, torch.rand(6, 4))
    regions = mfcompile.infer_regions(captured, targets=["a"])
    statistics = mfcompile.calibrate(captured, [torch.rand(6, 4), -torch.rand(6, 4)], regions=regions)
    assert statistics.observed_by == "module"
    assert statistics.sites["a.weight"].token_count == 6


def test_checkpointed_layers_are_recorded() -> None:
    def body(m: Any, x: Tensor) -> Any:
        return checkpoint(m.a, x, use_reentrant=False) + checkpoint(m.b, x, use_reentrant=False)

    captured = mfcompile.capture(Flow(body).eval(), torch.rand(6, 4))
    assert set(captured.parameter_nodes.values()) == {"a.weight", "a.bias", "b.weight", "b.bias"}


def test_an_operator_that_cannot_be_run_eagerly_is_refused_by_name_and_line() -> None:
    class Unknown(torch._ops.HigherOrderOperator):
        def __init__(self) -> None:
            super().__init__("unknown_to_mfcompile")  # type: ignore[no-untyped-call]

        def __call__(self, *args: Any) -> Any:
            return super().__call__(*args)  # type: ignore[no-untyped-call]

    operator = Unknown()
    said = r"the operator unknown_to_mfcompile in the model itself \(test_odd_modules\.py:\d+\) takes functions.*plain Python"
    with pytest.raises(CaptureError, match=said):
        mfcompile.capture(Flow(lambda m, x: operator(lambda x: m.a(x), x)).eval(), torch.rand(6, 4))


def counting(m: Any, x: Tensor) -> Any:
    m.calls = getattr(m, "calls", 0) + 1
    return m.a(x) * m.calls


def drawing(m: Any, x: Tensor) -> Any:
    return m.a(x) + random.random()


@pytest.mark.parametrize("body", [counting, drawing])
def test_a_model_that_does_not_repeat_itself_is_found_and_said(body: Callable[[Any, Tensor], Any]) -> None:
    captured = mfcompile.capture(Flow(body).eval(), torch.rand(6, 4))
    assert captured.specialised[-1].startswith("a first call: a second one gives another output_0, so the model keeps state")
    assert mfcompile.capture(Flow(lambda m, x: m.a(x)).eval(), torch.rand(6, 4)).specialised == (
        "the shapes of the example inputs",
    )


def test_what_the_model_writes_is_said_and_put_back() -> None:
    model = Flow(lambda m, x: m.a(x) + m.count.add_(1))
    model.register_buffer("count", torch.zeros(1))
    captured = mfcompile.capture(model.eval(), torch.rand(6, 4))
    assert "what count hold before the run: the model writes into them, the graph into copies" in captured.specialised
    assert not any(buffer.any() for buffer in model.buffers())


def test_weights_on_several_devices_are_refused() -> None:
    class Elsewhere(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(2, 2)

        def buffers(self, recurse: bool = True) -> Iterator[Tensor]:
            from types import SimpleNamespace

            yield SimpleNamespace(device="cuda:1")  # type: ignore[misc]

    with pytest.raises(CaptureError, match=r"several devices \(2 on cpu, 1 on cuda:1\).*model\.to\('cpu'\)"):
        check_devices(Elsewhere())
    check_devices(tower())
    check_devices(tower().to("meta"))


def scripted(layer: Layer) -> nn.Module:
    return torch.jit.script(layer)


def traced(layer: Layer) -> nn.Module:
    return torch.jit.trace(layer, image())  # type: ignore[no-any-return,no-untyped-call]


def frozen(layer: Layer) -> nn.Module:
    return cast(nn.Module, torch.jit.freeze(torch.jit.script(layer)))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("compile_it", [scripted, traced, frozen])
def test_weights_in_torchscript_are_seen_and_stay_dense(compile_it: Callable[[Layer], nn.Module], tmp_path: Path) -> None:
    model: Any = tower()
    model.layers.extend([Layer().eval(), Layer().eval()])
    expected = model(image())
    model.layers[1] = compile_it(model.layers[1])
    captured = mfcompile.capture(model, image())
    torch.testing.assert_close(replay(captured.graph_module, captured.example_inputs)[0], expected)
    assert "the TorchScript code of layers.1: weights in there stay dense" in captured.specialised[-1]
    regions = mfcompile.infer_regions(captured)
    assert {site.fqn.split(".")[1] for site in regions.pruned_sites} == {"0", "2", "3"}
    for site in regions.skipped_sites:
        assert site.skipped == "it belongs to the TorchScript module layers.1; put the Python module in its place to prune it"
    compiled = mfcompile.compile_pruned(model, image(), sparsity=0.5)
    assert torch.isfinite(compiled.module(image())).all()
    compiled.save(tmp_path / "out", onnx=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_whole_torchscript_model_is_refused() -> None:
    with pytest.raises(CaptureError, match=r"the model is a TorchScript module.*Give the Python module"):
        mfcompile.capture(torch.jit.script(tower()), image())
