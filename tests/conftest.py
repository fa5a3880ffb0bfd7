"""Models that any test may ask for; none of them comes from the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # huggingface_hub reads it when imported
os.environ["PIP_NO_INDEX"] = os.environ["UV_OFFLINE"] = "1"  # a multimodal bridge would install torchvision
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # a worker a core: threads of one wait for those of another

from pathlib import Path  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # triton reads it when imported

from benchmarks import real_models  # noqa: E402
from tests import families  # noqa: E402
from tl_flash import load_model  # noqa: E402

torch.set_num_threads(1)  # the models are tiny: threads only wait for one another, most of all on a busy machine

NO_HOOKED_TRANSFORMER = "TransformerLens 4 has no HookedTransformer"
NO_BRIDGE = "TransformerLens 2 has no TransformerBridge"


@pytest.fixture(scope="session")
def stories_path():
    """The folder of a trained Llama, which is no part of this repository."""
    path = Path(__file__).parents[2] / "shared" / "models" / "stories260k"
    if not path.is_dir():
        pytest.skip(f"no trained model at {path}")
    return path


@pytest.fixture(scope="session")
def stories_bridge(stories_path):
    if not families.HAS_BRIDGE:
        pytest.skip(NO_BRIDGE)
    return _stories(stories_path, "bridge")


@pytest.fixture(scope="session")
def stories_hooked(stories_path):
    if not families.HAS_HOOKED_TRANSFORMER:
        pytest.skip(NO_HOOKED_TRANSFORMER)
    return _stories(stories_path, "hooked")


@pytest.fixture(scope="session", params=real_models.MODELS, ids=lambda model: model.name)
def real_model(request):
    """Each of the pretrained models that `make models` fetches."""
    return _fetched(request.param)


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M-Instruct, one of them."""
    return _fetched(real_models.SMOLLM2)


def _fetched(model):
    if not model.ready():
        pytest.skip(f"{model.name} is not in .models; `make models` fetches it")
    return model


def _stories(path, surface):
    model = load_model(path, surface=surface)
    assert (model.cfg.n_layers, model.cfg.d_mlp, model.cfg.d_model, model.cfg.d_vocab) == (5, 172, 64, 512)
    return model


@pytest.fixture(scope="session")
def tokenizer():
    """72 byte-level BPE tokens, " dog" and " cat" among them; the d_vocab of the tiny models is 97."""
    return families.tokenizer()


@pytest.fixture(scope="session")
def bridge():
    """A tiny random Llama as TransformerBridge, on TransformerLens 2 as it is there: 2 layers, d_mlp 52, d_model 40."""
    return families.build("llama", "bridge" if families.HAS_BRIDGE else "hooked-raw")


@pytest.fixture(scope="session")
def hooked():
    """The same Llama as HookedTransformer, folded."""
    if not families.HAS_HOOKED_TRANSFORMER:
        pytest.skip(NO_HOOKED_TRANSFORMER)
    return families.build("llama", "hooked")
