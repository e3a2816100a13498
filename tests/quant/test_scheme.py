from __future__ import annotations

import pytest

from vl2.errors import VL2Error
from vl2.quant.scheme import SCHEMES, scheme_named


@pytest.mark.parametrize("scheme, inputs, group", [
    ("int4", 1280, 32), ("int4", 896, 32), ("int4-g128", 1280, 128),
    ("int4-g128", 6848, 64), ("int8", 6848, 64), ("int4-g128", 10944, 64), ("int4-g64", 10944, 64),
    ("int4", 208, 16), ("int8", 4304, 16), ("int8-channel", 4304, 4304), ("int8", 239, 239),
])  # fmt: skip
def test_a_group_that_does_not_divide_the_inputs_is_halved_until_it_does(scheme: str, inputs: int, group: int) -> None:
    assert scheme_named(scheme).group_for(inputs) == group


def test_int4_refuses_inputs_that_no_group_divides() -> None:
    with pytest.raises(VL2Error, match="239 inputs"):
        scheme_named("int4").group_for(239)


def test_an_unknown_scheme_is_refused_with_the_known_ones() -> None:
    with pytest.raises(VL2Error, match="`int5`.*int8, int8-channel, int4"):
        scheme_named("int5")


def test_code_ranges_are_those_of_twos_complement() -> None:
    assert SCHEMES["int4"].code_range == (-8, 7) and SCHEMES["int8"].code_range == (-128, 127)
