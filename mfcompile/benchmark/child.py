"""One session in a process of its own: what it takes to create, to run for the first time, and to hold.

``python -m mfcompile.benchmark.child TASK`` prints its figures as one line of JSON; TASK is JSON too, the arguments of
``measure``. It imports little more than numpy and onnxruntime, and what these need is there before, with the session of a
trivial graph: the memory measured is that of the session.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from mfcompile.session_options import release_free_memory

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): the peak starts again from what is resident now


def memory(field: str) -> int | None:
    """Bytes that the system says of this process: VmRSS, what is resident, VmHWM, its peak, or RssAnon,
    what of it is no file; None where it does not."""
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    found = next((line.split()[1] for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else 1024 * int(found)


def _above(start: int | None, now: int | None) -> int | None:
    return None if start is None or now is None else max(0, now - start)


def _plain(path: str, options: onnxruntime.SessionOptions) -> Any:
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _loaded(path: str, threads: int, *, runtime: bool) -> Any:
    from mfcompile.loading import load_session

    return load_session(path, threads=threads, runtime=runtime)


def measure(
    path: str, inputs: str, threads: int, trivial: str, library: str | None, is_decoded: bool, is_trimmed: bool = False
) -> dict[str, Any]:
    """Create a session and run it twice.

    Args:
        path: the .onnx file.
        inputs: an .npz file, one array per input of the graph.
        threads: threads inside one operator.
        trivial: an .onnx file of one small node.
        library: the sparse runtime, with which ``mfcompile.load_session`` loads the file; None for stock onnxruntime.
        is_decoded: ``mfcompile.load_session`` loads the file, and decodes packed weights.
        is_trimmed: free memory is given back before the runs.

    Returns:
        Seconds of creation, first and second run, of CPU time for one thread and on the clock for more; bytes above the start:
        resident after the runs, peak; and what the runs added, mapped files apart, of which they touch more and more.
    """
    now = time.process_time if threads == 1 else time.perf_counter
    is_loaded = is_decoded or library is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    if is_loaded:  # what is imported belongs to the start
        import mfcompile.exporters.unpacking
        import mfcompile.mapped_tensors  # noqa: F401

        if library is not None:
            from mfcompile import runtime

            runtime.library_path()
        first = _loaded(trivial, threads, runtime=False)
    else:
        first = _plain(trivial, onnxruntime.SessionOptions())
    with np.load(inputs) as file:
        feeds = {name: file[name] for name in file.files}
    with contextlib.suppress(OSError):  # where it is refused, the peak counts from the start, below that of any session
        _CLEAR.write_text(_RESET_PEAK)
    start = memory("VmRSS")
    moments = [now()]
    session = _loaded(path, threads, runtime=library is not None) if is_loaded else _plain(path, options)
    moments.append(now())
    if is_trimmed:
        release_free_memory()
    created = memory("RssAnon")
    moments.append(now())
    for _ in range(2):
        session.run(None, feeds)
        moments.append(now())
    del first
    return {
        "creation_seconds": moments[1] - moments[0],
        "first_run_seconds": moments[3] - moments[2],
        "second_run_seconds": moments[4] - moments[3],
        "run_bytes": _above(created, memory("RssAnon")),
        "resident_bytes": _above(start, memory("VmRSS")),
        "peak_bytes": _above(start, memory("VmHWM")),
    }


def main(words: Sequence[str]) -> None:
    """Measure what the command line names; on failure one line of JSON with the reason."""
    try:
        found = measure(**json.loads(words[0]))
    except Exception as error:
        found = {"error": str(error).strip().partition("\n")[0] or type(error).__name__}
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
