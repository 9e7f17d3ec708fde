"""Criteria: how much each weight matters. One file per criterion of the field, found by name or entry point."""
