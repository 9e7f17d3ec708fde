"""Passes: analyses that read a captured graph, and transforms that rewrite it."""
