import numpy as np
import pytest

from tl_flash.names import ExpertNeuron, Neuron, neuron_of, parse, shown_model


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


def test_neurons_of_experts_have_names():
    assert parse("L3E5N17") == neuron_of((3, 5, 17)) == neuron_of("L3E5N17") == ExpertNeuron(3, 5, 17)
    assert str(parse("L3E5N17")) == "L3E5N17" and parse("L3N17") == neuron_of((3, 17)) == Neuron(3, 17)


@pytest.mark.parametrize("name", ["L3E5", "E5N17", "L3E-1N2", "L3EN17", "L3N17E5"])
def test_broken_names_of_experts_are_refused(name):
    with pytest.raises(ValueError, match="L3E5N17"):
        parse(name)


@pytest.mark.parametrize("neuron", ["L3E5N17", (3, 5, 17), ExpertNeuron(3, 5, 17)])
def test_where_a_dense_neuron_is_needed_an_experts_is_refused(neuron):
    with pytest.raises(ValueError, match="L3E5N17: is one of a mixture of experts"):
        Neuron.of(neuron)


@pytest.mark.parametrize("name", [5, None, b"L3N17"])
def test_what_is_no_string_is_no_name(name):
    with pytest.raises(TypeError, match="expected a name such as"):
        Neuron.parse(name)


@pytest.mark.parametrize("name", ["L1N" + "9" * 5000, "L1234567890N3", "L\u0663N1"])
def test_names_of_numbers_that_no_model_has(name):
    with pytest.raises(ValueError, match='expected a name such as "L3N17"') as refusal:
        Neuron.parse(name)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("name", ["", "/", "gpt2", "meta-llama/Llama-3.1-8B", "a\0b", "long" * 5000])
def test_a_models_name_is_shown_as_it_is(name):
    assert shown_model(name) == name


def test_of_a_model_on_a_disk_the_folder_alone_is_shown(tmp_path, monkeypatch):
    assert shown_model("/somewhere/else/gpt2") == "gpt2"
    (tmp_path / "models" / "gpt2").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert shown_model("models/gpt2") == "gpt2"
