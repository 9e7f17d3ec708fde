"""Gram matrices X^T X of the activations that feed prune sites, added up while the model runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional

from mfcompile.passes.observers import StatisticsCollector
from mfcompile.passes.reduction import Reduction, features_last, fresh_samples, is_repeat, read
from mfcompile.passes.routing import RoutedReduction, RoutedRows, route_rows
from mfcompile.region import PruneSite, Reading


@dataclass(frozen=True, eq=False)
class ObservedRows(Reduction):
    """A reduction that can still give the Gram matrix of its rows, as long as the activation is not written to.

    Attributes:
        source: the activation.
        rows: gives its rows, (..., in_features).
        keep: bool, the leading sizes of the rows; False rows are padding. None keeps all.
        has_ones: a 1 is put behind every row, for a bias.
        known: Gram matrices that were computed, by the samples they are of.
    """

    source: Tensor | None = None
    rows: Callable[[], Tensor] = torch.Tensor
    keep: Tensor | None = None
    has_ones: bool = False
    known: dict[bytes, Tensor] = field(default_factory=dict)

    def gram(self, fresh: Tensor | None = None) -> Tensor:
        """(in_features, in_features) X^T X over the rows that are no padding; float32, float64 of float64 rows. One more of
        both with ``has_ones``.

        Args:
            fresh: (samples,) bool, the samples that count; None takes all.
        """
        key = b"" if fresh is None else fresh.numpy().tobytes()
        if key not in self.known:
            rows = self.rows()
            chosen = None if self.keep is None else self.keep.reshape(-1)
            if fresh is not None:
                each = fresh.to(rows.device).unsqueeze(1).expand(-1, rows[..., 0].numel() // len(fresh)).reshape(-1)
                chosen = each if chosen is None else each & chosen
            flat = rows.reshape(-1, rows.shape[-1])
            flat = flat if chosen is None else flat[chosen]  # not multiplied by zero: padding may hold NaN
            flat = flat.to(torch.float64 if flat.dtype == torch.float64 else torch.float32)
            flat = functional.pad(flat, (0, 1), value=1.0) if self.has_ones else flat
            self.known[key] = flat.mT @ flat
        return self.known[key]


@dataclass(frozen=True, eq=False)
class RoutedObservedRows(RoutedReduction):
    """The same for rows that are routed to experts.

    Attributes:
        routed: the rows, and which expert each meets.
        known: expert -> its rows.
    """

    routed: RoutedRows | None = None
    known: dict[int, ObservedRows] = field(default_factory=dict)

    def of_expert(self, index: int) -> Reduction | None:
        """The rows of one expert; None where no row met it. Nothing is copied before their Gram matrix is asked for."""
        plain, routed = super().of_expert(index), self.routed
        if plain is None or routed is None:
            return None

        def rows() -> Tensor:
            return routed.rows[routed.is_counted & (routed.experts == index)]

        if index not in self.known:
            sums = (plain.sum_of_squares, plain.token_count, plain.padding_count, plain.sample_count)
            self.known[index] = ObservedRows(*sums, source=routed.rows, rows=rows)
        return self.known[index]


@dataclass
class GramCollector(StatisticsCollector):
    """Adds up one Gram matrix per activation: sites that see the same activations (q, k and v) share one.

    Rows count as they do for the norms: padding is left out, a sample that a weight meets again in the same forward pass
    counts once, an expert has the rows that were routed to it. Sums are kept in float32 (in float64 for models in
    float64): they differ in the last bits between batch sizes.

    Memory: (in_features, in_features) per distinct set of activations, and for the length of a forward pass once more per
    distinct activation.

    Attributes:
        has_ones: the rows of weights that are a single matrix get a 1 behind them: sums of inputs, and the number of tokens,
            in the last row and column, for least squares with a bias.
    """

    has_ones: bool = False
    _pending: dict[str, list[Tensor]] = field(default_factory=dict)
    _earlier: dict[str, list[Reduction]] = field(default_factory=dict)
    _grams: dict[str, Tensor] = field(default_factory=dict)

    def reduce(
        self, activation: Tensor, reading: Reading, experts: int | None, routing: Tensor | None, *, by_sample: bool
    ) -> Reduction | RoutedReduction:
        """See StatisticsCollector; what is given holds on to the activation until the forward pass moves on."""
        reduced = super().reduce(activation, reading, experts, routing, by_sample=by_sample)
        with self.tracker.paused(activation, routing):
            activation = read(activation, reading)
            keep = self.tracker.keep(activation, reading.features)
            if isinstance(reduced, RoutedReduction):
                assert experts is not None  # that is what makes it one
                routed = route_rows(activation, reading, experts, routing, keep)
                return RoutedObservedRows(reduced.sums, reduced.tokens, reduced.padding, routed)
            rows = features_last(activation, reading.features)
        sums = (reduced.sum_of_squares, reduced.token_count, reduced.padding_count, reduced.sample_count, reduced.by_sample)
        return ObservedRows(*sums, source=rows, rows=lambda: rows, keep=keep, has_ones=self.has_ones)

    def take(self, site: PruneSite, reduction: Reduction) -> None:
        """Compute the Gram matrix of what the site has not met in this forward pass, at once: the rows may be overwritten."""
        assert isinstance(reduction, ObservedRows)  # from reduce
        earlier = self._earlier.setdefault(site.name, [])
        fresh = None
        if reduction.by_sample is not None:
            fresh = fresh_samples(reduction.by_sample, [item.by_sample for item in earlier if item.by_sample is not None])
            if not bool(fresh.any()):
                return
        elif any(is_repeat(reduction, other) for other in earlier):
            return
        by_sample, sums = reduction.by_sample, reduction.sum_of_squares
        earlier.append(Reduction(sums, reduction.token_count, reduction.padding_count, reduction.sample_count, by_sample))
        if not reduction.token_count:
            return
        with self.tracker.paused(reduction.source):
            gram = reduction.gram(None if fresh is None or bool(fresh.all()) else fresh)
        self._pending.setdefault(site.name, []).append(gram)

    def end_batch(self) -> None:
        """The forward pass is over: add what it gave, once for all sites that have shared everything so far."""
        together: dict[tuple[int, ...], list[str]] = {}
        for name, grams in self._pending.items():
            together.setdefault((id(self._grams.get(name)), *map(id, grams)), []).append(name)
        with torch.inference_mode():
            for names in together.values():
                first = names[0]
                total, parts = self._grams.get(first), self._pending[first]
                if total is None:
                    total = torch.zeros_like(parts[0])
                elif sum(other is total for other in self._grams.values()) > len(names):
                    total = total.clone()  # other sites have the same sum so far, and not these rows
                for part in parts:
                    total.add_(part)
                self._grams.update(dict.fromkeys(names, total))
        self._pending, self._earlier = {}, {}
        super().end_batch()

    def gram(self, site: PruneSite) -> Tensor | None:
        """(in_features, in_features) X^T X over everything that the site met; None where it met nothing."""
        return self._grams.get(site.name)
