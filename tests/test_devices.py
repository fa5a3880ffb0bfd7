"""Devices and dtypes as users name them, refused before any work."""

import pytest
import torch

from tests import families
from tl_flash import decode_directions, find_neurons, flash_decode, load_model
from tl_flash.cli import main
from tl_flash.devices import device_of, dtype_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("devices")
    families.hf_model("llama").save_pretrained(folder)
    families.tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("device", ["gpu", "foo", "cuda:99", "meta", ""])
def test_unknown_devices_are_refused(folder, device):
    for refused in (
        lambda: device_of(device),
        lambda: load_model(folder, device=device),
        lambda: flash_decode(folder, device=device),
        lambda: find_neurons(folder, "dog", device=device),
        lambda: decode_directions(torch.randn(2, 40), folder, device=device),
    ):
        with pytest.raises(ValueError, match=r"device: expected one that this machine has \(cpu"):
            refused()


def test_the_command_line_says_which_devices_there_are(folder, tmp_path, capsys):
    assert main(["decode", str(folder), "-o", str(tmp_path / "map.safetensors"), "--device", "foo"]) == 1
    assert "device: expected one that this machine has (cpu" in capsys.readouterr().err
    assert not list(tmp_path.glob("map*"))


def test_a_device_that_is_no_name():
    with pytest.raises(TypeError, match="device: expected a name"):
        device_of(3.5)
    assert device_of(None) is None and device_of("cpu") == device_of(torch.device("cpu")) == torch.device("cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "torch.bfloat16", torch.bfloat16])
def test_dtypes_have_names(folder, dtype):
    assert load_model(folder, surface=None, dtype=dtype).W_U.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", ["int8", torch.int8, "half"])
def test_unknown_dtypes_are_refused_before_loading(dtype):
    with pytest.raises(ValueError, match="dtype: expected one of float32"):
        load_model("no/model", dtype=dtype)
    with pytest.raises(TypeError, match="dtype: expected"):
        dtype_of(16)
