"""Checks between config groups, made before any worker starts."""
