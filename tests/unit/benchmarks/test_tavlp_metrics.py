"""Metrics of the benchmark's tasks against examples worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.tavlp.metrics import accuracy, bleu4, cider, recall


def test_recall_counts_rows_whose_own_column_is_among_the_best() -> None:
    scores = np.array(
        [
            [0.9, 0.1, 0.2, 0.3],  # first
            [0.8, 0.5, 0.1, 0.2],  # second
            [0.7, 0.6, 0.5, 0.1],  # third
            [0.1, 0.2, 0.3, 0.9],  # first
        ],
        dtype=np.float32,
    )
    assert recall(scores, 1) == 50
    assert recall(scores, 2) == 75
    assert recall(scores, 3) == 100


def test_ties_and_pairs_without_a_score_are_no_hits() -> None:
    assert recall(np.zeros((4, 4), dtype=np.float32), 1) == 0
    unscored = np.full((2, 2), -np.inf, dtype=np.float32)
    assert recall(unscored, 2) == 0


def test_accuracy_is_the_share_of_equal_entries() -> None:
    assert accuracy([1, 2, 3, 3], [1, 2, 0, 3]) == 75


def test_bleu_is_the_geometric_mean_of_the_precisions_of_one_to_four_words() -> None:
    # 4 of 5 words, 3 of 4 pairs, 2 of 3 triples and 1 of 2 quadruples are there; lengths agree.
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu4(["a b c d e"], [["a b c d f"]]) == pytest.approx(expected)


def test_bleu_punishes_short_sentences_and_takes_the_reference_that_fits() -> None:
    assert bleu4(["a b c d"], [["a b c d e"]]) == pytest.approx(100 * math.exp(1 - 5 / 4))
    assert bleu4(["a b c d", "v w x y z"], [["p q r s", "a b c d"], ["v w x y z"]]) == pytest.approx(100)


def test_bleu_splits_words_at_blanks_only() -> None:
    assert bleu4(["one , two x-ray four"], [["one , two x-ray four"]]) == pytest.approx(100)
    assert bleu4(["one, two three four"], [["one , two three four"]]) < 90


def test_cider_is_a_mean_of_cosines_over_references_and_lengths() -> None:
    # No word is shared by two pictures, so all weigh alike. The first sentence equals one of its two references and has
    # nothing of the other; the second equals its only one: 10 times (1/2 + 1) / 2, and papers print that times 100.
    score = cider(["a b c d", "k l m n"], [["a b c d", "w x y z"], ["k l m n"]])
    assert score == pytest.approx(100 * 10 * 0.75)


def test_cider_gives_nothing_for_words_that_every_picture_has() -> None:
    assert cider(["a red thing here", "a red thing here"], [["a red thing here"], ["a red thing here"]]) == 0
