"""torch's fused layers: what the plain operators compute is what is captured, exported and compared."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

import mfcompile


class Captioner(nn.Module):
    """nn.Transformer's layers over padded text and a list of pictures."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.words = nn.Linear(12, 16), nn.Embedding(30, 16)
        self.see = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
        self.read = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), 2)
        self.join = nn.TransformerDecoderLayer(16, 2, 24, batch_first=True)

    def forward(self, images: list[Tensor], caption: Tensor, caption_mask: Tensor) -> Tensor:
        seen = self.see(self.lift(torch.stack(images)))
        text = self.read(self.words(caption), src_key_padding_mask=caption_mask == 0)
        joined: Tensor = self.join(text, seen)
        return joined


def test_padded_tokens_of_an_encoder_are_what_its_layers_compute(tmp_path: Path) -> None:
    """By its fast path nn.TransformerEncoder gives zeros for them, which no exported program does."""
    torch.manual_seed(0)
    model = Captioner().eval()
    keep = torch.ones(3, 6, dtype=torch.long)
    keep[2, 4:] = 0
    inputs = {"images": [torch.randn(4, 12) for _ in range(3)], "caption": torch.randint(1, 30, (3, 6)), "caption_mask": keep}
    compiled = mfcompile.compile_pruned(model, inputs, sparsity=0.5)
    assert torch.backends.mha.get_fastpath_enabled()
    text = {site.name: compiled.statistics.sites[site.name] for site in compiled.regions.by_region()["text"]}
    assert {(item.token_count, item.padding_count) for item in text.values()} == {(16, 2)}
    assert {region for fqn, region in compiled.regions.weights.items() if fqn.startswith("join.")} == {"fusion"}
    report = compiled.verify(compiled.export_onnx(tmp_path / "model.onnx"))
    assert report.passed, report.notes
