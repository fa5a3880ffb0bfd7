import numpy as np
import pytest

from tl_flash.neurons import Neuron, by_layer


def test_a_name_is_read_back():
    for neuron in (Neuron(0, 0), Neuron(31, 14335)):
        assert Neuron.parse(str(neuron)) == neuron
        assert Neuron.of(str(neuron)) == Neuron.of(tuple(neuron)) == Neuron.of(neuron) == neuron


def test_numpy_integers_are_integers():
    neuron = Neuron.of((np.int64(3), np.int32(17)))
    assert neuron == (3, 17)
    assert all(type(part) is int for part in neuron)


@pytest.mark.parametrize("name", ["", "L3", "N17", "L3N17x", "L-1N2", "L 3N17", "l3n17"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match="L3N17"):
        Neuron.parse(name)


@pytest.mark.parametrize("neuron", [3, None, (3,), (3, 17, 1, 2), (3, 1.5), (True, 2), [3, 17]])
def test_other_things_are_refused(neuron):
    with pytest.raises(TypeError, match="neuron"):
        Neuron.of(neuron)


def test_negative_numbers_are_refused():
    with pytest.raises(ValueError, match="count from 0"):
        Neuron.of((0, -1))


def test_groups_keep_order():
    assert by_layer(["L1N2", (0, 5), Neuron(1, 0)]) == {1: [(1, 2), (1, 0)], 0: [(0, 5)]}
