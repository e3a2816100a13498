"""The launch plan of a MoE layer's feed-forward part: routing, routed and shared experts, their sum."""

from __future__ import annotations

from dataclasses import dataclass

from vl2.plugins.cuda.launch import Launch, Plan, require, tiles
from vl2.plugins.cuda.linear import (
    GEMV_TOKENS,
    ROWS,
    THREADS,
    LinearProblem,
    Rows,
    product_bytes,
    product_grid,
    product_launch,
    staged_bytes,
)
from vl2.plugins.cuda.routing import RoutingProblem, route_launch, sort_launch
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
    """Every kernel of the layer. Up to GEMV_TOKENS tokens read a chosen expert once each, more once in all."""
    return _decode_plan(problem) if problem.routing.tokens <= GEMV_TOKENS else prefill_plan(problem)


def _decode_plan(problem: ExpertsProblem) -> Plan:
    routing = problem.routing
    tokens, slots = routing.tokens, routing.top_k + problem.shared_parts
    combine = _combine(problem, "float", problem.shared_parts)
    launches = (route_launch(routing), *_gate_up(problem), *_down(problem), combine)
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


def prefill_plan(problem: ExpertsProblem) -> Plan:
    """The layer for many tokens: products on tensor cores over the tokens sorted by expert."""
    routing, hidden, shared = problem.routing, problem.hidden_size, problem.shared_size
    choices, slots = routing.tokens * routing.top_k, routing.top_k + (shared > 0)
    routed = Rows("down", "hidden", "partial", routing.experts, None, "target", "offsets")
    launches = [route_launch(routing), sort_launch(routing, slots), _gated(problem),
                product_launch(LinearProblem(choices, hidden, problem.inner_size, problem.down), routed)]  # fmt: skip
    if shared:
        rows = Rows("shared_down", "shared_hidden", "partial", stride=slots, offset=routing.top_k)
        down = LinearProblem(routing.tokens, hidden, shared, problem.shared_down)
        launches += [_gated(problem, shared=True), product_launch(down, rows)]
    workspace = {
        "idx": choices * 4, "weights": choices * 4, "source": choices * 4, "target": choices * 4,
        "offsets": (routing.experts + 1) * 4, "hidden": choices * problem.inner_size * 2,
        "shared_hidden": routing.tokens * shared * 2, "partial": routing.tokens * slots * hidden * 2,
    }  # fmt: skip
    launches.append(_combine(problem, "half", slots - routing.top_k))
    return Plan(tuple(launches), {name: size for name, size in workspace.items() if size})


def _gated(problem: ExpertsProblem, shared: bool = False) -> Launch:
    """silu(gate x) ⊙ (up x) of the routed experts in the order of experts, or of the shared ones."""
    columns, tokens, top_k = problem.hidden_size, problem.routing.tokens, problem.routing.top_k
    storage = problem.shared_gate_up if shared else problem.gate_up
    size = LinearProblem(tokens if shared else tokens * top_k, problem.shared_size if shared else problem.inner_size,
                         columns, storage)  # fmt: skip
    prefix, order = ("shared_", (None, None)) if shared else ("", ("source", "offsets"))
    arguments = (*storage.names(f"{prefix}gate"), *storage.names(f"{prefix}up"), "x", *order, f"{prefix}hidden",
                 size.tokens, size.rows, columns, storage.shift(columns))  # fmt: skip
    grid = product_grid(size, 1 if shared else problem.routing.experts)
    kernel = f"vl2_gated_product_{storage.scheme}"
    return Launch(kernel, grid, (THREADS, 1, 1), product_bytes(storage, 2), arguments)


def _combine(problem: ExpertsProblem, form: str, parts: int) -> Launch:
    columns = problem.hidden_size
    arguments = ("partial", "weights", "y", columns, problem.routing.top_k, parts)
    grid = (tiles(columns, _COMBINED), problem.routing.tokens, 1)
    return Launch(f"vl2_combine_{form}", grid, (_COMBINED, 1, 1), 0, arguments)
