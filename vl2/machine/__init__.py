"""This machine: its memory and processors measured, its GPU asked, and what of vl2 works on it."""
