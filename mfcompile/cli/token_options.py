"""The options that say which tokens stay, and their tables."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType

from mfcompile.cli.tables import percent, table
from mfcompile.errors import InputError
from mfcompile.recipe import TOKEN_OUTPUTS, TOKEN_REST, TOKEN_RESTORE

if TYPE_CHECKING:
    from mfcompile.passes.token_sites import TokenSites
    from mfcompile.recipe import Recipe
    from mfcompile.token_request import TokenRequest

Keep = int | float


def add_token_options(group: argparse._ArgumentGroup) -> None:
    """The options of token pruning."""
    group.add_argument(
        "--tokens",
        nargs="+",
        action="extend",
        type=_keep,
        metavar="KEEP",
        help="go on with fewer tokens behind some attentions: 0.7 keeps that share of the image tokens at three places; "
        "region:vision=0.7 and SITE=0.5 (a name, a glob or re:REGEX) say where, and SITE=64 how many in all "
        "(default: all tokens; mfcompile inspect --tokens lists the sites)",
    )
    group.add_argument(
        "--token-scorer",
        "--token_scorer",
        metavar="NAME",
        help="what ranks tokens: cit (attention received), cls_attention, last_token, norm, random (default: cit)",
    )
    group.add_argument(
        "--token-rest",
        "--token_rest",
        choices=TOKEN_REST,
        help="drop the other tokens, or merge them into one (default: drop)",
    )
    group.add_argument(
        "--token-restore",
        "--token_restore",
        choices=TOKEN_RESTORE,
        help="what dropped tokens hold where all are read: zeros, or their last state (default: zeros)",
    )
    group.add_argument(
        "--token-outputs",
        "--token_outputs",
        choices=TOKEN_OUTPUTS,
        help="restore keeps the sizes of outputs that list tokens; shorter lists the kept ones alone, with a further output "
        "NAME_kept of their positions (default: restore)",
    )


def _keep(text: str) -> tuple[str | None, Keep]:
    """A reader of ``0.7``, ``region:vision=0.7`` and ``SITE=64``."""
    pattern, separator, value = text.rpartition("=")
    try:
        number: Keep = int(value) if value.lstrip("-").isdigit() else float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: {value!r} is no share (0.7) and no number of tokens (64). Give 0.7, region:vision=0.7, or SITE=64"
        ) from None
    return (pattern if separator else None), number


def read_tokens(given: Sequence[tuple[str | None, Keep]]) -> Keep | dict[str, Keep]:
    """What a recipe keeps of ``--tokens``.

    Raises:
        InputError: a number for all stands beside others, or a place is named twice.
    """
    if given[0][0] is None:
        if len(given) > 1:
            raise InputError("--tokens: give one share for the image tokens, or PLACE=SHARE for each place, not both")
        return given[0][1]
    found: dict[str, Keep] = {}
    for pattern, value in given:
        if pattern is None or pattern in found:
            raise InputError(
                f"--tokens: {pattern} is given twice"
                if pattern
                else f"--tokens: {value:g} stands beside named places; name its place, too"
            )
        found[pattern] = value
    return found


def request_of(recipe: Recipe) -> TokenRequest | None:
    """What a recipe asks for; None where all tokens stay."""
    if recipe.tokens is None:
        return None
    from mfcompile.token_request import TokenRequest

    return TokenRequest(recipe.tokens, recipe.token_scorer, recipe.token_rest, recipe.token_restore, recipe.token_outputs)


def check_tokens(recipe: Recipe, kind: str) -> None:
    """Refuse what can be judged before the model is run.

    Args:
        recipe: what is asked for.
        kind: of the source.

    Raises:
        InputError: there is no such scorer, or tokens of such a model or in such files cannot be cut.
    """
    if recipe.tokens is None:
        return
    from mfcompile.passes.token_scores import resolve_scorer

    resolve_scorer(recipe.token_scorer)
    if kind == "onnx":
        raise InputError(f"tokens are cut in PyTorch models, and {recipe.source} is an .onnx file: leave out --tokens")
    if recipe.split:
        raise InputError("--tokens writes one file: leave out --split")


def cuts_table(requests: Sequence[Mapping[str, Any]]) -> RenderableType:
    """Where tokens were cut, and how many stay."""
    rows = [
        (
            cut["site"],
            f"{cut['arriving']:,}",
            f"{cut['protected']:,}",
            f"{cut['kept']:,}" + (" + 1" if cut["merged"] else ""),
            percent(cut["kept"] / cut["arriving"]),
            str(request["scorer"] or "of your own"),
        )
        for request in requests
        for cut in request["cuts"]
    ]
    columns = ("behind", ">tokens", ">protected", ">stay", ">share", "scored by")
    return table("Tokens", columns, rows)


def describe_sites(sites: TokenSites) -> dict[str, Any]:
    """Token sites as JSON."""
    return {
        "sites": [
            {
                "name": site.name,
                "region": site.region,
                "modality": site.modality,
                "tokens": site.tokens,
                "protected": site.protected,
                "keeps": list(site.keeps),
                "node": site.node,
            }
            for site in sites.sites
        ],
        "refused": [{"subject": item.subject, "reason": item.reason} for item in sites.refused],
    }


def sites_tables(view: Mapping[str, Any]) -> list[RenderableType]:
    """Where tokens can be cut, and where not and why."""
    rows = [
        (
            site["name"],
            site["region"],
            site["modality"] or "-",
            f"{site['tokens']:,}",
            f"{site['protected']:,}",
            "; ".join(site["keeps"]) or "-",
            site["node"],
        )
        for site in view["sites"]
    ]
    columns = ("site", "region", "of", ">tokens", ">stay", "what stays", "cut behind")
    found = [table(f"Token sites: {len(rows)}", columns, rows)]
    if view["refused"]:
        refused = [(item["subject"], item["reason"]) for item in view["refused"]]
        found.append(table(f"Tokens cannot be cut at: {len(refused)}", ("attention and node", "because"), refused))
    return found
