"""Exporters: a CapturedGraph and its masks become files, each verified against the runtime that loads it."""
