"""Records: JSON files, each of one result, complete or absent, that know what they depend on."""

from __future__ import annotations

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.tavlp.configuration import config_hash
from mfcompile.files import write_atomically


def read_record(path: Path, expected_hash: str) -> dict[str, Any] | None:
    """The record of a file; None where there is none, it is damaged, or it is of another configuration."""
    if not path.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:  # a file that somebody cut or merged by hand: it is made again
        return None
    return record if record.get("config_hash") == expected_hash else None


def write_record(path: Path, config: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Write a result with its configuration, versions and command, complete or not at all."""
    document = {
        "config_hash": config_hash(config),
        "config": dict(config),
        **result,
        "versions": {
            "mfcompile": version("mfcompile"),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "command": shlex.join(["python", "-m", "benchmarks.tavlp", *sys.argv[1:]]),
    }
    write_atomically(path, (json.dumps(document, indent=1) + "\n").encode())
