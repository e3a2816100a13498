"""Attention of the vision tower as one operator."""
