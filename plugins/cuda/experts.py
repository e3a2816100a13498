"""The launch plan of a MoE layer's feed-forward part: routing, routed and shared experts, their sum."""

from __future__ import annotations

from dataclasses import dataclass, replace

from vl2.plugins.cuda.launch import Launch, Plan, require, tiles
from vl2.plugins.cuda.linear import ROWS, THREADS, staged_bytes
from vl2.plugins.cuda.routing import RoutingProblem, route_launch
from vl2.plugins.cuda.storage import Storage

_PAIRS, _COMBINED = 16, 256


@dataclass(frozen=True)
class ExpertsProblem:
    """N tokens through E experts of `inner_size` and, where shared_size > 0, the shared experts, fused into one.

    Buffers: x float16 [N, H], logits and correction_bias as RoutingProblem has them; gate, up [E, I, H], down
    [E, H, I], shared_gate, shared_up [S, H], shared_down [H, S] with scales as `Storage` says; y float16 [N, H].
    """

    routing: RoutingProblem
    hidden_size: int
    inner_size: int
    shared_size: int = 0
    gate_up: Storage = Storage()
    down: Storage = Storage()
    shared_gate_up: Storage = Storage()
    shared_down: Storage = Storage()

    def __post_init__(self) -> None:
        self.gate_up.shift(self.hidden_size)
        self.down.shift(self.inner_size)
        require(self.routing.tokens > 0, f"{self.routing.tokens} tokens", "one or more")
        if self.shared_size:
            self.shared_gate_up.shift(self.hidden_size)
            self.shared_down.shift(self.shared_size)

    @property
    def shared_parts(self) -> int:
        """Slots that the shared experts' second product is cut into, each about as long as a routed expert's."""
        if not self.shared_size:
            return 0
        parts = max(1, self.shared_size // self.inner_size)
        return parts if self.shared_size % (parts * 32) == 0 else 1

    @property
    def routed_columns(self) -> int:
        """Of a token's hidden row [k · I + S]: those before the shared experts'."""
        return self.routing.top_k * self.inner_size


def experts_plan(problem: ExpertsProblem) -> Plan:
    """Every kernel of the layer; each chosen expert is read once a token."""
    return _decode_plan(problem)


def _decode_plan(problem: ExpertsProblem) -> Plan:
    routing = problem.routing
    tokens, slots = routing.tokens, routing.top_k + problem.shared_parts
    launches = (route_launch(routing), *_gate_up(problem), *_down(problem), _combine(problem, "float"))
    workspace = {
        "idx": tokens * routing.top_k * 4,
        "weights": tokens * routing.top_k * 4,
        "hidden": tokens * (problem.routed_columns + problem.shared_size) * 4,
        "partial": tokens * slots * problem.hidden_size * 4,
    }
    return Plan(launches, workspace)


def _parts(routed: Storage, shared: Storage, problem: ExpertsProblem) -> tuple[tuple[Storage, bool, bool], ...]:
    """Which of routed and shared experts one launch does: both where they are stored alike."""
    if not problem.shared_size:
        return ((routed, True, False),)
    if routed.scheme == shared.scheme:
        return ((routed, True, True),)
    return ((routed, True, False), (shared, False, True))


def _names(storage: Storage, weight: str, present: bool) -> tuple[str | None, str | None]:
    return storage.names(weight) if present else (None, None)


def _gate_up(problem: ExpertsProblem) -> tuple[Launch, ...]:
    columns, top_k, launches = problem.hidden_size, problem.routing.top_k, []
    shifts = (problem.gate_up.shift(columns), problem.shared_gate_up.shift(columns) if problem.shared_size else 0)
    blocks = (top_k * tiles(problem.inner_size, _PAIRS), tiles(problem.shared_size, _PAIRS))
    for storage, routed, shared in _parts(problem.gate_up, problem.shared_gate_up, problem):
        pointers = [_names(problem.gate_up, name, routed) for name in ("gate", "up")]
        pointers += [_names(problem.shared_gate_up, name, shared) for name in ("shared_gate", "shared_up")]
        arguments = (*sum(pointers, ()), "x", "idx", "hidden", columns, problem.inner_size, problem.shared_size, top_k,
                     *shifts, 0 if routed else blocks[0])  # fmt: skip
        grid = (blocks[0] * routed + blocks[1] * shared, problem.routing.tokens, 1)
        kernel = f"vl2_gate_up_{storage.scheme}"
        launches.append(Launch(kernel, grid, (THREADS, 1, 1), staged_bytes(columns), arguments))
    return tuple(launches)


def _down(problem: ExpertsProblem) -> tuple[Launch, ...]:
    rows, inner, shared_size = problem.hidden_size, problem.inner_size, problem.shared_size
    top_k, parts, launches = problem.routing.top_k, problem.shared_parts, []
    shifts = (problem.down.shift(inner), problem.shared_down.shift(shared_size) if shared_size else 0)
    staged = staged_bytes(max(inner, shared_size // max(parts, 1)))
    for storage, routed, shared in _parts(problem.down, problem.shared_down, problem):
        pointers = (*_names(problem.down, "down", routed), *_names(problem.shared_down, "shared_down", shared))
        arguments = (*pointers, "hidden", "idx", "partial", rows, inner, shared_size, top_k, parts, *shifts,
                     0 if routed else top_k)  # fmt: skip
        grid = (tiles(rows, ROWS), top_k * routed + parts * shared, problem.routing.tokens)
        launches.append(Launch(f"vl2_down_{storage.scheme}", grid, (THREADS, 1, 1), staged, arguments))
    return tuple(launches)


def _combine(problem: ExpertsProblem, form: str) -> Launch:
    columns = problem.hidden_size
    arguments = ("partial", "weights", "y", columns, problem.routing.top_k, problem.shared_parts)
    grid = (tiles(columns, _COMBINED), problem.routing.tokens, 1)
    return Launch(f"vl2_combine_{form}", grid, (_COMBINED, 1, 1), 0, arguments)


def with_tokens(problem: ExpertsProblem, tokens: int) -> ExpertsProblem:
    """The same layer for another number of tokens."""
    return replace(problem, routing=replace(problem.routing, tokens=tokens))
