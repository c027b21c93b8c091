import pytest
from fill_first import FillFirst

from multiverse_gateway.testing.balancer import BalancerContract, FixedLoad, make_request, make_servers


class TestFillFirst(BalancerContract):
    @pytest.fixture
    def balancer(self) -> FillFirst:
        return FillFirst()


def test_the_second_gets_work_when_the_first_is_full() -> None:
    first, second = make_servers(2)
    assert FillFirst().pick([first, second], FixedLoad({first.id: 3}), make_request()) is first
    assert FillFirst().pick([first, second], FixedLoad({first.id: 4}), make_request()) is second
