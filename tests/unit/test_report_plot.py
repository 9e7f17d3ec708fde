"""The picture of the sparsity per layer: what it shows, and that its files are whole and repeatable."""

from pathlib import Path
from typing import Any

import pytest

from mfcompile.report_plot import NAMED_COLOURS, arrange, plot_sparsity, short_names


def _report(counts: dict[str, int]) -> dict[str, Any]:
    sites = [
        {"name": f"{region}.layers.{index}.fc.weight", "region": region, "sparsity": 0.5 + index / (2 * count)}
        for region, count in counts.items()
        for index in range(count)
    ]
    total = {"weights": 1000, "sparsity": 0.63}
    return {
        "model": {"class": "TwoTowers"},
        "options": {"sparsity": 0.63},
        "sites": sites,
        "regions": [{"region": region, "sparsity": 0.63} for region in counts],
        "totals": {"prunable": total, "all_parameters": total},
    }


def test_bands_follow_the_regions_in_order_without_overlap() -> None:
    bands = arrange(_report({"vision": 3, "audio": 1, "text": 2}))
    assert [band.region for band in bands] == ["vision", "audio", "text"]
    positions = [position for band in bands for position in band.positions]
    assert positions == sorted(set(positions))
    assert bands[0].heights == pytest.approx((50.0, 66.67, 83.33), abs=0.01)
    assert len({band.colour for band in bands}) == 3
    assert bands[0].colour == NAMED_COLOURS["vision"]


def test_interleaved_sites_are_gathered_by_region() -> None:
    report = _report({"text": 2, "vision": 2})
    report["sites"] = [report["sites"][index] for index in (0, 2, 1, 3)]
    assert [band.labels for band in arrange(report)] == [("0.fc", "1.fc"), ("0.fc", "1.fc")]


@pytest.mark.parametrize(
    ("names", "short"),
    [
        (["a.0.q.weight", "a.0.k.weight", "a.1.q.weight"], ("0.q", "0.k", "1.q")),
        (["a.0.q.weight", "a.0.q.weight[0:4]"], ("weight", "weight[0:4]")),
        (["a.0.q.weight", "a.1.q.weight", "a.1.c.proj[0:4]"], ("0.q", "1.q", "1.c.proj[0:4]")),
        (["a.0.q", "a.0.q.weight"], ("q", "q.weight")),
        (["only.one.weight"], ("weight",)),
        (["proj", "a.proj"], ("proj", "a.proj")),
        ([], ()),
    ],
)
def test_short_names_drop_what_is_shared_and_stay_distinct(names: list[str], short: tuple[str, ...]) -> None:
    assert short_names(names) == short
    assert len(set(short)) == len(names)


@pytest.mark.parametrize("counts", [{}, {"vision": 1}, {"vision": 4, "text": 8}, {"vision": 80, "text": 60, "fusion": 60}])
def test_files_are_whole_and_repeatable(tmp_path: Path, counts: dict[str, int]) -> None:
    png, svg = plot_sparsity(_report(counts), tmp_path)
    assert png.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert svg.read_text().rstrip().endswith("</svg>")
    again = plot_sparsity(_report(counts), tmp_path, stem="again")
    assert [path.read_bytes() for path in again] == [png.read_bytes(), svg.read_bytes()]


def test_global_settings_of_matplotlib_are_left_alone(tmp_path: Path) -> None:
    from matplotlib import rcParams

    before = dict(rcParams)
    plot_sparsity(_report({"vision": 2}), tmp_path)
    assert dict(rcParams) == before


def test_a_sparsity_per_region_is_drawn_through_its_layers(tmp_path: Path) -> None:
    report = _report({"vision": 3, "text": 2})
    one, _ = plot_sparsity(report, tmp_path, stem="one")
    report["options"] = {"sparsity": {"vision": 0.5, "text": 0.75}}
    both, drawn = plot_sparsity(report, tmp_path, stem="both")
    assert "requested, by region" in drawn.read_text()
    assert one.read_bytes() != both.read_bytes()


def test_no_line_is_drawn_where_every_layer_was_asked_for_its_own(tmp_path: Path) -> None:
    report = _report({"vision": 3, "text": 2})
    _, asked = plot_sparsity(report, tmp_path, stem="asked")
    report["options"]["allocation"] = {"*": 0.5, "text.*": 0.8}
    _, own = plot_sparsity(report, tmp_path, stem="own")
    assert ("requested: 63 %" in asked.read_text(), "requested" in own.read_text()) == (True, False)
