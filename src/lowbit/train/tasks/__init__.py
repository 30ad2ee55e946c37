"""Tasks, by name: the loss, the metrics and the evaluation of one kind of problem."""

from __future__ import annotations

from lowbit.train.registry import Registry
from lowbit.train.tasks.base import Task

__all__ = ["TASKS", "Task"]

#: ``name -> Task subclass``. One file, one line for each.
TASKS: Registry[type[Task]] = Registry(
    "task", {"classify": "lowbit.train.tasks.classify", "superres": "lowbit.train.tasks.superres"}
)
