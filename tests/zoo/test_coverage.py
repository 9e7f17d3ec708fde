"""Every multimodal architecture of the installed transformers has a row in the zoo, or a reason why it has none."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from benchmarks.zoo.coverage import EXEMPT, missing_architectures, multimodal_classes
from benchmarks.zoo.table import all_rows

pytestmark = pytest.mark.slow  # every modeling file of transformers is imported


def test_the_classes_are_told_by_what_they_take() -> None:
    found = {item.name: item for item in multimodal_classes()}
    assert found["CLIPModel"].architecture == "clip"
    assert (found["WhisperModel"].text, found["WhisperModel"].media) == (("decoder_input_ids",), ("input_features",))
    assert {"BertModel", "ViTModel", "CLIPTextModel", "CLIPPreTrainedModel", "MusicgenForCausalLM"}.isdisjoint(found)


def test_every_multimodal_architecture_has_a_row() -> None:
    assert set(missing_architectures(all_rows())) <= set(EXEMPT)


def test_an_architecture_without_rows_is_missed() -> None:
    rows = {key: row for key, row in all_rows().items() if not row.name.startswith("CLIPModel")}
    assert "clip" in missing_architectures(rows)


def test_no_exemption_is_left_over() -> None:
    assert set(EXEMPT) <= set(missing_architectures(all_rows()))
