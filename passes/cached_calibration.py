"""Calibration that is done once: statistics are kept under a key of the model and a key of the data, and found again."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx
from torch.utils.data import DataLoader

from mfcompile._version import __version__
from mfcompile.errors import CalibrationError, InputError
from mfcompile.graph import CapturedGraph, Diagnostic
from mfcompile.inputs import ExampleInputs
from mfcompile.masks import fingerprint
from mfcompile.passes.calibration import (
    Progress,
    calibrate,
    check_arguments,
    check_regions,
    normalize_batch,
    plan_padding,
    sample_count,
    source_of,
)
from mfcompile.passes.padding import PaddingMask
from mfcompile.passes.weighted_runner import Recapture
from mfcompile.region import RegionMap
from mfcompile.statistics import CalibrationStatistics
from mfcompile.statistics_cache import BatchHasher, StatisticsCache, tensor_bytes
from mfcompile.statistics_file import FORMAT_VERSION

_SUBJECT = "calibration cache"


@dataclass(frozen=True)
class CachedCalibration:
    """What ``calibrate_cached`` gives.

    Attributes:
        statistics: equal, to the bit, whether they were reused or not.
        is_reused: they came from the cache, and no forward pass was run.
        entry: the file that holds them; None where it could not be written.
        diagnostics: why an entry could not be looked up, read or written.
    """

    statistics: CalibrationStatistics
    is_reused: bool
    entry: Path | None
    diagnostics: tuple[Diagnostic, ...] = ()


def calibrate_cached(
    captured: CapturedGraph,
    regions: RegionMap,
    batches: Iterable[Any] | Callable[[], Iterable[Any]] | None,
    *,
    padding_mask: str | None = None,
    num_samples: int | None = None,
    observe: str = "auto",
    precision: str = "model",
    weighting: str = "none",
    recapture: Recapture | None = None,
    progress: Progress | None = None,
    cache_dir: Path | str | None = None,
) -> CachedCalibration:
    """``calibrate``, unless its result is in the cache.

    The key of the model is a sha256 over its fingerprint, its graph, the sites, the padding masks, the options and the
    versions of torch and mfcompile. The key of the data is a sha256 over the names, dtypes, shapes and bytes of every
    tensor, in order, as the model receives them: a loader that draws crops or an order at random gives other bytes in
    every run, and never finds an entry, unless its random numbers are seeded (torch's, numpy's and Python's global
    generators and those of a DataLoader are put back after the look-up, so that it changes no draw).

    Without an entry of the model nothing is read beforehand: the data are hashed while they are run. With one they are
    read once more for their key, without a forward pass. What can be read only once (a generator) is never looked up,
    since its key is known only when it is used up, and keeping its batches until then could fill the memory; its
    statistics are stored all the same.

    Args:
        captured: the captured model.
        regions: its regions and sites.
        batches: an iterable of batches, or a function that returns one anew at every call; None uses the example inputs.
        padding_mask: see calibrate.
        num_samples: see calibrate.
        observe: see calibrate.
        precision: see calibrate.
        weighting: see calibrate.
        recapture: see calibrate.
        progress: see calibrate; not called where statistics are reused.
        cache_dir: the cache directory; None takes the one that MFCOMPILE_CACHE names, or the user's.

    Raises:
        InputError, CalibrationError: see calibrate. The cache itself never fails: an entry that is damaged, or a directory
            that cannot be written, is a diagnostic.
    """
    source = _Source(batches)
    check_arguments(source.first, num_samples, observe, precision, weighting)
    own = fingerprint(captured.module)
    masks = plan_padding(captured, regions, padding_mask).masks
    options: dict[str, Any] = {"num_samples": num_samples, "observe": observe, "precision": precision, "weighting": weighting}
    model_key = _model_key(captured, regions, own, masks, options)
    cache, notes, looked_at = StatisticsCache(cache_dir), list[Diagnostic](), 0
    if cache.has_model(model_key) and source.is_single:
        notes.append(Diagnostic(_SUBJECT, "the batches can be read only once, so that they were not looked up"))
    elif cache.has_model(model_key):
        data_key, looked_at = _data_key(captured, source, num_samples)
        found = _find(cache, model_key, data_key, notes)
        if found is not None:
            check_regions(regions, found)
            return CachedCalibration(found, True, cache.path(model_key, data_key), tuple(notes))
    reading = _HashedBatches(captured, source)
    given = None if source.first is None else reading
    try:
        again: dict[str, Any] = {"padding_mask": padding_mask, "recapture": recapture, "progress": progress}
        statistics = calibrate(captured, regions, given, **again, **options)
    except CalibrationError as error:
        if looked_at and not reading.count:
            raise CalibrationError(
                "the calibration batches were gone when they were read for the second time: the cache reads them before the "
                "model does. Give a list, a loader, or a function that makes them anew, or calibrate without the cache"
            ) from error
        raise
    if given is None:
        reading.hasher.add(captured.example_inputs)
    statistics = replace(statistics, fingerprint=own)
    entry = _store(cache, model_key, reading.hasher.hexdigest(), statistics, notes)
    return CachedCalibration(statistics, False, entry, tuple(notes))


class _Source:
    """Batches that may be read twice, with the random numbers of the first reading.

    Attributes:
        first: what was given, or what the function gave at its first call.
        is_single: it can be read only once.
    """

    def __init__(self, batches: Iterable[Any] | Callable[[], Iterable[Any]] | None) -> None:
        self._make = batches if callable(batches) and not isinstance(batches, Iterable) else None
        self._rewind = [_global_generators()]
        self.first: Any = batches if self._make is None else self._make()
        if isinstance(self.first, DataLoader):
            self._rewind.append(_generators_of(self.first))
        self._is_used = False

    @property
    def is_single(self) -> bool:
        if self.first is None or isinstance(self.first, (Sequence, DataLoader)):
            return False
        if self._make is not None:
            return isinstance(self.first, Iterator) and self._make() is self.first
        return iter(self.first) is iter(self.first)

    def read(self) -> Iterable[Any]:
        """The batches; every call after the first begins anew."""
        batches: Iterable[Any] = self.first
        if self._is_used:
            for rewind in self._rewind:
                rewind()
            batches = batches if self._make is None else self._make()
        self._is_used = True
        return batches


class _HashedBatches:
    """Batches that are hashed as they are taken.

    Attributes:
        hasher: what was taken so far.
        count: how many that are.
    """

    def __init__(self, captured: CapturedGraph, source: _Source) -> None:
        self._captured, self._source = captured, source
        self.hasher = BatchHasher(source_of(captured, source.first))
        self.count = 0

    def __len__(self) -> int:
        return len(self._source.first)

    def __iter__(self) -> Iterator[ExampleInputs]:
        for index, batch in enumerate(self._source.read()):
            inputs = normalize_batch(self._captured, batch, index)
            self.hasher.add(inputs)
            self.count += 1
            yield inputs


def _data_key(captured: CapturedGraph, source: _Source, num_samples: int | None) -> tuple[str, int]:
    """Key of the batches that calibration would take, and how many they are; runs no model."""
    reading = _HashedBatches(captured, source)
    if source.first is None:
        reading.hasher.add(captured.example_inputs)
        return reading.hasher.hexdigest(), 0
    samples = 0
    for inputs in reading:
        samples += sample_count(inputs)
        if num_samples is not None and samples >= num_samples:
            break
    return reading.hasher.hexdigest(), reading.count


def _find(cache: StatisticsCache, model_key: str, data_key: str, notes: list[Diagnostic]) -> CalibrationStatistics | None:
    try:
        return cache.find(model_key, data_key)
    except InputError as error:
        notes.append(Diagnostic(_SUBJECT, f"an entry was not used, and is written anew: {error}"))
        return None


def _store(
    cache: StatisticsCache, model_key: str, data_key: str, statistics: CalibrationStatistics, notes: list[Diagnostic]
) -> Path | None:
    try:
        return cache.store(model_key, data_key, statistics)
    except (InputError, OSError) as error:
        notes.append(Diagnostic(_SUBJECT, f"the statistics were not kept: {error}"))
        return None


def _model_key(
    captured: CapturedGraph, regions: RegionMap, own: str, masks: Sequence[PaddingMask], options: Mapping[str, Any]
) -> str:
    """sha256 over everything but the data that statistics depend on."""
    module = captured.module
    facts: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "versions": [__version__, str(torch.__version__), torch.get_float32_matmul_precision()],
        "fingerprint": own,
        "devices": sorted({str(parameter.device) for parameter in module.parameters()}),
        "autocast": _autocast(captured),
        "graph": [captured.frontend, str(captured.graph), _constants(captured), list(captured.remembered)],
        "from_input": [scalar.node for scalar in captured.baked_scalars if scalar.from_input],
        "inputs": [[spec.name, list(spec.shape), str(spec.dtype)] for spec in captured.inputs],
        "sites": [
            [site.name, site.fqn, site.rows, site.in_features, site.expert, astuple(site.layout)]
            for site in regions.pruned_sites
        ],
        "masks": [[item.mask, item.tokens, item.is_inverted] for item in masks],
        "random": _random_state() if any(_draws(node) for node in captured.graph.nodes) else "",
        **options,
    }
    if captured.frontend == "onnx":
        import onnxruntime

        from mfcompile.onnx_file import OnnxFile

        assert isinstance(module, OnnxFile)  # the front end is onnx
        facts["onnx"] = [
            onnxruntime.__version__,
            hashlib.sha256(module.proto.SerializeToString(deterministic=True)).hexdigest(),
        ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _autocast(captured: CapturedGraph) -> list[str]:
    """What operators on the model's devices are computed in, where the caller runs them under autocast."""
    kinds = sorted({"cpu", *(parameter.device.type for parameter in captured.module.parameters())})
    return [f"{kind} {torch.get_autocast_dtype(kind)}" for kind in kinds if torch.is_autocast_enabled(kind)]


def _constants(captured: CapturedGraph) -> str:
    """sha256 over the tensors that the graph reads and the module does not register."""
    known = {id(tensor) for tensor in (*captured.module.parameters(), *captured.module.buffers())}
    state = hashlib.sha256()
    for name, tensor in (*captured.graph_module.named_parameters(), *captured.graph_module.named_buffers()):
        if id(tensor) not in known and tensor.device.type != "meta":
            state.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            state.update(tensor_bytes(tensor))
    return state.hexdigest()


def _draws(node: fx.Node) -> bool:
    """The operator draws random numbers: it is tagged so, and is no dropout that is switched off."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    schema: Any = getattr(node.target, "_schema", None)
    named = {item.name: value for item, value in zip(schema.arguments, node.args, strict=False)} | node.kwargs
    chances = [named.get(item.name, item.default_value) for item in schema.arguments if item.name in ("p", "dropout_p")]
    is_off = any(named.get(name) is False for name in ("train", "training"))
    return not (is_off or 0 in chances)


def _random_state() -> str:
    return hashlib.sha256(torch.get_rng_state().numpy().data).hexdigest()


def _global_generators() -> Callable[[], None]:
    """Put the random numbers of torch, numpy and Python back to where they are now."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()

    def rewind() -> None:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])

    return rewind


def _generators_of(loader: DataLoader[Any]) -> Callable[[], None]:
    """Put the generators that a loader draws its order from back to where they are now."""
    owners = (loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None))
    found = {id(item): item for item in (getattr(owner, "generator", None) for owner in owners)}
    states = [(item, item.get_state()) for item in found.values() if isinstance(item, torch.Generator)]

    def rewind() -> None:
        for generator, state in states:
            generator.set_state(state)

    return rewind
