"""A benchmark in words: which form is fastest where, which loses where, and what is missing."""

from typing import Any

from rich.console import Console

from mfcompile.benchmark.result import summarize
from mfcompile.cli.benchmark_tables import cost_table, findings, machine_line, speed_table
from mfcompile.cli.console import PLAIN_WIDTH
from tests.benchmark_documents import MACHINE, benchmark


def printed(table: Any) -> list[str]:
    console = Console(width=PLAIN_WIDTH)
    with console.capture() as capture:
        console.print(table)
    return [line for line in capture.get().splitlines() if line.strip()]


def test_times_and_ratios_stand_in_their_columns() -> None:
    lines = printed(speed_table(benchmark().as_dict()))
    cells = [line.split() for line in lines[3:]]
    assert cells[0] == [
        "batch",
        "1,",
        "1",
        "token",
        "1",
        "dense",
        "11",
        "10.5",
        "-",
        "11.5",
        "1",
        "1.00",
        "-",
        "1.00",
        "-",
        "3",
    ]
    assert cells[2] == ["runtime", "22", "21", "-", "23", "0.50", "0.50", "-", "0.50", "2.0e-06", "3"]
    assert cells[5][:2] + cells[5][5:6] == ["runtime", "50", "2.00"]


def test_costs_stand_in_their_columns_and_what_is_missing_has_none() -> None:
    lines = printed(cost_table(benchmark().as_dict()))
    runtime, int8 = (next(line for line in lines if line.strip().startswith(name)) for name in ("runtime", "int8"))
    assert runtime.split()[-10:] == ["160", "MB", "160", "MB", "200", "MB", "40", "ms", "8", "ms"]
    assert int8.split()[-5:] == ["-"] * 5


def test_who_wins_where_and_who_loses_where() -> None:
    assert list(findings(benchmark().as_dict())) == [
        "Nothing is faster than dense at batch 1, 1 token, 1 thread.",
        "Fastest: runtime at batch 1, 32 tokens, 1 thread (2.00x).",
        "runtime is slower than dense at batch 1, 1 token, 1 thread (0.50x).",
        "packed is neither faster nor slower than dense at every size and number of threads (1.00x to 1.00x).",
        "int8 was not measured: there is no int8 file",
        "packed at batch 1, 32 tokens, 2 threads: out of beads",
    ]


def test_a_reason_that_several_forms_share_is_said_once() -> None:
    document = benchmark().as_dict()
    document["variants"] = [{**item, "reason": "no such file"} for item in document["variants"][:2]]
    first, second = (item["name"] for item in document["variants"])
    told = [line for line in findings(document) if "no such file" in line]
    assert told == [f"{first} and {second} were not measured: no such file"]


def test_outputs_that_differ_are_pointed_out() -> None:
    seconds = {"dense": (1.0,), "int8": (0.5,)}
    timings = tuple(summarize(seconds, "dense", size=0, threads=1, errors={"int8": 0.02}))
    told = list(findings(benchmark(timings=timings, failures=()).as_dict()))
    assert "note: outputs of int8 differ from those of dense by 0.02 of the largest: see that this is meant" in told
    assert not any("differ" in line for line in findings(benchmark().as_dict()))


def test_the_machine_is_named() -> None:
    assert machine_line(benchmark().as_dict()) == (
        "Machine: Abacus 9000, 2 cores, beads, load average 0.25; onnxruntime 1.31.1; sparse runtime: avx512."
    )
    bare = {**MACHINE, "load_average": None, "sparse_runtime": None, "instruction_sets": []}
    assert machine_line(benchmark(machine=bare).as_dict()) == (
        "Machine: Abacus 9000, 2 cores, instruction sets unknown; onnxruntime 1.31.1; sparse runtime: none."
    )
