"""The downstream tasks, none of which calibration knows."""

from __future__ import annotations

from benchmarks.tavlp.tasks.captioning import CAPTIONING
from benchmarks.tavlp.tasks.contract import Task
from benchmarks.tavlp.tasks.retrieval import RETRIEVAL
from benchmarks.tavlp.tasks.vqa import VQA

TASKS: dict[str, Task] = {task.name: task for task in (RETRIEVAL, CAPTIONING, VQA)}
