"""The ``mfcompile`` command."""

from mfcompile.cli.app import main

__all__ = ["main"]
