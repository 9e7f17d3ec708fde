"""The contract of a pass, and the one driver that holds every transform to it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol, TypeVar

from mfcompile.errors import MfcompileError, PassError, PostconditionError
from mfcompile.graph import CapturedGraph, Diagnostic

T_co = TypeVar("T_co", covariant=True)

logger = logging.getLogger(__name__)


class Analysis(Protocol[T_co]):
    """Reads a graph and gives facts about it."""

    def run(self, graph: CapturedGraph) -> T_co:
        """The facts."""
        ...


@dataclass(frozen=True)
class PassResult:
    """What a transform gives back.

    Attributes:
        graph: the new graph; weights are shared with the old one.
        modified: whether anything changed.
        diagnostics: what was left alone, and why.
    """

    graph: CapturedGraph
    modified: bool
    diagnostics: tuple[Diagnostic, ...] = ()


class Transform(Protocol):
    """Makes a new graph from a graph; never touches the one it was given."""

    def requires(self, graph: CapturedGraph) -> None:
        """Raise PreconditionError when the graph cannot be rewritten."""
        ...

    def apply(self, graph: CapturedGraph) -> PassResult:
        """The rewritten graph."""
        ...

    def ensures(self, before: CapturedGraph, result: PassResult) -> None:
        """Raise PostconditionError when the result is not what the transform declares."""
        ...


def run_transform(transform: Transform, graph: CapturedGraph) -> PassResult:
    """requires -> apply -> lint -> ensures, and the input graph is unchanged.

    Raises:
        PassError: the transform broke its contract, or failed with an error of another kind.
    """
    name = type(transform).__name__
    before = str(graph.graph)
    try:
        transform.requires(graph)
        result = transform.apply(graph)
        result.graph.graph.lint()
        transform.ensures(graph, result)
    except MfcompileError:
        raise
    except Exception as error:
        raise PassError(f"{name} failed on the graph of {type(graph.module).__name__}: {error}") from error
    if str(graph.graph) != before:
        raise PostconditionError(f"{name} changed the graph it was given; a transform must work on a copy")
    if result.modified != (str(result.graph.graph) != before):
        raise PostconditionError(f"{name} declares modified={result.modified}, but the graphs say otherwise")
    logger.debug("%s: modified=%s, %d diagnostics", name, result.modified, len(result.diagnostics))
    return result
