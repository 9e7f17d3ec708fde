"""docs/comp_tables.md with its picture, and what docs/comp.md says of it, written from the cells alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

from benchmarks.comp_evidence.arms import ARMS, FLOPS, JOINT, ORDERED, SCORES, SEEDS, SINGLE, TUNINGS, arms_of, cim
from benchmarks.comp_evidence.cells import SCORE, STEPS
from benchmarks.comp_evidence.results import FEWEST, MISSING, UNREACHED, Mean, Results
from mfcompile.files import write_atomically

FIRST, LAST = "<!-- evidence: python -m benchmarks.comp_evidence tables -->", "<!-- end of evidence -->"
TITLES = {
    "one-shot": "One-shot, no training",
    "recovered": f"One-shot, then {STEPS} steps",
    "inside": f"Pruned inside fine-tuning, {STEPS} steps in all",
}
PAPER = """\
| NLVR2, BLIP, 0.8 of the FLOPs removed | accuracy |
|---|---:|
| both modes, independent metrics, simply joined | 77.88 |
| with CIM | 78.60 |
| with CIM and MPS | 79.62 |

Source: the ablation of CoMP (CVPR 2026, arXiv 2604.02956), as read in public notes about the paper, after its fine-tuning on
two A800. Another model, another task and another ratio: these figures stand here to be compared with in sign, not in size."""


def pairs(tuning: str) -> Iterator[tuple[str, str, str]]:
    """(claim, arm, the arm it is compared with)."""
    own = cim(tuning)
    yield from (("joint against single modes", own, other) for other in SINGLE)
    yield from (("CIM against independent scores", own, other) for other in (*SCORES, "random"))
    searched = [arm for arm in JOINT if arm != ORDERED and arm in arms_of(tuning)]
    yield from (("mode search against the fixed order", arm, ORDERED) for arm in searched)


def write_page(folder: Path, docs: Path) -> Path:
    """Write the tables, draw the picture, and put the reading between its two comments in docs/comp.md."""
    from benchmarks.comp_evidence.picture import draw

    results = Results(folder)
    (docs / "images").mkdir(parents=True, exist_ok=True)
    draw(results, docs / "images" / "comp_accuracy.png")
    path = docs / "comp_tables.md"
    write_atomically(path, ("\n\n".join(_parts(results)) + "\n").encode())
    page = docs / "comp.md"
    text = page.read_text(encoding="utf-8") if page.is_file() else ""
    if FIRST in text:
        before, _, rest = text.partition(FIRST)
        _, _, after = rest.partition(LAST)
        write_atomically(page, f"{before}{FIRST}\n{reading(results)}\n{LAST}{after}".encode())
    return path


def _parts(results: Results) -> Iterator[str]:
    yield "# Evidence on joint pruning"
    yield (
        "Written by `python -m benchmarks.comp_evidence tables` from the files in `benchmarks/results/comp`; do not edit. What "
        "is compared is in [comp.md](comp.md). The trained `examples/emoji_xvlm` is scored by its own held-out retrieval: the "
        f"mean R@1 in per cent, both ways, by embeddings and by matching, of {SCORE.scenes} pairs with {SCORE.candidates} "
        f"candidates ranked again. `±` is the sample standard deviation over seeds ({', '.join(map(str, SEEDS))}: the "
        f"calibration batch, exploration, order of training batches), the number in brackets how many there are. "
        f"`{MISSING}`: not run. `{UNREACHED}`: the arm has not that much to give. All "
        "seeds prune one trained model, so that errors are those of the pruning, not of models."
    )
    yield coverage(results)
    yield "## What it says"
    yield reading(results)
    yield "![R@1 over the FLOPs that are left](images/comp_accuracy.png)"
    for tuning in TUNINGS:
        yield f"## {TITLES[tuning]}"
        yield means(results, tuning)
    yield "## Differences over the same seeds"
    yield (
        f"In points of R@1, with the standard error. On at least {FEWEST} seeds, what lies outside 95 % of Student's t (4.3 "
        "errors of 3 seeds, 2.8 of 5) counts as a difference. With heads really gone, attention received is CIT (Eq. 7), also "
        "in the rows with Wanda."
    )
    for tuning in TUNINGS:
        yield f"### {TITLES[tuning]}"
        yield differences(results, tuning)
    yield "## The paper's figures"
    yield PAPER


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    rule = "|---" * texts + "|" + "---:|" * (len(headings) - texts)
    return "\n".join(["| " + " | ".join(headings) + " |", rule, *("| " + " | ".join(row) + " |" for row in rows)])


def coverage(results: Results) -> str:
    """How many cells there are, and what one costs."""
    rows = []
    for tuning in TUNINGS:
        counts = [results.count(share, tuning) for share in FLOPS]
        rows.append([TITLES[tuning], *(f"{count} of {len(arms_of(tuning)) * len(SEEDS)}" for count in counts)])
    seconds = results.seconds()
    cost = f"\n\nA cell took {median(seconds):.0f} CPU seconds in the median, {max(seconds):.0f} at most." if seconds else ""
    return _table(["cells at FLOPs", *(f"{share:g}" for share in FLOPS)], rows) + cost


def means(results: Results, tuning: str) -> str:
    """A row per arm."""
    dense = results.dense()
    rows = [["dense", *[MISSING if dense is None else f"{dense:.1f}"] * len(FLOPS)]]
    rows += [[ARMS[arm].title, *(_mean(results, arm, share, tuning) for share in FLOPS)] for arm in arms_of(tuning)]
    return _table(["R@1 at FLOPs", *(f"{share:g}" for share in FLOPS)], rows)


def _mean(results: Results, arm: str, flops: float, tuning: str) -> str:
    found = results.mean(arm, flops, tuning)
    if found is None:
        return UNREACHED if results.is_unreached(arm, flops, tuning) else MISSING
    return str(found)


def differences(results: Results, tuning: str) -> str:
    """A row per pair of arms."""
    rows = []
    for claim, one, other in pairs(tuning):
        cells = [_difference(results.difference(one, other, share, tuning)) for share in FLOPS]
        rows.append([claim, f"{ARMS[one].title} - {ARMS[other].title}", *cells])
    return _table(["claim", "difference", *(f"{share:g}" for share in FLOPS)], rows, texts=2)


def _difference(found: Mean | None) -> str:
    if found is None:
        return MISSING
    error = "" if found.error is None else f" ± {found.error:.1f}"
    return f"{found.mean:+.1f}{error} ({found.count})"


def reading(results: Results) -> str:
    """Sentences on every claim, from the differences."""
    lines = []
    for tuning in TUNINGS:
        for claim in dict.fromkeys(claim for claim, _, _ in pairs(tuning)):
            said = [
                sentence
                for share in FLOPS
                for verdict in ("more", "less", "noise", "open")
                if (sentence := _said(results, claim, share, tuning, verdict))
            ]
            if said:
                lines.append(f"* {TITLES[tuning]}, {claim}: {'; '.join(said)}.")
    return "\n".join(lines) if lines else f"No pair of arms was run: {MISSING}."


_WORDS = {
    "more": "better than {}",
    "less": "worse than {}",
    "noise": "no different, within the errors, from {}",
    "open": "too few seeds to tell from {}",
}


def _said(results: Results, claim: str, flops: float, tuning: str, verdict: str) -> str:
    """The pairs of a claim that have a verdict at a size."""
    found: dict[str, list[str]] = {}
    for own, one, other in pairs(tuning):
        gap = results.difference(one, other, flops, tuning) if own == claim else None
        if gap is not None and gap.verdict == verdict:
            found.setdefault(one, []).append(f"{ARMS[other].title} ({_difference(gap)})")
    said = [f"{ARMS[one].title} is {_WORDS[verdict].format(', '.join(others))}" for one, others in found.items()]
    return f"at {flops:g}, {', '.join(said)}" if said else ""
