"""Token pruning: fewer tokens behind chosen attentions, in the module and in its ONNX file alike.

::

    captured = mfcompile.capture(model, example_inputs)
    print(mfcompile.find_token_sites(captured))
    fewer = mfcompile.prune_tokens(captured, {"vision_model.encoder.layers.3.self_attn": 0.7})
    mfcompile.export_onnx(fewer, "fewer.onnx")
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor, nn

from mfcompile.errors import ExportError, InputError
from mfcompile.exporters.program import tensor_input_nodes
from mfcompile.frontends.capture import capture
from mfcompile.frontends.exporting import candidates
from mfcompile.frontends.program_module import program_module
from mfcompile.graph import CapturedGraph, Diagnostic, ExportedModel
from mfcompile.inputs import ExampleInputs
from mfcompile.passes.base import run_transform
from mfcompile.passes.masking import ApplyMasks
from mfcompile.passes.modalities import VISION, infer_modalities
from mfcompile.passes.program_values import node_values
from mfcompile.passes.token_pruning import PruneTokens
from mfcompile.passes.token_scores import TokenEvidence, TokenScorer, resolve_scorer
from mfcompile.passes.token_site_cut import Keep
from mfcompile.passes.token_sites import SitePlan, TokenSite, TokenSites, plan_sites, protect
from mfcompile.rewriting import example_of, functional

__all__ = ["TokenEvidence", "TokenScorer", "find_token_sites", "prune_tokens", "token_schedule", "with_token_program"]

QUARTERS = (0.25, 0.5, 0.75)
"""Where a share for a whole region is applied, in depth: DynamicViT (NeurIPS 2021) and its successors cut at three places."""

_FREE, _FIXED = "torch.export without cache", "torch.export, sequence fixed"
"""Ways of exporting to start with: lengths of text free where a cut is elsewhere, or fixed. A cache is never exported: it
holds as many tokens as were seen."""


@dataclass(frozen=True)
class _Program:
    """An exported program of the model, and what a cut of its tokens needs to know."""

    exported: ExportedModel
    modalities: Mapping[str, str]
    plans: tuple[SitePlan, ...]
    image_tokens: Mapping[str, int]
    sites: TokenSites


def find_token_sites(captured: CapturedGraph, *, modalities: Mapping[str, str] | None = None) -> TokenSites:
    """Where tokens of a model can be cut, and why they cannot elsewhere.

    Lengths are those of the example inputs: a cut is to a fixed number of tokens.

    Args:
        captured: what ``capture`` gave.
        modalities: input name -> "vision", "text", any other modality, or "control", where inference needs help.

    Raises:
        ExportError: the model has no exported program, which is what tokens are cut in.
        RegionError: the modality of an input cannot be decided.
    """
    return next(program.sites for program in _programs(captured, modalities, _FIXED) if not _has_free_length(program.exported))


def with_token_program(captured: CapturedGraph, *, modalities: Mapping[str, str] | None = None) -> CapturedGraph:
    """The same graph with the program that tokens are cut in, so that it is exported once for many requests.

    Args:
        captured: what ``capture`` gave.
        modalities: as in ``find_token_sites``.

    Raises:
        ExportError: there is none.
    """
    programs = _programs(captured, modalities, _FIXED)
    exported = next(program.exported for program in programs if not _has_free_length(program.exported))
    return replace(captured, exported=exported)


def with_program_for(
    captured: CapturedGraph, keep: Keep | Mapping[str, Keep], *, modalities: Mapping[str, str] | None = None
) -> CapturedGraph:
    """The same graph with the first program in which a request can be met, so that lengths stay free where nothing is cut.

    Args:
        captured: what ``capture`` gave.
        keep: as in ``prune_tokens``.
        modalities: as in ``find_token_sites``.

    Raises:
        InputError: a site is unknown or refused, in every program.
        ExportError: the model has no exported program.
    """
    program, _ = _requested(captured, keep, modalities)
    return replace(captured, exported=program.exported)


def prune_tokens(
    captured: CapturedGraph,
    keep: Keep | Mapping[str, Keep],
    *,
    scorer: str | TokenScorer = "cit",
    rest: str = "drop",
    restore: str = "zeros",
    outputs: str = "restore",
    head_factors: Mapping[str, Tensor] | None = None,
    modalities: Mapping[str, str] | None = None,
) -> CapturedGraph:
    """Cut tokens behind self-attentions: score them, keep a fixed number, and go on with fewer.

    The first part of CoMP (CVPR 2026) with the places of MADTP (CVPR 2024), without training. Tokens that are read in the
    end (CLS, EOS), learned tokens and the text of a decoder always stay; padding goes first. Outputs keep their sizes: where
    they list all tokens, those that were dropped are zero; ``outputs="shorter"`` leaves them out.

    Args:
        captured: what ``capture`` gave; nothing of it is changed.
        keep: site -> the share of unprotected tokens that stay (float), or tokens that stay in all (int). A key may be a glob
            or ``re:`` pattern of site names, or ``region:vision``: a share for a region applies at three of its sites, at
            the quarters of its depth. A number alone is one for ``region:vision``.
        scorer: "cit" (Eq. 6: attention received), "cls_attention", "last_token", "norm", "random", or any callable that
            takes a ``TokenEvidence`` and gives (batch, tokens) scores by torch operators.
        rest: "drop", or "merge" for one more token, the mean of the dropped ones weighted by their scores. Beside it, rotary
            tables and position embeddings give it the row of the best-scored of them; a mask lets a query look at it that
            might look at all of them that are no padding, and lets it look at what any of them might.
        restore: what dropped tokens hold where all are read: "zeros", or "last", their state when they were dropped (where
            the sizes allow it; ``diagnostics`` says where not).
        outputs: "restore", or "shorter": an output that lists tokens lists those that are left, and another one, its name
            with ``_kept`` behind it, gives their positions in what it was before: (batch, tokens left) int64, ascending, -1
            for a merged token. The model then gives one flat dict of its outputs, by the names that ONNX files have.
        head_factors: site -> (heads,) factors between 0 and 1 of its heads in "cit" scores (Eq. 7), for heads that are being
            removed; None leaves out those that zeros in the weights, or masks, have removed.
        modalities: as in ``find_token_sites``.

    Returns:
        A captured graph of a trainable module over the same parameters under the same names; it can be calibrated, masked
        and exported like any other. ``specialised`` says what was cut, ``diagnostics`` what means something else since.

    Raises:
        InputError: a site is unknown or refused (with node and reason), or a number does not fit.
        ExportError: the model has no exported program, which is what tokens are cut in.
    """
    chosen = resolve_scorer(scorer)
    program, named = _requested(captured, keep, modalities)
    how = _Cut(chosen, rest, restore, outputs, _factors(head_factors, named))
    return _cut(captured, program, named, how).captured


class TokenCutter:
    """Cuts tokens of one program again and again: its sites are found once, and a graph is recorded where it is asked for.

    Args:
        captured: with the program that is cut; nothing of it is changed.
        modalities: as in ``find_token_sites``.
    """

    def __init__(self, captured: CapturedGraph, *, modalities: Mapping[str, str] | None = None) -> None:
        assert captured.exported is not None  # it is what is cut
        self._captured = captured
        kinds = {item.name: item.modality for item in infer_modalities(captured, modalities) if item.modality}
        self._program = _with_sites(captured.exported, kinds)

    def cut(
        self, keep: Mapping[str, Keep], *, scorer: str | TokenScorer = "cit", rest: str = "drop", restore: str = "zeros"
    ) -> FewerTokens:
        """A program with fewer tokens; the arguments are those of ``prune_tokens``.

        Raises:
            InputError: a site is unknown or refused in this program, or a number does not fit.
        """
        named = _resolve(keep, self._program.sites)
        return _cut(self._captured, self._program, named, _Cut(resolve_scorer(scorer), rest, restore))


@dataclass(frozen=True)
class FewerTokens:
    """A program with fewer tokens, before it is captured.

    Attributes:
        exported: the program.
        before: the graph whose program was cut.
        example: inputs that it runs on.
        cuts: what was cut, in words.
        diagnostics: what means something else since.
    """

    exported: ExportedModel
    before: CapturedGraph
    example: ExampleInputs
    cuts: tuple[str, ...]
    diagnostics: tuple[Diagnostic, ...]

    @cached_property
    def module(self) -> nn.Module:
        """The program as a trainable module, without the masks of the graph before."""
        return program_module(self.exported.program)

    @cached_property
    def captured(self) -> CapturedGraph:
        """The module as a captured graph; see ``prune_tokens``."""
        found = capture(self.module, self.example)
        notes = (*self.before.diagnostics, *self.diagnostics)
        found = replace(found, exported=self.exported, specialised=(*found.specialised, *self.cuts), diagnostics=notes)
        return found if self.before.masks is None else run_transform(ApplyMasks(self.before.masks), found).graph


@dataclass(frozen=True)
class _Cut:
    """How tokens are cut; see ``prune_tokens``."""

    scorer: TokenScorer
    rest: str = "drop"
    restore: str = "zeros"
    outputs: str = "restore"
    head_factors: Mapping[str, Tensor] = field(default_factory=dict)


def _cut(captured: CapturedGraph, program: _Program, keep: Mapping[str, Keep], how: _Cut) -> FewerTokens:
    exported = program.exported
    transform = PruneTokens(
        keep, program.modalities, program.image_tokens, how.scorer, how.rest, how.restore, how.outputs,
        captured.masks, how.head_factors, (program.plans, program.sites.refused),
    )  # fmt: skip
    lifted = replace(captured, graph_module=exported.program.graph_module, exported=exported, masks=None)
    done = run_transform(transform, lifted)
    result = done.graph.exported
    assert result is not None  # the transform made it
    cuts = result.notes[len(exported.notes) :]
    return FewerTokens(result, captured, example_of(captured, exported), cuts, done.diagnostics)


def _factors(given: Mapping[str, Tensor] | None, named: Mapping[str, Keep]) -> Mapping[str, Tensor]:
    for name in given or {}:
        if name not in named:
            raise InputError(f"head_factors names {name!r}, where no token is cut; cuts are at {', '.join(named)}")
    return given or {}


def token_schedule(sites: TokenSites, keep: Keep, *, region: str = VISION, at: Sequence[float] = QUARTERS) -> dict[str, Keep]:
    """A share for a region as shares of single sites.

    Args:
        sites: what ``find_token_sites`` gave.
        keep: what stays at each of the places.
        region: whose tokens.
        at: depths, from 0 (the first site) to 1.

    Raises:
        InputError: the region has no site, or a depth is none.
    """
    own = [site for site in sites.sites if site.region == region]
    if not own:
        known = ", ".join(dict.fromkeys(site.region for site in sites.sites)) or "none"
        why = f"; refused: {sites.refused[0]}" if sites.refused else ""
        raise InputError(f"no tokens of region {region!r} can be cut; regions with sites: {known}{why}")
    if not all(0 <= depth <= 1 for depth in at):
        raise InputError(f"at={tuple(at)}: depths are between 0 and 1")
    return {own[min(int(depth * len(own)), len(own) - 1)].name: keep for depth in at}


def _requested(
    captured: CapturedGraph, keep: Keep | Mapping[str, Keep], modalities: Mapping[str, str] | None
) -> tuple[_Program, dict[str, Keep]]:
    """The first program in which all requested sites have a fixed number of tokens."""
    refusal: InputError | None = None
    for program in _programs(captured, modalities, _FREE):
        try:
            return program, _resolve(keep, program.sites)
        except InputError as error:
            refusal = error
            if not _has_free_length(program.exported):
                break
    assert refusal is not None  # _programs raises where there is no program
    raise refusal


def _resolve(keep: Keep | Mapping[str, Keep], sites: TokenSites) -> dict[str, Keep]:
    """Names of sites in place of patterns and regions."""
    request = keep if isinstance(keep, Mapping) else {f"region:{VISION}": keep}
    named: dict[str, Keep] = {}
    for pattern, value in request.items():
        if pattern.startswith("region:"):
            named.update(token_schedule(sites, value, region=pattern.partition(":")[2]))
            continue
        found = [site.name for site in sites.sites if _matches(pattern, site.name)]
        if not found:
            reasons = [str(item) for item in sites.refused if _matches(pattern, item.subject.partition(" at ")[0])]
            why = reasons[0] if reasons else "there is no attention of that name"
            known = ", ".join(site.name for site in sites.sites) or "none"
            raise InputError(
                f"tokens cannot be cut at {pattern}: {why}. Sites are {known}; find_token_sites lists them with what is refused"
            )
        named.update(dict.fromkeys(found, value))
    if not named:
        raise InputError("keep names no site; find_token_sites lists them")
    return named


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        try:
            return re.match(pattern[3:], name) is not None
        except re.error as error:
            raise InputError(f"the pattern {pattern!r} is no regular expression: {error}") from error
    return pattern == name or fnmatch.fnmatchcase(name, pattern)


def _programs(captured: CapturedGraph, modalities: Mapping[str, str] | None, first: str) -> Iterator[_Program]:
    """Programs of the model, made when they are asked for: first with free lengths, then with those of the example."""
    tried = []
    found = False
    kinds = {item.name: item.modality for item in infer_modalities(captured, modalities) if item.modality}
    if captured.exported is not None:
        found = True
        yield _with_sites(captured.exported, kinds)
    for attempt, exported in candidates(captured, first=first):
        tried.append(f"{attempt.frontend}: {attempt.detail}")
        if exported is not None:
            found = True
            yield _with_sites(exported, kinds)
    if not found:
        raise ExportError(
            f"{type(captured.module).__name__} has no exported program, and tokens are cut in one. Tried {'; '.join(tried)}"
        )


def _with_sites(exported: ExportedModel, kinds: Mapping[str, str]) -> _Program:
    exported = replace(exported, program=functional(exported.program))
    program = exported.program
    nodes = tensor_input_nodes(program)
    modalities = {node: kinds[name] for node, name in zip(nodes, exported.input_names, strict=True) if name in kinds}
    plans, refused = plan_sites(program.graph, modalities, program.graph_signature.inputs_to_parameters)
    masks = {plan.image_mask.name: plan for plan in plans if plan.image_mask is not None}
    values = node_values(program, list(masks))
    images = {name: int(mask.reshape(*mask.shape[:2], -1)[..., 0].sum(dim=1).min()) for name, mask in values.items()}
    order = {node: position for position, node in enumerate(program.graph.nodes)}
    sites = []
    for plan in plans:
        if plan.image_mask is not None:
            plan.protected_by_mask = plan.tokens - images[plan.image_mask.name]
        protection = protect(plan, order)
        sites.append(
            TokenSite(
                plan.attention.name,
                plan.region,
                plan.tokens,
                protection.count,
                plan.point.name,
                protection.words,
                plan.modality,
            )
        )
    return _Program(exported, modalities, tuple(plans), images, TokenSites(tuple(sites), tuple(refused)))


def _has_free_length(exported: ExportedModel) -> bool:
    return any(axis != "batch" for axes in exported.dynamic_axes.values() for axis in axes.values())
