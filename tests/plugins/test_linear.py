"""`vl2::Linear` against NumPy in float64 over the dequantized weight."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidArgument, RuntimeException

from tests.plugins.operator_session import ISAS, Matrix, error_of, needs_library, node_session, random_matrix
from tests.tolerances import OPERATOR_EXACT, OPERATOR_ROUNDED

pytestmark = needs_library
FEWEST_TILED = 32

# Rows, columns, scheme, scales a row: inputs of Tiny, Small, Base, nano and the miniatures, few of their outputs.
SHAPES = {
    "tiny attention": (80, 1280, "int4", 40), "tiny dense down": (48, 6848, "int4", 107),
    "tiny lm_head": (200, 1280, "int8", 10),
    "small q": (64, 2048, "int4", 16), "small kv_a": (576, 256, "int4", 8), "base dense down": (32, 12288, "int4", 384),
    "tower down": (40, 4304, "int8", 1), "tower up": (33, 1152, "fp16", 1), "projector": (48, 4608, "bf16", 1),
    "nano": (96, 192, "int4", 6), "miniature": (10, 40, "int4", 5),
}  # fmt: skip
ODD = [(7, 40, "int4", 5), (33, 96, "int4", 3), (100, 256, "int4", 2), (17, 512, "int4", 1), (48, 128, "int8", 4),
       (37, 301, "int8", 1), (20, 72, "fp16", 1), (21, 301, "bf16", 1)]  # fmt: skip


def session_of(matrix: Matrix, mode: str = "exact", bias: np.ndarray | None = None, threads: int = 1):
    attributes = {"N": matrix.layout.rows, "K": matrix.layout.columns, "mode": mode} | matrix.form
    return node_session("Linear", {"x": True, "weight": matrix.packed, "bias": bias}, attributes, threads)


def run(session, x: np.ndarray) -> np.ndarray:
    return session.run(None, {"x": x})[0]


def rows_of(*shape: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product(x: np.ndarray, matrix: Matrix) -> np.ndarray:
    return x.astype(np.float64) @ matrix.numbers.astype(np.float64).T


@pytest.mark.parametrize("name", SHAPES)
def test_the_product_is_that_of_the_dequantized_weight(name):
    matrix = random_matrix(SHAPES[name][:2], *SHAPES[name][2:])
    session = session_of(matrix)
    for count in (1, 2, 29, 290):
        x = rows_of(count, matrix.layout.columns)
        assert error_of(run(session, x), product(x, matrix))[0] <= OPERATOR_EXACT, count


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_every_instruction_set_computes_the_same(isa, mode, monkeypatch):
    monkeypatch.setenv("VL2_CPU_ISA", isa)
    for case in ODD:
        matrix, bias = random_matrix(case[:2], *case[2:]), rows_of(case[0])
        session = session_of(matrix, mode, bias)
        for count in (1, 2, 3, 13, 100, 300):
            x = rows_of(count, case[1])
            largest, mean = error_of(run(session, x), product(x, matrix) + bias)
            assert largest <= OPERATOR_EXACT if mode == "exact" else mean <= OPERATOR_ROUNDED, (case, count)


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_rows_do_not_depend_on_how_many_there_are(mode):
    matrix, x = random_matrix((48, 64), "int4", 2), rows_of(4096, 64)
    session = session_of(matrix, mode)
    few, many = run(session, x[:FEWEST_TILED - 1]), run(session, x)
    largest, mean = error_of(few, many[:FEWEST_TILED - 1])
    assert largest <= OPERATOR_EXACT if mode == "exact" else mean <= OPERATOR_ROUNDED
    for count in (1, 2, 5, 11, 12, 13, 95, 96, 97, 257, 1537):
        whole = few if count < FEWEST_TILED else many
        assert error_of(run(session, x[:count]), whole[:count])[0] <= OPERATOR_EXACT, count


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("count", [1, 200, 300])
def test_the_number_of_threads_changes_no_bit(mode, count):
    matrix, x = random_matrix((700, 320), "int4", 10), rows_of(count, 320)
    alone = run(session_of(matrix, mode), x)
    for threads in (2, 4, 64):
        np.testing.assert_array_equal(run(session_of(matrix, mode, threads=threads), x), alone)


def test_leading_sides_stay_and_may_be_empty():
    session = session_of(random_matrix((24, 64), "int4", 2))
    assert run(session, rows_of(2, 3, 64)).shape == (2, 3, 24)
    assert run(session, rows_of(64)).shape == (24,)
    assert run(session, rows_of(0, 64)).shape == (0, 24) and run(session, rows_of(1, 0, 64)).shape == (1, 0, 24)


@pytest.mark.parametrize("scheme, groups", [("int4", 40), ("int8", 1), ("fp16", 1), ("bf16", 1)])
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("count", [1, 40])
def test_float32s_precision_is_kept_beside_an_outlier(isa, count, scheme, groups, monkeypatch):
    monkeypatch.setenv("VL2_CPU_ISA", isa)
    matrix, x = random_matrix((64, 1280), scheme, groups), rows_of(count, 1280)
    x[0, 100] = 1000
    numpy_error = error_of(x @ matrix.numbers.T, product(x, matrix))[0]
    assert error_of(run(session_of(matrix), x), product(x, matrix))[0] <= 4 * numpy_error


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_row_and_no_other(isa, mode, value, monkeypatch):
    monkeypatch.setenv("VL2_CPU_ISA", isa)
    for scheme in ("int4", "int8", "fp16", "bf16"):
        matrix = random_matrix((20, 72), scheme)
        session = session_of(matrix, mode)
        for count in (1, 7, 50):
            x = rows_of(count, 72)
            x[-1, 70] = value
            y = run(session, x)
            assert not np.isfinite(y[-1]).any() and np.isfinite(y[:-1]).all()


@pytest.mark.parametrize("changes, message", [
    ({"N": 0}, "a side of 0"), ({"K": 1 << 40}, "a side of"), ({"scheme": "int3"}, 'is "int3", expected int4'),
    ({"group_size": 12}, "`group_size` is 12"), ({"group_size": -8}, "`group_size` is -8"),
    ({"mode": "quick"}, '"quick"'),
    ({"scale_dtype": "float64"}, '"float64"'), ({"K": 2.5}, "`K` is missing or of another type"),
])  # fmt: skip
def test_attributes_that_make_no_matrix_are_refused_by_name(changes, message):
    attributes = {"N": 32, "K": 64, "scheme": "int4", "group_size": 32} | changes
    with pytest.raises((Fail, InvalidArgument, RuntimeException), match=message):
        node_session("Linear", {"x": True, "weight": np.zeros(64, np.uint8)}, attributes)


def test_wrong_shapes_are_refused_with_both_shapes():
    matrix = random_matrix((20, 64), "int4", 2)
    with pytest.raises(InvalidArgument, match=r"`x` has the shape \[2, 63\], expected \[..., 64\]"):
        run(session_of(matrix), rows_of(2, 63))
    with pytest.raises(InvalidArgument, match=r"`bias` has the shape \[19\], expected \[20\]"):
        run(session_of(matrix, bias=rows_of(19)), rows_of(2, 64))
    short = Matrix(matrix.layout, matrix.packed[:-1], matrix.numbers)
    with pytest.raises(InvalidArgument, match=f"`weight` has the shape .*, expected {matrix.layout.size_bytes} bytes"):
        run(session_of(short), rows_of(2, 64))


@settings(max_examples=60)
@given(st.integers(-2, 70), st.integers(-2, 70), st.sampled_from(["int4", "int8", "fp16", "bf16", ""]),
       st.sampled_from([0, 1, 8, 16, 32, 64, -32, 1 << 40]), st.integers(0, 5000),
       st.lists(st.integers(0, 70), max_size=3))
def test_no_attributes_and_shapes_crash(rows, columns, scheme, group_size, size, shape):
    attributes = {"N": rows, "K": columns, "scheme": scheme, "group_size": group_size}
    try:
        session = node_session("Linear", {"x": True, "weight": np.zeros(size, np.uint8)}, attributes)
        assert run(session, np.ones(shape, np.float32)).shape == (*shape[:-1], rows)
    except (Fail, InvalidArgument, RuntimeException) as error:
        assert "vl2::Linear" in str(error)
