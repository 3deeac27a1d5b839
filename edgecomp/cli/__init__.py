"""The command line: it parses, calls `edgecomp.api`, and prints. Nothing heavy is imported before a verb runs."""

from edgecomp.cli.app import main

__all__ = ["main"]
