"""Fewer tokens as something to ask for beside masks: what ``compile_pruned``, recipes and metadata of files hold of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mfcompile.errors import InputError
from mfcompile.graph import CapturedGraph
from mfcompile.passes.token_pruning import token_requests
from mfcompile.passes.token_scores import TokenScorer
from mfcompile.tokens import prune_tokens

Keep = int | float


@dataclass(frozen=True)
class TokenRequest:
    """Arguments of ``mfcompile.prune_tokens``; see there.

    Attributes:
        keep: a share, or site, pattern or region -> share or number of tokens.
        scorer: a name, or a callable.
        rest: "drop" or "merge".
        restore: "zeros" or "last".
        outputs: "restore" or "shorter".
    """

    keep: Keep | Mapping[str, Keep]
    scorer: str | TokenScorer = "cit"
    rest: str = "drop"
    restore: str = "zeros"
    outputs: str = "restore"

    def apply(self, captured: CapturedGraph, modalities: Mapping[str, str] | None = None) -> CapturedGraph:
        """The captured graph with fewer tokens.

        Raises:
            InputError, ExportError: see ``prune_tokens``.
        """
        return prune_tokens(
            captured,
            self.keep,
            scorer=self.scorer,
            rest=self.rest,
            restore=self.restore,
            outputs=self.outputs,
            modalities=modalities,
        )


def as_request(tokens: Keep | Mapping[str, Keep] | TokenRequest) -> TokenRequest:
    """A request as it is, or one with defaults of what is to be kept."""
    return tokens if isinstance(tokens, TokenRequest) else TokenRequest(tokens)


def repeat_cuts(
    captured: CapturedGraph, metadata: Mapping[str, str], modalities: Mapping[str, str] | None = None
) -> CapturedGraph:
    """Cut the tokens of a model as those of a file were cut, by what the file's metadata say.

    Args:
        captured: the model with all tokens.
        metadata: of the file; without an entry for tokens nothing is cut.
        modalities: as in ``prune_tokens``.

    Raises:
        InputError: they were cut by a scorer that has no name.
    """
    for told in token_requests(metadata):
        if told["scorer"] is None:
            raise InputError(
                "the file's tokens were cut by a scorer of its maker's own, which the file does not hold: cut them by "
                "mfcompile.prune_tokens with that scorer, and compare with mfcompile.verify"
            )
        named: dict[str, Any] = {key: told[key] for key in ("keep", "scorer", "rest", "restore", "outputs")}
        captured = TokenRequest(**named).apply(captured, modalities)
    return captured


def token_rows(captured: CapturedGraph) -> list[dict[str, Any]] | None:
    """What was asked for and done to the tokens of a captured graph, as reports hold it; None where nothing was."""
    found = token_requests(captured.exported.metadata) if captured.exported is not None else []
    return found or None
