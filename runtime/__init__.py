"""Runs a bundle without torch."""
