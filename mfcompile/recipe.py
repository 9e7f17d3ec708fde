"""The recipe: every option of one pruning run, and what came of it, as YAML.

A recipe lies beside the artefacts that it made. Running it again gives the same masks; ``check_reproduced`` holds it
to that. Nothing in it is executed: it is read with ``yaml.safe_load``.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from mfcompile.errors import InputError, MfcompileError
from mfcompile.files import write_atomically
from mfcompile.recipe_checks import (
    CHECKS,
    FORMATS,
    PRECISIONS,
    ROUNDINGS,
    SPLITS,
    TOKEN_OUTPUTS,
    TOKEN_REST,
    TOKEN_RESTORE,
    UPDATES,
    VALUES,
    WEIGHTINGS,
)

__all__ = [
    "FORMATS", "MASK_OPTIONS", "PRECISIONS", "ROUNDINGS", "SPLITS", "TOKEN_OUTPUTS", "TOKEN_REST", "TOKEN_RESTORE", "UPDATES",
    "VALUES", "WEIGHTINGS", "Recipe", "ReproductionError",
]  # fmt: skip

RECIPE_VERSION = 1

MASK_OPTIONS = (
    "source",
    "sparsity",
    "criterion",
    "criterion_options",
    "allocation",
    "pattern",
    "update",
    "update_options",
    "rounding",
    "seed",
    "targets",
    "ignore",
    "regions",
    "modalities",
    "padding_mask",
    "calibration",
    "num_calibration_samples",
    "precision",
    "weighting",
    "statistics",
    "tokens",
    "token_scorer",
    "token_rest",
    "token_restore",
    "token_outputs",
    "method",
    "flops",
    "method_options",
)
"""The options that decide the masks; with any of them changed, the recorded digest says nothing."""


class ReproductionError(MfcompileError):
    """A recipe was run again and gave other masks than those it records."""


@dataclass(frozen=True)
class Recipe:
    """The options of one run, with what it produced.

    Attributes:
        source: the model.py or the Hugging Face directory.
        sparsity: fraction of the prunable weights that is removed, or region -> fraction; None for 0.63, or for what the
            pattern sets.
        criterion: what ranks the weights; None for the source's own, or MULTIFLOW where it has none.
        criterion_options: options of the criterion.
        allocation: how budgets are shared out, by name, or pattern -> sparsity; None for the criterion's own.
        pattern: the shape in which weights are removed.
        update: how kept weights are rewritten; None leaves them.
        update_options: options of the update.
        rounding: how budgets become integers, "exact" or "official".
        seed: seed of the selection.
        targets: patterns of the weights to prune; None for the default sites.
        ignore: patterns of the weights to leave dense.
        regions: pattern -> region, over what dataflow found.
        modalities: input name -> modality, over what the rules found.
        padding_mask: name of the padding mask input; None to find it by convention and shape.
        calibration: file or directory with calibration data; None takes what the source gives.
        num_calibration_samples: how many samples to calibrate with; None for all.
        precision: "model", or "float64" to calibrate in float64.
        weighting: "none", or "cip" to weigh tokens by their importance in calibration.
        statistics: file of an earlier calibration that is used in place of one; None calibrates.
        tokens: a share of the image tokens that stay, or place (site, pattern, "region:vision") -> a share, or a number of
            tokens; None keeps all.
        token_scorer: what ranks tokens.
        token_rest: "drop", or "merge" for one token in place of the others.
        token_restore: what dropped tokens hold where all are read, "zeros" or "last".
        token_outputs: whether outputs that list tokens "restore" their size or are "shorter".
        method: "masks" (also for None), "comp" to take out units and tokens, "comp+multiflow" to mask what is left.
        flops: the share of the dense FLOPs that "comp" leaves; None for 0.5.
        method_options: options of "comp".
        onnx: whether an ONNX file is written.
        format: how pruned weights are stored in it, "packed" or "dense".
        values: precision of their values, "fp32" or "fp16"; "int8" of all linear layers.
        inline: whether packed weights are decoded by plain nodes only, so that any runtime reads the file.
        external_data: whether weights are in a file beside it; None for where that saves memory, or is needed.
        load_budget: memory for loading the file, in multiples of the dense tensors; None for the exporter's default.
        split: "regions" writes one ONNX file per modality and one for their fusion; None writes one file.
        evaluate: whether the model's own ``evaluate`` is run.
        digest: sha256 of the masks; "" before they are known.
        fingerprint: fingerprint of the model that was pruned.
        versions: package -> version that took part.
    """

    source: Path
    sparsity: float | Mapping[str, float] | None = None
    criterion: str | None = None
    criterion_options: Mapping[str, Any] = field(default_factory=dict)
    allocation: str | Mapping[str, float] | None = None
    pattern: str = "unstructured"
    update: str | None = None
    update_options: Mapping[str, Any] = field(default_factory=dict)
    rounding: str = "exact"
    seed: int = 0
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] = ()
    regions: Mapping[str, str] = field(default_factory=dict)
    modalities: Mapping[str, str] = field(default_factory=dict)
    padding_mask: str | None = None
    calibration: Path | None = None
    num_calibration_samples: int | None = None
    precision: str = "model"
    weighting: str = "none"
    statistics: Path | None = None
    tokens: int | float | Mapping[str, int | float] | None = None
    token_scorer: str = "cit"
    token_rest: str = "drop"
    token_restore: str = "zeros"
    token_outputs: str = "restore"
    method: str | None = None
    flops: float | None = None
    method_options: Mapping[str, Any] = field(default_factory=dict)
    onnx: bool = True
    format: str = "packed"
    values: str = "fp32"
    inline: bool = False
    load_budget: float | None = None
    external_data: bool | None = None
    split: str | None = None
    evaluate: bool = True
    digest: str = ""
    fingerprint: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for key, check in CHECKS.items():
            problem = check(getattr(self, key))
            if problem:
                raise InputError(f"{key}: {problem}")

    def override(self, options: Mapping[str, Any]) -> Recipe:
        """The recipe with other options; where these decide masks, what it produced is forgotten.

        Raises:
            InputError: an option has a value that it cannot have.
        """
        changed = replace(self, **options)
        if self.mask_options_changed(changed):
            return replace(changed, digest="", fingerprint="", versions={})
        return changed

    def mask_options_changed(self, other: Recipe) -> tuple[str, ...]:
        """Names of the options that decide masks and differ between two recipes."""
        return tuple(key for key in MASK_OPTIONS if getattr(self, key) != getattr(other, key))

    def check_reproduced(self, digest: str, fingerprint: str, versions: Mapping[str, str]) -> None:
        """Refuse masks that are not those the recipe records.

        Raises:
            ReproductionError: the digests differ; says what else changed.
        """
        if not self.digest or digest == self.digest:
            return
        raise ReproductionError(
            f"the recipe was not reproduced: it records masks {self.digest[:16]}…, this run gave {digest[:16]}…. "
            f"{self._cause(fingerprint, versions)}. "
            f"To accept the new masks, prune {self.source} itself instead of its recipe"
        )

    def _cause(self, fingerprint: str, versions: Mapping[str, str]) -> str:
        """Why masks may differ from those recorded, as far as it can be told."""
        if fingerprint != self.fingerprint:
            return "The model's weights have changed since the recipe was written (its fingerprint differs)"
        moved = [
            f"{name} {version} -> {versions.get(name, 'absent')}"
            for name, version in self.versions.items()
            if versions.get(name) != version
        ]
        if moved:
            return f"The model is the same; versions changed: {', '.join(moved)}"
        if self.update == "gradual":
            return (
                "The model and the versions are the same; update='gradual' chooses by values that it solved for, which round "
                "otherwise on another processor or another number of threads, or the calibration data has changed"
            )
        return (
            "The model and the versions are the same, so the calibration data has changed or is drawn at random, or the "
            "criterion or the loss_fn that the model's file defines has changed"
        )

    def save(self, path: Path | str, *, beside: Path | None = None) -> Path:
        """Write the recipe as YAML, complete or not at all; the source as a path relative to the recipe.

        Args:
            path: the file to write.
            beside: the directory that the recipe will end up in; that of ``path`` when None.
        """
        path = Path(path)
        directory = (beside or path.parent).resolve()
        document: dict[str, Any] = {"recipe_version": RECIPE_VERSION}
        for item in fields(self):
            document[item.name] = _plain(getattr(self, item.name))
        document["source"] = _relative(self.source.resolve(), directory)
        for key in _OPTIONAL_PATHS:
            if (file := getattr(self, key)) is not None:
                document[key] = _relative(file.resolve(), directory)
        text = yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=120)
        return write_atomically(path, (_HEADER.format(name=path.name) + text).encode())

    @classmethod
    def load(cls, path: Path | str) -> Recipe:
        """Read a recipe; its source is resolved against its own directory.

        Raises:
            InputError: the file is missing, is no YAML mapping, or has a key or a value that a recipe cannot have
                (names the file, the line, and the nearest valid key).
        """
        path = Path(path)
        document, lines = _read(path)
        version = document.pop("recipe_version", None)
        if version != RECIPE_VERSION:
            found = "names no recipe_version" if version is None else f"is of recipe_version {version}"
            raise InputError(f"{path} {found}; this version of mfcompile reads recipe_version {RECIPE_VERSION}")
        known = {item.name for item in fields(cls)}
        for key, value in document.items():
            if key not in known:
                near = difflib.get_close_matches(str(key), sorted(known), n=1)
                hint = f" Did you mean {near[0]}?" if near else f" A recipe has: {', '.join(sorted(known))}."
                raise InputError(f"{path}, line {lines.get(key, 1)}: unknown key {key!r}.{hint}")
            is_path = key == "source" or (key in _OPTIONAL_PATHS and value is not None)
            problem = "it is not a path" if is_path and not isinstance(value, str) else None
            problem = problem or (CHECKS[key](value) if key in CHECKS else None)
            if problem:
                raise InputError(f"{path}, line {lines.get(key, 1)}: {key}: {problem}")
        if "source" not in document:
            raise InputError(f"{path}: the key source is missing: it names the model.py or model directory to prune")
        source = Path(os.path.normpath(path.parent.resolve() / document.pop("source")))
        for key in _OPTIONAL_PATHS:
            if document.get(key) is not None:
                document[key] = Path(os.path.normpath(path.parent.resolve() / document[key]))
        for key in ("targets", "ignore"):
            if isinstance(document.get(key), list):
                document[key] = tuple(document[key])
        return cls(source=source, **document)


_OPTIONAL_PATHS = ("calibration", "statistics")
"""Beside the source; relative to the recipe's directory in the file."""

_HEADER = "# What mfcompile did, and how to do it again: mfcompile prune {name}\n"


def _plain(value: Any) -> Any:
    """A field as YAML knows it."""
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    return value.as_posix() if isinstance(value, Path) else value


def _relative(target: Path, directory: Path) -> str:
    try:
        return Path(os.path.relpath(target, directory)).as_posix()
    except ValueError:  # another drive
        return target.as_posix()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """The top-level mapping of a YAML file, and the line of each of its keys."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the recipe {path} cannot be read: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        document = yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise InputError(f"{path}{where}: this is not valid YAML: {getattr(error, 'problem', error)}") from error
    if not isinstance(document, dict):
        raise InputError(f"{path} is no recipe: it holds no keys. Give a recipe.yaml that mfcompile wrote")
    lines: dict[str, int] = {}
    for key, _ in node.value if node is not None else ():
        if key.value in lines:
            raise InputError(f"{path}, line {key.start_mark.line + 1}: the key {key.value} is given twice")
        lines[key.value] = key.start_mark.line + 1
    return {str(key): value for key, value in document.items()}, lines
