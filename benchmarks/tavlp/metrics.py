"""Metrics of the tasks, in per cent."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Scores = npt.NDArray[np.float32]


def recall(scores: Scores, count: int) -> float:
    """Per cent of rows whose own column is among the ``count`` best; a tie counts against it.

    Args:
        scores: (N, N), row i belongs to column i; -inf where a pair was not scored.
        count: k of R@k.
    """
    own = np.diagonal(scores)[:, None]
    better = (scores >= own).sum(axis=1) - 1
    return 100 * float(((better < count) & np.isfinite(own[:, 0])).mean())


def accuracy(predicted: Sequence[int], true: Sequence[int]) -> float:
    """Per cent of equal entries."""
    return 100 * float(np.mean(np.asarray(predicted) == np.asarray(true)))


def bleu4(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """BLEU@4 of a corpus by sacrebleu, without smoothing; words are what blanks separate.

    Args:
        candidates: (N) sentences.
        references: (N) true sentences of each, as many as there are.
    """
    from sacrebleu.metrics.bleu import BLEU

    most = max(map(len, references))
    # None stands for a reference that is not there, which sacrebleu allows and its types do not say.
    streams: list[Any] = [[row[index] if index < len(row) else None for row in references] for index in range(most)]
    metric = BLEU(tokenize="none", smooth_method="none", force=True)
    return float(metric.corpus_score(list(candidates), streams).score)


def cider(candidates: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr-D by pycocoevalcap, times 100 as papers print it; words are what blanks separate.

    Args:
        candidates: (N) sentences, N at least 2: with one, every word is in all documents and weighs nothing.
        references: (N) true sentences of each.
    """
    from pycocoevalcap.cider.cider import Cider

    keys = range(len(candidates))
    score, _ = Cider().compute_score({key: list(references[key]) for key in keys}, {key: [candidates[key]] for key in keys})
    return 100 * float(score)
