"""Processes that torchrun starts share one decode, and give the bytes that one process gives."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import gguf
import pytest
import torch
import torch.distributed as dist

from tests import quantised_files
from tests.test_gguf import written
from tests.test_resume import made, undisturbed  # noqa: F401 - fixtures
from tl_flash import NeuronMap, decode_to_file
from tl_flash.decode import distributed
from tl_flash.decode.distributed import Ranks, ranks

# The command line of tl_flash, but process 1 is killed once, when it has decoded its second part.
KILLED = """
import os, signal, sys
from tl_flash.cli import main
from tl_flash.decode.parts import Parts
keep, again = Parts.keep, os.environ["TORCHELASTIC_RESTART_COUNT"]
def kept(self, part):
    with open(f"decoded-{os.environ['RANK']}-{again}", "a") as file:
        file.write(f"{part.unit.layer} ")
    if os.environ["RANK"] == "1" and again == "0" and len(open("decoded-1-0").read().split()) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    keep(self, part)
Parts.keep = kept
sys.exit(main())
"""


@pytest.fixture
def folder(made):  # noqa: F811
    return made


def torchrun(*argv, folder, **environment):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *map(str, argv)]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=240, env=os.environ | environment
    )


@pytest.mark.parametrize("own_store", ["0", "1"], ids=["torchrun's store", "the first process's store"])
def test_two_processes_give_the_bytes_of_one(own_store, folder, tmp_path, undisturbed):  # noqa: F811
    decode = ["-m", "tl_flash", "decode", folder, "-o", "map", "-k", 3]
    run = torchrun("--nproc-per-node", 2, *decode, folder=tmp_path, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=own_store)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("wrote map") == 1
    assert (tmp_path / "map").read_bytes() == undisturbed
    assert sorted(os.listdir(tmp_path)) == ["map", "undisturbed.safetensors"]


def test_three_processes_of_which_one_is_killed_give_the_same_bytes(folder, tmp_path, undisturbed):  # noqa: F811
    (tmp_path / "run.py").write_text(KILLED)
    options = ["--nproc-per-node", 3, "--max-restarts", 1]
    run = torchrun(*options, "run.py", "decode", folder, "-o", "map", "-k", 3, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "map").read_bytes() == undisturbed
    decoded = {path.name: path.read_text().split() for path in tmp_path.glob("decoded-*")}
    assert decoded["decoded-1-0"] == ["1", "4"], "killed before it could keep the second"
    again = [layer for name, layers in decoded.items() if name.endswith("-1") for layer in layers]
    assert "4" in again and "1" not in again, "what was finished is not decoded again"


@pytest.mark.parametrize("form", ["GGUF Q8_0", "GPTQ int4"])
def test_two_processes_share_a_packed_checkpoint(form, tmp_path):
    if form == "GPTQ int4":
        pack, scheme = quantised_files.gptq(4), dict(quant_method="gptq", bits=4, group_size=quantised_files.GROUP)
        checkpoint, _ = quantised_files.write(tmp_path, quantised_files.model("llama"), pack, scheme)
    else:
        _, checkpoint = written(tmp_path, kind=gguf.GGMLQuantizationType.Q8_0)
    run = torchrun("--nproc-per-node", 2, "-m", "tl_flash", "decode", checkpoint, "-o", "map", "-k", 3, folder=tmp_path)
    assert run.returncode == 0, run.stderr
    decode_to_file(checkpoint, tmp_path / "alone.safetensors", k=3)
    assert (tmp_path / "map").read_bytes() == (tmp_path / "alone.safetensors").read_bytes()
    assert NeuronMap.load(tmp_path / "map").source.stored == form


def test_they_meet_in_a_store_and_the_last_to_come_is_waited_for():
    store, came = dist.HashStore(), []

    def process(rank):
        group = Ranks(rank, 3, None, store)
        agreed = group.agree([rank, "first"])
        time.sleep(0.2 * rank)
        came.append(rank)
        group.wait()
        after = list(came)
        group.part()
        return agreed, after

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(process, range(3))) == [([0, "first"], [0, 1, 2])] * 3


def test_ctrl_c_ends_the_waiting_for_the_others():
    waiting = """
import threading, _thread
from torch.distributed import HashStore
from tl_flash.decode.distributed import Ranks
threading.Timer(0.5, _thread.interrupt_main).start()
try:
    Ranks(0, 2, None, HashStore()).wait()
except KeyboardInterrupt:
    print("stopped")
"""
    run = subprocess.run([sys.executable, "-c", waiting], capture_output=True, text=True, timeout=120)
    assert run.stdout == "stopped\n", run.stderr


def test_each_item_is_shared_out_once():
    shares = [Ranks(rank, 3, None).share(range(8)) for rank in range(3)]
    assert sorted(item for share in shares for item in share) == list(range(8))
    assert max(map(len, shares)) - min(map(len, shares)) == 1


def test_alone_there_is_one_rank():
    with ranks() as group:
        assert group == Ranks(0, 1, None) and group.first
        assert group.agree("x") == "x"
        group.wait()
    with ranks("cpu") as group:
        assert group.device == torch.device("cpu")


def test_more_processes_than_devices_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed.dist, "is_torchelastic_launched", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="process 2 of this machine found 2 CUDA devices"), ranks("cuda"):
        pass
