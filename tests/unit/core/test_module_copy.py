"""Second module objects, and runs that leave weights and state as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mfcompile.module_copy import KeptState, share_weights_copy, written_tensors


class Model(nn.Module):
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(3, 3)
        self.two = nn.Linear(3, 3)
        self.two.weight = self.one.weight
        self.register_buffer("count", torch.zeros(2))
        self.register_buffer("hidden", torch.ones(2), persistent=False)
        self.cache: list[int] = []


def test_a_copy_shares_every_tensor_and_no_module() -> None:
    model = Model()
    copy = share_weights_copy(model)
    assert type(copy) is Model
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        assert copy.get_parameter(name) is tensor if isinstance(tensor, nn.Parameter) else copy.get_buffer(name) is tensor
    assert not {id(item) for item in copy.modules()} & {id(item) for item in model.modules()}
    assert copy.two.weight is copy.one.weight
    copy.cache.append(1)
    copy.one.extra = 1  # type: ignore[assignment]
    assert not model.cache
    assert not hasattr(model.one, "extra")


def test_views_of_weights_stay_views_and_other_tensors_are_copied() -> None:
    model = Model()
    model.rows, model.plain = model.one.weight.data[1:], torch.ones(2)
    copy = share_weights_copy(model)
    assert copy.rows.data_ptr() == model.rows.data_ptr()  # type: ignore[operator]
    assert copy.plain.data_ptr() != model.plain.data_ptr()  # type: ignore[operator]


def test_training_the_copy_trains_the_original() -> None:
    model = Model()
    before = model.one.weight.detach().clone()
    copy = share_weights_copy(model)
    with torch.no_grad():
        copy.get_parameter("one.weight").add_(1.0)
    assert torch.equal(model.one.weight, before + 1)


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, state: KeptState) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.state = state

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.state.before(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))


def exchange(model: Model) -> Model:
    model.one.weight.data = model.one.weight.data * 2
    return model


def replace_buffer(model: Model) -> None:
    model.count = model.count + 1


def write_out(model: Model) -> None:
    torch.add(model.count, 1, out=model.count)


def write_view(model: Model) -> None:
    model.one.weight.data[0].view(-1)[1:].fill_(9.0)


WRITES: dict[str, Callable[[Model], object]] = {
    "in place": lambda model: model.count.add_(1),
    "twice": lambda model: (model.count.add_(1), model.count.mul_(3)),
    "parameter": lambda model: model.one.weight.clamp_(0, 1e-3),
    "view of a parameter": write_view,
    "out": write_out,
    "foreach": lambda model: torch._foreach_add_([model.count, model.one.bias], 1.0),
    "data exchanged": exchange,
    "data exchanged after a write": lambda model: [model.one.weight.add_(1), exchange(model)],
    "data exchanged before a write": lambda model: [exchange(model), model.one.weight.add_(1)],
    "buffer replaced": replace_buffer,
    "nothing": lambda model: model.count + model.one.weight.sum(),
}


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
@pytest.mark.parametrize("write", WRITES)
def test_what_a_run_writes_is_put_back(write: str, mode: Callable[[], Any]) -> None:
    model = Model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors = [*model.parameters(), *model.buffers()]
    addresses = [tensor.data_ptr() for tensor in tensors]
    state = KeptState(model)
    for _ in range(2):  # a second run starts afresh
        with mode(), Watch(state):
            WRITES[write](model)
        state.restore()
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
        assert [id(tensor) for tensor in (*model.parameters(), *model.buffers())] == [id(tensor) for tensor in tensors]
        assert [tensor.data_ptr() for tensor in tensors] == addresses


def test_only_what_is_written_is_copied() -> None:
    model = Model()
    state = KeptState(model)
    with torch.no_grad(), Watch(state):
        model.count.add_(1)
        model.one(torch.ones(3))
    assert state.is_written(model.count)
    assert state.is_written(model.count[1:])
    assert not state.is_written(model.one.weight)


def test_other_tensors_are_watched_until_the_next_restore() -> None:
    model, batch = Model(), torch.ones(2, 3)
    state = KeptState(model)
    state.watch(batch)
    with torch.no_grad(), Watch(state):
        batch[0].zero_()
    state.restore()
    assert torch.equal(batch, torch.ones(2, 3))
    with torch.no_grad(), Watch(state):
        batch.zero_()
    state.restore()
    assert not batch.any()


def test_written_arguments_come_from_the_schema() -> None:
    one, two = torch.ones(2), torch.zeros(2)
    assert written_tensors(torch.ops.aten.add_.Tensor, (one, two), {}) == [one]
    assert written_tensors(torch.ops.aten.add.out, (one, two), {"out": two}) == [two]
    assert written_tensors(torch.ops.aten._foreach_add_.Scalar, ([one, two], 1), {}) == [one, two]
    assert written_tensors(torch.ops.aten.add.Tensor, (one, two), {}) == []
