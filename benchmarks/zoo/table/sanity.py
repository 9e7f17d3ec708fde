"""Models of one modality: everything in them is of that region."""

from __future__ import annotations

from benchmarks.zoo.row import DROP, Row, image, text

EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

ROWS = (
    Row("BertModel", "text", text()),
    Row("Dinov2Model", "vision", image(), {"out_features": DROP, "out_indices": DROP, "stage_names": DROP}),
    Row("GptOssForCausalLM", "text", text(), EXPERTS),
    Row("LlamaForCausalLM", "text", text()),
    Row("MixtralForCausalLM", "text", text(), EXPERTS),
    Row("ViTModel", "vision", image()),
)
