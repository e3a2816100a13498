"""What is measured of this machine is a number that a machine can have."""

from vl2.machine.rates import copy_bandwidth, matrix_rate
from vl2.planning.local import local_target


def test_memory_and_cores_are_measured_in_orders_that_exist() -> None:
    # a loaded core of a small board, and ten times a server of today
    assert 1e8 < copy_bandwidth(threads=1) < 1e13
    assert 1e8 < matrix_rate() < 1e14


def test_this_machine_is_a_target_that_a_plan_takes() -> None:
    target = local_target("local")
    assert target.memory == "host" and target.backends == ("cpu",) and 0 < target.usable_share <= 1
