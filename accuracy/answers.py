"""How the candidate's answers differ from the reference's, whatever is right: agreement, length, loops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vl2.accuracy.comparison import Comparison
from vl2.accuracy.edit_distance import similarity
from vl2.accuracy.text_metrics import normalised
from vl2.accuracy.walk import Reply
from vl2.runtime.answer import LENGTH

_REPEATS = 8


def ends_in_a_loop(ids: Sequence[int]) -> bool:
    """Whether the ids end in an n-gram, of any length, that is repeated at least 8 times."""
    ids = tuple(ids)
    return any(ids[-size * _REPEATS:] == ids[-size:] * _REPEATS for size in range(1, len(ids) // _REPEATS + 1))


def loops(reply: Reply) -> bool:
    """Whether an answer hit the token limit or ends in a loop."""
    return reply.stop_reason == LENGTH or ends_in_a_loop(reply.token_ids)


def answer_figures(comparison: Comparison) -> dict[str, Any]:
    """Shares in per cent of all questions; lengths in tokens."""
    pairs = comparison.replies
    lengths = [sum(len(pair[side].token_ids) for pair in pairs) for side in (0, 1)]
    looping = [100 * float(np.mean([loops(pair[side]) for pair in pairs])) for side in (0, 1)]
    limited = [sum(pair[side].stop_reason == LENGTH for pair in pairs) for side in (0, 1)]
    return {
        "questions": len(pairs),
        "equal_percent": 100 * float(np.mean([a.token_ids == b.token_ids for a, b in pairs])),
        "equal_normalised_percent": 100 * float(np.mean([normalised(a.text) == normalised(b.text) for a, b in pairs])),
        "similarity_percent": 100 * float(np.mean([similarity(a.text, b.text) for a, b in pairs])),
        "reference_loop_percent": looping[0], "candidate_loop_percent": looping[1],
        "reference_at_token_limit": limited[0], "candidate_at_token_limit": limited[1],
        "reference_tokens": lengths[0], "candidate_tokens": lengths[1],
        "length_ratio": lengths[1] / lengths[0] if lengths[0] else None,
    }
