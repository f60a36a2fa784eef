"""Exact rewrites that make a graph smaller."""
