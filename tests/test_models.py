"""Every family on every surface, against a float64 truth that the forward pass confirms."""

import copy
from contextlib import contextmanager

import pytest
import torch
from transformers.activations import ACT2FN

from tests import families
from tests.families import D_MLP, D_MODEL, D_VOCAB, DENSE, FAMILIES, N_LAYERS, N_TOKENS, build, sides
from tl_flash import flash_decode
from tl_flash.weights import fingerprint
from tl_flash.weights import read as read_weights

SURFACES = families.surfaces()
RAW = [surface for surface in SURFACES if surface in ("hf", "bridge", "hooked-raw")]
FOLDED = [surface for surface in SURFACES if surface not in RAW]
GATED = [name for name in DENSE if "gate" in sides(name)]
PADDING = range(N_TOKENS, D_VOCAB)
LAYERS = range(N_LAYERS)
K = 5


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """On matrices this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def over(names=DENSE, surfaces=SURFACES):
    """Parametrise over families and surfaces, with ids such as gemma2-bridge."""
    rows = [(name, surface) for name in names for surface in surfaces]
    return pytest.mark.parametrize("name, surface", [pytest.param(*row, id="-".join(row)) for row in rows])


def over_sides(surfaces=SURFACES):
    """And over the sides that each family has, with ids such as gemma2-bridge-in."""
    rows = [(name, surface, side) for name in DENSE for surface in surfaces for side in sides(name)]
    return pytest.mark.parametrize("name, surface, side", [pytest.param(*row, id="-".join(row)) for row in rows])


def assert_close(given, truth, tolerance):
    """Compare with float64 truth; the tolerance is relative to the largest true value."""
    assert given.shape == truth.shape
    difference = float((given.double() - truth).abs().max() / truth.abs().max())
    assert difference <= tolerance, f"differs by {difference:.1e} of the largest value"


# The truth against the model's own forward pass. Norms add eps to the mean square, which the truth leaves out.

EPS = 2e-4


@torch.no_grad()
def forward(name, without=None):
    """Run the float64 model on random tokens: what each module was given first and what it answered, by path.

    `without` names a module whose answer is replaced by zeros.
    """
    model, seen, handles = families.double(name), {}, []
    for path, module in model.named_modules():

        def hook(module, args, output, path=path):
            output = torch.zeros_like(output) if path == without else output
            seen[path] = (args[0] if args else None, output)
            return output

        handles.append(module.register_forward_hook(hook))
    ids = torch.randint(N_TOKENS, (2, 12), generator=torch.Generator().manual_seed(1))
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen


def answer_to_zero(name, layer, *paths):
    """What a chain of modules makes of zeros: the constant that biases add."""
    width = D_MLP if paths == (FAMILIES[name].down,) else D_MODEL
    x = torch.zeros(width, dtype=torch.float64)
    for path in filter(None, paths):
        x = families.part(name, path, layer)(x)
    return x


def read(name, seen, layer, side):
    """What up or gate answered in a forward pass."""
    family = FAMILIES[name]
    path = family.up if side == "in" else family.gate
    answer = seen[f"{family.layers}.{layer}.{path}"][1]
    return answer.chunk(2, -1)[side == "in"] if family.up == family.gate else answer


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", DENSE)
def test_true_directions_read_what_the_mlp_reads(name, layer):
    family, seen = FAMILIES[name], forward(name)
    stream = seen[f"{family.layers}.{layer}.{family.pre_norm or family.up}"][0]
    if family.pre_norm:
        stream = families.unit(stream, family.layer_norm)
    for side in sides(name)[:-1]:
        path = family.up if side == "in" else family.gate
        constant = answer_to_zero(name, layer, family.pre_norm, path)
        if family.up == family.gate:
            constant = constant.chunk(2)[side == "in"]
        predicted = stream @ families.direction(name, layer, side).T + constant
        assert_close(predicted, read(name, seen, layer, side), EPS)


@torch.no_grad()
@pytest.mark.parametrize("name", DENSE)
def test_the_gate_is_the_side_that_the_activation_passes(name):
    family, seen, act = FAMILIES[name], forward(name), ACT2FN[FAMILIES[name].act_fn]
    for layer in LAYERS:
        up = read(name, seen, layer, "in")
        post = act(read(name, seen, layer, "gate")) * up if family.gate else act(up)
        assert_close(seen[f"{family.layers}.{layer}.{family.down}"][0], post, 1e-6)


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", DENSE)
def test_true_directions_write_what_the_mlp_writes(name, layer):
    family, seen = FAMILIES[name], forward(name)
    down = f"{family.layers}.{layer}.{family.down}"
    after = family.final_norm if layer + 1 == N_LAYERS else f"{family.layers}.{layer + 1}"
    written = seen[after][0] - forward(name, without=down)[after][0]
    post, answer = seen[down]
    predicted = post @ families.direction(name, layer, "out")
    constant = answer_to_zero(name, layer, family.down)
    if family.post_norm:
        predicted = predicted / answer.square().mean(-1, keepdim=True).sqrt()
        assert not constant.any()
    if family.layer_norm:  # nothing downstream sees the mean
        written, constant = written - written.mean(-1, keepdim=True), constant - constant.mean()
    assert_close(predicted + constant, written, EPS)


@torch.no_grad()
@pytest.mark.parametrize("name", DENSE)
def test_true_unembedding_gives_the_logits(name):
    family, seen = FAMILIES[name], forward(name)
    stream, _ = seen[family.final_norm]
    constant = families.double(name).get_output_embeddings()(
        families.part(name, family.final_norm)(torch.zeros_like(stream))
    )
    predicted = families.unit(stream, family.layer_norm) @ families.unembedding(name) + constant
    logits = families.double(name).get_output_embeddings()(families.part(name, family.final_norm)(stream))
    assert_close(predicted, logits, EPS)


@torch.no_grad()
@over([*FAMILIES])
def test_every_surface_computes_the_same_function(name, surface):
    ids = torch.randint(N_TOKENS, (2, 24), generator=torch.Generator().manual_seed(1))
    logits = build(name, surface)(ids)
    logits = getattr(logits, "logits", logits)
    truth = build(name, "hf")(ids).logits
    assert_close(logits.log_softmax(-1), truth.log_softmax(-1).double(), 1e-5)


# What the package reads, against the truth


def without_mean(W_U):
    """Less its mean over the vocabulary, which center_unembed may have removed."""
    return W_U - W_U.mean(-1, keepdim=True)


@over()
def test_shapes_and_sides(name, surface):
    weights = read_weights(build(name, surface))
    assert (weights.n_layers, weights.d_mlp, weights.d_model) == (N_LAYERS, D_MLP, D_MODEL)
    assert weights.d_vocab == D_VOCAB and list(weights.sides) == sides(name)
    assert weights.centre == FAMILIES[name].layer_norm


@over_sides()
def test_directions(name, surface, side):
    weights = read_weights(build(name, surface))
    for layer in LAYERS:
        directions = weights.directions(layer, side)
        assert directions.dtype == torch.float32 and not directions.requires_grad
        assert_close(directions, families.direction(name, layer, side), 5e-6)


@over_sides(RAW)
def test_unfolded_directions_are_the_literal_weights(name, surface, side):
    weights = read_weights(build(name, surface))
    for layer in LAYERS:
        literal = families.literal(name, layer, side)
        assert torch.equal(weights.directions(layer, side, fold_ln=False), literal.float())


@over()
def test_unembedding(name, surface):
    weights = read_weights(build(name, surface))
    W_U = weights.W_U.detach().double()
    if weights.final_gain is not None:
        W_U = weights.final_gain.double()[:, None] * W_U
    if weights.centre:
        W_U = W_U - W_U.mean(0)
    assert_close(without_mean(W_U), without_mean(families.unembedding(name)), 5e-6)


@over(surfaces=RAW)
def test_unfolded_unembedding_is_the_literal_one(name, surface):
    assert torch.equal(read_weights(build(name, surface)).W_U, families.literal_unembedding(name).float())


# What the decode makes of it, against a float64 brute force


class BruteForce:
    """The plain definition: the scores of every token, from the truth."""

    def __init__(self, name, surface, side, score="dot", fold_ln=True):
        self.score, self.centre = score, FAMILIES[name].layer_norm
        direction = families.direction if fold_ln else families.literal
        W_U = families.unembedding(name) if fold_ln else families.literal_unembedding(name)
        if score == "cosine" and surface in FOLDED and name != "gemma2":
            W_U = without_mean(W_U)  # center_unembed took the mean off for good, and a cosine can tell
        self.x = torch.stack([direction(name, layer, side) for layer in LAYERS])
        self.scores = self._scores(self.x, W_U)
        self.std = self.scores.std(-1, correction=0)
        writes = self._scores(torch.stack([direction(name, layer, "out") for layer in LAYERS]), W_U)
        self.write_z = writes / writes.std(-1, correction=0, keepdim=True)

    def _scores(self, x, W_U):
        if self.score == "cosine":
            return torch.nn.functional.normalize(x, dim=-1) @ torch.nn.functional.normalize(W_U, dim=0)
        scores = x @ W_U
        return scores - scores.mean(-1, keepdim=True)

    def kurtosis(self):
        z = (self.scores - self.scores.mean(-1, keepdim=True)) / self.std[..., None]
        return z.pow(4).mean(-1) - 3

    def log_probs(self):
        x = self.x - self.x.mean(-1, keepdim=True) if self.centre else self.x
        tau = D_MODEL**0.5 / x.norm(dim=-1, keepdim=True)
        return (tau * self.scores).log_softmax(-1)

    def top(self, sign):
        """The reportable tokens, best first; ties to the lower id."""
        scores = (sign * self.scores)[..., :N_TOKENS]
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :K]


def assert_same_tokens(ids, truth, sign):
    """The same ids, but where float32 weights cannot tell two tokens apart."""
    best = truth.top(sign)
    lost = (truth.scores.gather(-1, best) - truth.scores.gather(-1, ids)).abs() / truth.std[..., None]
    assert float(lost.max()) < 2e-6
    assert float((ids != best).double().mean()) < 1e-3


def decode(name, surface, **options):
    return flash_decode(build(name, surface), k=K, ignore_tokens=PADDING, progress=False, **options)


def assert_decodes(neurons, truth):
    assert_close(neurons.std, truth.std, 1e-5)
    assert_close(neurons.kurtosis, truth.kurtosis(), 1e-5)
    for pole, sign in ((neurons.positive, 1), (neurons.negative, -1)):
        ids = pole.ids.long()
        logits = sign * truth.scores.gather(-1, ids)
        assert_same_tokens(ids, truth, sign)
        assert_close(pole.logits, logits, 1e-5)
        assert_close(pole.z, logits / truth.std[..., None], 1e-5)
        assert_close(pole.write_z, truth.write_z.gather(-1, ids), 1e-5)
    if truth.score == "dot":
        probs = truth.log_probs().exp().gather(-1, neurons.positive.ids.long())
        assert_close(neurons.positive.probs, probs, 1e-5)


@over_sides()
def test_decode(name, surface, side):
    assert_decodes(decode(name, surface, side=side), BruteForce(name, surface, side))


@over_sides()
def test_decode_cosine(name, surface, side):
    neurons = decode(name, surface, side=side, score="cosine")
    assert_decodes(neurons, BruteForce(name, surface, side, score="cosine"))


@over_sides(RAW)
def test_decode_unfolded(name, surface, side):
    neurons = decode(name, surface, side=side, fold_ln=False)
    assert_decodes(neurons, BruteForce(name, surface, side, fold_ln=False))


@over(["llama"])
def test_padded_ids_are_never_reported(name, surface):
    model = build(name, surface)
    tokenizer = families.tokenizer() if surface == "hf" else None  # the others have their own
    neurons = flash_decode(model, k=N_TOKENS, tokenizer=tokenizer, progress=False)
    for pole in (neurons.positive, neurons.negative):
        assert torch.equal(pole.ids.sort().values[0, 0], torch.arange(N_TOKENS, dtype=torch.int32))
        assert int(pole.ids.max()) < N_TOKENS
    with pytest.raises(ValueError, match="k: expected 1 to 72"):
        flash_decode(model, k=N_TOKENS + 1, tokenizer=tokenizer, progress=False)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "phi3"])
def test_bfloat16_weights_are_read_exactly(name):
    half = copy.deepcopy(build(name, "hf")).bfloat16()
    widened = copy.deepcopy(half).float()
    assert flash_decode(half, k=K, progress=False).source.dtype == "bfloat16"
    for side in sides(name):
        given, same = (read_weights(model).directions(1, side) for model in (half, widened))
        assert given.dtype == torch.float32 and torch.equal(given, same)


# Refusals


@pytest.mark.parametrize(
    "given", [None, 3, torch.nn.Linear(2, 2), torch.zeros(2, 2)], ids=lambda given: type(given).__name__
)
def test_anything_but_a_model_is_refused(given):
    with pytest.raises(TypeError, match=f"model: expected .*, got {type(given).__name__}"):
        flash_decode(given)


@over([name for name in DENSE if name not in GATED])
def test_gate_of_an_ungated_mlp_is_refused(name, surface):
    with pytest.raises(ValueError, match="gate"):
        flash_decode(build(name, surface), side="gate")


@contextmanager
def poisoned(tensor, value):
    """A model one of whose weights is not finite, until the end of the block."""
    weight = tensor.detach()[..., 3:4]
    before = weight.clone()
    weight.copy_(torch.full_like(weight, value))
    try:
        yield
    finally:
        weight.copy_(before)


def held(name, surface, matrix):
    """The tensor in which a surface holds a matrix of layer 1, or W_U."""
    model = build(name, surface)
    if surface != "hf":
        return getattr(model if matrix == "W_U" else model.blocks[1].mlp, matrix)
    mlp = model.model.layers[1].mlp
    linear = {"W_in": mlp.up_proj, "W_gate": mlp.gate_proj, "W_out": mlp.down_proj, "W_U": model.lm_head}[matrix]
    return linear.weight


@over(["llama"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("matrix, side", [("W_in", "in"), ("W_gate", "gate"), ("W_out", "out"), ("W_out", "in")])
def test_a_weight_that_is_not_finite_is_refused(name, surface, matrix, side, value):
    with poisoned(held(name, surface, matrix), value), pytest.raises(ValueError, match=f"layer 1.*{matrix}"):
        flash_decode(build(name, surface), side=side, progress=False)
    flash_decode(build(name, surface), side=side, progress=False)


@over(["llama"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
def test_an_unembedding_that_is_not_finite_is_refused(name, surface, value):
    with poisoned(held(name, surface, "W_U"), value), pytest.raises(ValueError, match="W_U"):
        flash_decode(build(name, surface), progress=False)


@over(["llama"], RAW)
@pytest.mark.parametrize("norm, message", [("ln2", "layer 1.*norm"), ("ln_final", "norm")])
def test_a_gain_that_is_not_finite_is_refused(name, surface, norm, message):
    model = build(name, surface)
    if surface == "hf":
        gain = (model.model.norm if norm == "ln_final" else model.model.layers[1].post_attention_layernorm).weight
    else:
        gain = (model.ln_final if norm == "ln_final" else model.blocks[1].ln2).w
    with poisoned(gain, float("nan")), pytest.raises(ValueError, match=message):
        flash_decode(model, progress=False)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_slices_of_neurons_are_alike_of_dense_mlps_and_experts(name):
    weights = read_weights(families.hf_model(name))
    whole = weights.directions(0, "in")
    for part in (slice(3, 9), slice(-5, None), slice(0, 0), slice(9, 3), slice(len(whole) + 3, None), slice(0, 10**9)):
        assert torch.equal(weights.directions(0, "in", neurons=part), whole[part])
    with pytest.raises(ValueError, match="a slice without a step"):
        weights.directions(0, "in", neurons=slice(0, 9, 2))
    with pytest.raises(TypeError, match=r"neurons: expected a slice, got 3; .* slice\(i, i \+ 1\)"):
        weights.directions(0, "in", neurons=3)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (3,), (2, 3, 4)])
def test_what_is_no_matrix_has_no_fingerprint(shape):
    with pytest.raises(ValueError, match="fingerprint: expected a matrix"):
        fingerprint(torch.zeros(shape))
