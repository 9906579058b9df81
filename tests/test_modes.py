"""A network in eval mode for a while."""

import pytest
from torch import nn

from imcl_fast.modes import evaluating


def modes(network):
    return [module.training for module in network.modules()]


@pytest.mark.parametrize("frozen", [(), ("0",), ("1.0",), ("1",), ("", "1.0"), ("", "0", "1")])
def test_every_module_gets_its_own_mode_back(frozen):
    network = nn.Sequential(nn.BatchNorm2d(2), nn.Sequential(nn.BatchNorm2d(2), nn.Dropout()))
    for path in frozen:
        module = network.get_submodule(path)
        module.training = False
    before = modes(network)
    with evaluating(network):
        assert not any(modes(network))
    assert modes(network) == before
    with pytest.raises(OSError, match="out of paper"), evaluating(network):
        raise OSError("out of paper")
    assert modes(network) == before


def test_what_a_network_does_on_a_change_of_mode_is_undone():
    class Merging(nn.Linear):
        """As low-rank adapters do, which are merged into the weight in eval mode."""

        merged = False

        def train(self, mode=True):
            self.merged = not mode
            return super().train(mode)

    network = nn.Sequential(Merging(2, 2), nn.Dropout())
    network[1].eval()
    with evaluating(network):
        assert network[0].merged
    assert not network[0].merged
    assert modes(network) == [True, True, False]
