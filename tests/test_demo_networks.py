import threading

import pytest
from torch import nn

from timm_tresnet.demo.networks import Networks


def wait_for(networks, name):
    """Poll for a network as the page does, and return it."""
    for _ in range(6000):
        network = networks.get(name)
        if network is not None:
            return network
        threading.Event().wait(0.01)
    raise AssertionError(f"{name} never came")


def test_network_that_does_not_arrive_keeps_no_other_from_arriving():
    trickling = threading.Event()
    loads = []

    def load(name):
        loads.append(name)
        if name == "slow":
            trickling.wait()
        return nn.Identity()

    networks = Networks(load)
    try:
        assert all(networks.get("slow") is None for _ in range(50))
        assert isinstance(wait_for(networks, "fast"), nn.Identity)
        assert loads.count("slow") == 1
        assert networks.get("fast") is networks.get("fast")
    finally:
        trickling.set()
    assert isinstance(wait_for(networks, "slow"), nn.Identity)


def test_network_that_takes_too_long_is_reported():
    trickling = threading.Event()
    networks = Networks(lambda name: trickling.wait() and nn.Identity(), patience_s=-1)
    with pytest.raises(ValueError, match="the weights slow have not arrived within"):
        networks.get("slow")
    trickling.set()
    assert wait_for_late(networks) is not None


def wait_for_late(networks):
    for _ in range(6000):
        try:
            return networks.get("slow")
        except ValueError:
            threading.Event().wait(0.01)
    return None


def test_failure_is_said_once_and_then_tried_again():
    fails = [True, False]

    def load(name):
        if fails.pop(0):
            raise ValueError("no network")
        return nn.Identity()

    networks = Networks(load)
    with pytest.raises(ValueError, match="no network"):
        wait_for(networks, "a")
    assert isinstance(wait_for(networks, "a"), nn.Identity)


def test_last_used_networks_stay_in_memory():
    loads = []
    networks = Networks(lambda name: loads.append(name) or nn.Identity())
    for name in "abcadae":
        wait_for(networks, name)
    assert loads == list("abcde")
    wait_for(networks, "b")
    assert loads == list("abcdeb")
