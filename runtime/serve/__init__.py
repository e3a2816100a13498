"""`vl2 serve`: one opened bundle behind an OpenAI-compatible HTTP interface, with a page of its own.

Needs the extra `[serve]`. The model stays in one worker thread; the event loop never computes.
"""
