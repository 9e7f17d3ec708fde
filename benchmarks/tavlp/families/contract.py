"""What a family of models brings to the benchmark: a pretrained model, its pretraining loss, and one model per task.

B is the batch, L the text tokens, T the image tokens, D the width, E the embedding width, V the vocabulary, A the answers.
Image states and text states are the family's own tensors; tasks only hand them back. The first dimension is the batch, so
that tasks may index and repeat rows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from emoji_xvlm.tokenizer import Tokenizer
from torch import Tensor, nn

Batch = dict[str, Tensor]
"""Arguments of a pretrained model's forward: pixel_values (B, 3, 64, 64) in -1 to 1, input_ids and attention_mask (B, L)."""


class TaskModel(nn.Module, ABC):
    """A model of one task. What comes from pretraining is fine-tuned under masks, what is new is trained dense."""

    @abstractmethod
    def encode_image(self, pixel_values: Tensor) -> Tensor:
        """(B, 3, 64, 64) float, -1 to 1, to image states (B, ...)."""

    def new_parameters(self) -> Sequence[nn.Parameter]:
        """Parameters that pretraining did not train: they learn twice as fast, as in X-VLM."""
        return ()


class RetrievalModel(TaskModel):
    """Scores images against sentences: embeddings for all pairs, a matching head for pairs that are near."""

    @abstractmethod
    def encode_text(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L) ids and padding mask to text states (B, L, D), without any image."""

    @abstractmethod
    def embed_image(self, image_states: Tensor) -> Tensor:
        """Image states to (B, E) unit vectors."""

    @abstractmethod
    def embed_text(self, text_states: Tensor) -> Tensor:
        """Text states to (B, E) unit vectors."""

    @abstractmethod
    def scale(self) -> Tensor:
        """The factor, a positive scalar, that turns cosines into logits."""

    @abstractmethod
    def match(self, image_states: Tensor, text_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, 2) logits of B pairs, column 1 says that they match.

        A family whose fusion goes on from the text states needs no ids; one that reads the sentence anew, with
        cross-attention in every layer, needs no text states.
        """


class CaptioningModel(TaskModel):
    """Writes a sentence about an image, word by word."""

    @abstractmethod
    def next_words(self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, L, V) logits of the word after each of the L given ones, which see only those before them.

        The first token is the tokenizer's cls_id; the last one to write is its sep_id.
        """


class AnsweringModel(TaskModel):
    """Answers a question about an image from a closed set."""

    @abstractmethod
    def answers(self, image_states: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, A) logits of the answers to B questions, each about its row of image states."""


class Family(Protocol):
    """A family of models, as the benchmark needs it. An object of a module in this folder, listed in ``families.FAMILIES``.

    What a family must do:

    * ``build`` gives the pretrained model on the CPU, in float32 and eval mode, every time anew. Its
      ``forward(**batch)`` runs whatever of it is pruned (for a family with a tied decoder: encoder and decoder), since
      capture and calibration see only that.
    * ``retrieval_model``, ``captioning_model`` and ``answering_model`` take a model that ``build`` gave and move its parts
      into a new module. Those who train it own it, so nothing needs copying.
    * ``mask_names`` says where masks go, for ``mfcompile.transfer_masks(masks, task_model, mask_names(task))``; every mask
      must find its place or be named in ``left_behind``, which is refused otherwise.
    * The same ``seed`` gives the same calibration batches; another seed draws others. All have at least two sources and
      text of varying length, padded. ``benchmarks.tavlp.calibration.calibration_batches`` makes them for models that
      take ``Batch`` and the tokenizer of the examples.

    Attributes:
        name: as it is called in results, "xvlm" say.
        checkpoint: the file of pretrained weights; its sha256 is kept with every result.
        pretraining_pairs: image-text pairs that pretraining drew, of which calibration takes 5 % at most.
    """

    @property
    def name(self) -> str: ...

    @property
    def checkpoint(self) -> Path: ...

    @property
    def pretraining_pairs(self) -> int: ...

    def __hash__(self) -> int: ...

    def tokenizer(self) -> Tokenizer:
        """Of pretraining. Tasks may add words behind its last one."""

    def build(self) -> nn.Module:
        """The pretrained model."""

    def example_inputs(self) -> Batch:
        """A small batch, with padding, for capture."""

    def calibration_batches(self, seed: int, count: int, batch_size: int) -> list[Batch]:
        """Generic pairs, apart from those of pretraining."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The losses of pretraining on a calibration batch, for criteria that need gradients: the same at every call."""

    def retrieval_model(self, pretrained: nn.Module) -> RetrievalModel:
        """For retrieval. Nothing is new."""

    def captioning_model(self, pretrained: nn.Module) -> CaptioningModel:
        """For captioning; a word head that pretraining trained is kept."""

    def answering_model(self, pretrained: nn.Module, *, new_words: int, answers: int) -> AnsweringModel:
        """For questions: the table of words grows by ``new_words`` rows at its end, the head of ``answers`` is new."""

    def mask_names(self, task: str) -> Mapping[str, str | Sequence[str]]:
        """Pattern of pretrained weights -> names in the model of "retrieval", "captioning" or "vqa"."""

    def left_behind(self, task: str) -> Sequence[str]:
        """Prefixes of pretrained weights that the model of a task has no place for."""
