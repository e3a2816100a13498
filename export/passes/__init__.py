"""Rewrites of a traced graph, one a file."""
