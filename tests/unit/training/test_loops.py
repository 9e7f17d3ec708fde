"""Training loops of every kind leave pruned weights at zero, and train the kept ones as a plain loop would."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import mfcompile
from mfcompile.masked_weights import masked_parameters
from tests.masked_models import assert_pruned, batch, effective, loss_of, masked, small, small_masks, train, zeroed

cross_entropy: Any = functional.cross_entropy

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.3, amsgrad=True),
    "adamw foreach": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.3, foreach=True),
    "adamw fused": lambda weights: torch.optim.AdamW(weights, lr=0.01, weight_decay=0.3, fused=True),
    "adam with l2": lambda weights: torch.optim.Adam(weights, lr=0.01, weight_decay=0.3),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=0.01, momentum=0.9, weight_decay=0.1, centered=True),
    "adafactor": lambda weights: torch.optim.Adafactor(weights, lr=0.01, weight_decay=0.1),
    "rprop": lambda weights: torch.optim.Rprop(weights, lr=0.01),
    "adadelta": lambda weights: torch.optim.Adadelta(weights, lr=0.5, weight_decay=0.1),
    "adagrad": lambda weights: torch.optim.Adagrad(weights, lr=0.1, weight_decay=0.1, fused=True),
    "nadam": lambda weights: torch.optim.NAdam(weights, lr=0.01, weight_decay=0.1, foreach=True),
    "radam": lambda weights: torch.optim.RAdam(weights, lr=0.01, weight_decay=0.1),
    "adamax": lambda weights: torch.optim.Adamax(weights, lr=0.01, weight_decay=0.1),
    "asgd": lambda weights: torch.optim.ASGD(weights, lr=0.01, weight_decay=0.1),
    "muon": lambda weights: torch.optim.Muon([weight for weight in weights if weight.ndim == 2], lr=0.02, weight_decay=0.1),
}


class Noisy(torch.optim.SGD):
    """Moves every stored number, pruned or not, through ``data``."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                weight.data = weight.data + torch.randn_like(weight) * 0.1


@pytest.mark.parametrize("kind", [*OPTIMIZERS, "noise"])
def test_no_optimizer_brings_weights_back(kind: str) -> None:
    model = masked()
    before = {name: effective(model, name).clone() for name in small_masks()}
    make = OPTIMIZERS.get(kind, lambda weights: Noisy(weights, lr=0.1))
    train(model, make(model.parameters()))
    assert_pruned(model)
    for name, mask in small_masks().items():
        assert (effective(model, name) != before[name])[mask].any() or (kind == "muon" and mask.ndim != 2), name
    plain = mfcompile.strip(copy.deepcopy(model))
    assert_pruned(plain)
    assert mfcompile.verify_masks(plain, small_masks()).nonzero_count == 0


def test_line_searches_leave_pruned_weights_at_zero() -> None:
    model = masked()
    optimizer: Any = torch.optim.LBFGS(model.parameters(), lr=0.5, line_search_fn="strong_wolfe")
    before = effective(model, "up.weight").clone()

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        assert_pruned(model)
        return loss

    optimizer.step(closure)
    assert_pruned(model)
    assert not torch.equal(effective(model, "up.weight"), before)


@pytest.mark.parametrize("kind", ["sgd", "adamw", "adam with l2", "rmsprop", "adagrad", "nadam", "muon"])
def test_kept_weights_train_as_in_a_loop_that_zeroes_after_every_step(kind: str) -> None:
    model, plain = masked(), zeroed(small(), small_masks())
    optimizer, oracle = OPTIMIZERS[kind](model.parameters()), OPTIMIZERS[kind](plain.parameters())
    for seed in range(4):
        for each, one in ((model, optimizer), (plain, oracle)):
            one.zero_grad()
            loss_of(each, seed).backward()
        for name, mask in small_masks().items():
            gradient = plain.get_parameter(name).grad
            assert gradient is not None
            gradient.mul_(mask)
        total = [torch.nn.utils.clip_grad_norm_(each.parameters(), 0.5) for each in (model, plain)]
        torch.testing.assert_close(total[0], total[1], rtol=1e-5, atol=0)
        optimizer.step()
        oracle.step()
        with torch.no_grad():
            for name, mask in small_masks().items():
                plain.get_parameter(name).mul_(mask)
    for name, expected in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], expected, rtol=1e-5, atol=1e-7)


def test_accumulated_gradients_are_those_of_one_batch() -> None:
    once, twice = masked().eval(), masked().eval()
    images, classes = batch(size=4)
    cross_entropy(once(images), classes).backward()
    for part in (slice(0, 2), slice(2, 4)):
        (cross_entropy(twice(images[part]), classes[part]) / 2).backward()
    for (name, one, mask), (_, other, _) in zip(masked_parameters(once), masked_parameters(twice), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        torch.testing.assert_close(one.grad, other.grad)
        assert not other.grad[~mask].any(), name
        assert other.grad[mask].any(), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision(dtype: torch.dtype) -> None:
    model = masked()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == torch.float16)
    before = effective(model, "up.weight").clone()
    for seed in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = loss_of(model, seed)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
    assert not torch.equal(effective(model, "up.weight"), before)
    assert_pruned(model)


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    plain, checked = masked().eval(), masked().eval()
    images, classes = batch()
    cross_entropy(plain(images), classes).backward()
    output = checkpoint(checked, images.requires_grad_(), use_reentrant=False)
    assert isinstance(output, Tensor)
    cross_entropy(output, classes).backward()
    for (_, one, mask), (_, other, _) in zip(masked_parameters(plain), masked_parameters(checked), strict=True):
        assert one.grad is not None
        assert other.grad is not None
        assert torch.equal(one.grad, other.grad)
        assert not other.grad[~mask].any()


def test_a_compiled_module_trains_the_same() -> None:
    eager, model = masked(), masked()
    compiled: Any = torch.compile(model, backend="aot_eager", fullgraph=True)
    train(eager, OPTIMIZERS["adamw"](eager.parameters()))
    train(compiled, OPTIMIZERS["adamw"](compiled.parameters()))
    assert_pruned(model)
    for name in small_masks():
        torch.testing.assert_close(effective(model, name), effective(eager, name), rtol=1e-4, atol=1e-5)
    assert mfcompile.verify_masks(compiled).nonzero_count == 0


def test_a_cached_weight_is_masked_once_per_block() -> None:
    model = masked()
    with torch.nn.utils.parametrize.cached():
        loss_of(model).backward()
    assert_pruned(model)
    assert all(original.grad is not None for _, original, _ in masked_parameters(model))


WORKER = """
import sys, torch
from torch import distributed
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import mfcompile
from tests.masked_models import assert_pruned, loss_of, masked
rank, folder = int(sys.argv[1]), sys.argv[2]
distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
model = masked()
model.get_submodule("norm").eval()
wrapped = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01, weight_decay=0.3)
for step in range(2):
    optimizer.zero_grad()
    loss_of(wrapped, 2 * step + rank).backward()
    optimizer.step()
assert_pruned(model)
assert mfcompile.verify_masks(wrapped).nonzero_count == 0
torch.save(dict(model.state_dict()), f"{folder}/{rank}.pt")
sharded = masked()
sharded.get_submodule("norm").eval()
fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
optimizer = torch.optim.AdamW(sharded.parameters(), lr=0.01, weight_decay=0.3)
for step in range(2):
    optimizer.zero_grad()
    loss_of(sharded, 2 * step + rank).backward()
    optimizer.step()
whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
torch.save(dict(whole), f"{folder}/sharded{rank}.pt")
whole_dict = StateDictOptions(full_state_dict=True)
set_model_state_dict(sharded, {name: value.clone() for name, value in masked(seed=3).state_dict().items()}, options=whole_dict)
torch.save(dict(get_model_state_dict(sharded, options=whole_dict)), f"{folder}/loaded{rank}.pt")
distributed.destroy_process_group()
"""


def test_processes_that_copy_or_cut_the_model_train_one_pruned_model(tmp_path: Path) -> None:
    root = Path(mfcompile.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen([sys.executable, "-c", WORKER, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE)
        for rank in (0, 1)
    ]
    for worker in workers:
        _, errors = worker.communicate(timeout=120)
        assert worker.returncode == 0, errors.decode()
    states = [torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("0", "1", "sharded0")]
    alone = masked()
    alone.get_submodule("norm").eval()
    optimizer = torch.optim.AdamW(alone.parameters(), lr=0.01, weight_decay=0.3)
    for step in range(2):
        optimizer.zero_grad()
        ((loss_of(alone, 2 * step) + loss_of(alone, 2 * step + 1)) / 2).backward()
        optimizer.step()
    for name, value in alone.state_dict().items():
        assert torch.equal(states[0][name], states[1][name]), name
        torch.testing.assert_close(states[0][name], value, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(states[2][name], value, rtol=1e-4, atol=1e-6)
    plain = small(seed=1)
    plain.load_state_dict(states[2])
    assert_pruned(plain)
    loaded = torch.load(tmp_path / "loaded0.pt", weights_only=True)
    for name, value in masked(seed=3).state_dict().items():
        assert torch.equal(loaded[name], value), name
