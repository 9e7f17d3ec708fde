"""The picture: held-out R@1 over the FLOPs that are left."""

from __future__ import annotations

from pathlib import Path

from benchmarks.comp_evidence.arms import ARMS, FLOPS, TUNINGS
from benchmarks.comp_evidence.results import Results
from mfcompile.report_plot import STYLE

SHOWN = ("probe", "comp", "fixed", "parameters", "vision-tokens", "wanda-cit", "random")


def draw(results: Results, path: Path) -> None:
    """A panel for one-shot and each kind of training, a line per arm with deviations, the dense model as a dashed line."""
    from matplotlib import pyplot, rc_context

    with rc_context(STYLE):
        figure, panels = pyplot.subplots(1, len(TUNINGS), figsize=(12, 3.6), sharey=True, layout="constrained")
        dense = results.dense()
        for panel, tuning in zip(panels, TUNINGS, strict=True):
            for arm in SHOWN:
                found = [(share, mean) for share in FLOPS if (mean := results.mean(arm, share, tuning)) is not None]
                if found:
                    spread = [mean.deviation or 0.0 for _, mean in found]
                    values, name = [mean.mean for _, mean in found], ARMS[arm].title
                    panel.errorbar(
                        [share for share, _ in found],
                        values,
                        spread,
                        marker="o",
                        markersize=3,
                        capsize=2,
                        label=name,
                    )
            if dense is not None:
                panel.axhline(dense, linestyle="--", linewidth=0.8, color="grey")
            panel.set(title=tuning, xlabel="FLOPs left, share of dense")
            panel.set_xlim(min(FLOPS) - 0.04, max(FLOPS) + 0.04)
        panels[0].set_ylabel("held-out R@1, %")
        panels[0].set_ylim(0, 100)
        if panels[0].get_legend_handles_labels()[0]:
            panels[0].legend(fontsize=6)
        figure.savefig(path, dpi=110, metadata={"Software": None})
        pyplot.close(figure)
