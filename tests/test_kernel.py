"""The engine against its plain definition in float64."""

import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import fields
from functools import partial
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tl_flash import kernel
from tl_flash.kernel import Readout, decode, decode_each, reference_decode, token_scores, token_z
from tl_flash.kernel import directions as kernel_directions
from tl_flash.kernel import plan as kernel_plan
from tl_flash.kernel import reduce as kernel_reduce
from tl_flash.kernel import rescore as kernel_rescore
from tl_flash.kernel import screens as kernel_screens
from tl_flash.kernel import tiles as kernel_tiles
from tl_flash.kernel import unembedding as kernel_unembedding
from tl_flash.kernel.arithmetic import HALVES_UNIT, halves

LOW = [None, torch.bfloat16, torch.float16]
FLOAT_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
STATISTICS = ["logits", "log_z", "norm", "mean", "std", "kurtosis", "tracked"]


@pytest.fixture(autouse=True)
def one_thread():
    """Small products on several threads spend their time waiting, the more so on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def prepare(W_U, *, low=None, **options):
    """`kernel.prepare` on a device that multiplies some dtype faster than float32, or on one that does not."""
    with (
        mock.patch.object(kernel_unembedding, "screened_in", lambda W_U: low),
        mock.patch.object(kernel_unembedding, "ROWS_TO_PAY", 0),
    ):
        return kernel.prepare(W_U, **options)


def truth(x, W_U, *, gain=None, norm=None, **options) -> Readout:
    def wide(t):
        return None if t is None else t.double()

    return reference_decode(wide(x), wide(W_U), gain=wide(gain), norm=wide(norm), dtype=torch.float64, **options)


def assert_same_tokens(ours: Readout, x, W_U, *, gain=None, centre=False, score="dot", **options):
    """Ids equal those of float64, except where float64 cannot tell the two tokens apart."""
    right = truth(x, W_U, gain=gain, centre=centre, score=score, **options)
    for pole, row, rank in (ours.ids != right.ids).nonzero().tolist():
        two = torch.stack([ours.ids[pole, row, rank], right.ids[pole, row, rank]]).long()
        W = W_U[:, two].double() if gain is None else gain.double()[:, None] * W_U[:, two].double()
        v = x[row].double() - (x[row].double().mean() if centre else 0)
        W = W - (W.mean(0) if centre else 0)
        gap = (v @ W).diff().abs() if score == "dot" else (v @ (W / W.norm(dim=0))).diff().abs()
        longest = W.norm(dim=0).max() if score == "dot" else 1
        assert gap <= 1e-13 * v.norm() * longest, f"pole {pole}, row {row}, rank {rank}: tokens {two.tolist()}"


def assert_no_worse_than_plain(ours, plain, right, *, eps):
    """|truth - kernel| <= |truth - naive| + eps, in the worst row, for each number."""
    for name in STATISTICS:
        a, b, c = (getattr(r, name) for r in (ours, plain, right))
        scale = c.abs().amax().clamp(min=1e-30)
        assert (a - c).abs().amax() <= (b - c).abs().amax() + eps * scale, name


def assert_equal(a: Readout, b: Readout, *, tolerance: float = 0.0):
    """The same tokens and scores to the bit, statistics within a relative tolerance."""
    assert torch.equal(a.ids, b.ids)
    assert torch.equal(a.logits, b.logits)
    for name in STATISTICS[1:]:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=tolerance, atol=tolerance, equal_nan=True)


def draw(n, d_model, d_vocab, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d_model, generator=generator)
    W_U = torch.randn(d_model, d_vocab, generator=generator) / math.sqrt(d_model)
    return x.to(dtype), W_U.to(dtype), torch.rand(d_model, generator=generator) + 0.5


# The definition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("centre", [False, True])
@pytest.mark.parametrize("with_gain", [False, True])
@pytest.mark.parametrize("shape", [(255, 123, 507), (31, 64, 5003), (4, 16, 17), (3, 5, 4)])
def test_decode_is_its_definition(shape, score, centre, with_gain):
    x, W_U, gain = draw(*shape)
    gain = gain if with_gain else None
    options = {"gain": gain, "centre": centre, "score": score}
    unembedding = prepare(W_U, ignore=[3, 5] if shape[2] > 5 else None, **options)
    more = {"k": min(10, shape[2]), "tracked": [0], "ignore": [3, 5] if shape[2] > 5 else None}
    ours = decode(x, unembedding, k=more["k"], tracked=[0])
    assert_same_tokens(ours, x, W_U, **options, **more)
    for name in STATISTICS:
        expected = getattr(truth(x, W_U, **options, **more), name)
        torch.testing.assert_close(getattr(ours, name), expected, rtol=3e-5, atol=1e-5, equal_nan=True)


def test_definition_on_paper():
    W_U = torch.tensor([[1.0, 0.0, -1.0, 0.0], [0.0, 2.0, 0.0, -2.0]])
    ours = decode(torch.tensor([[3.0, 0.0]]), prepare(W_U), k=4, tracked=[2])
    assert ours.ids.tolist() == [[[0, 1, 3, 2]], [[2, 1, 3, 0]]]  # tokens 1 and 3 tie, the lower id first
    assert ours.logits.tolist() == [[[3.0, 0.0, 0.0, -3.0]], [[3.0, 0.0, 0.0, -3.0]]]
    assert ours.tracked.tolist() == [[-3.0]]
    top = math.sqrt(2)  # tau * s = sqrt(2) / 3 * 3
    assert ours.log_z[0].item() == pytest.approx(math.log(math.exp(top) + 2 + math.exp(-top)))
    assert ours.std.item() == pytest.approx(math.sqrt(4.5))
    assert ours.kurtosis.item() == pytest.approx(40.5 / 4.5**2 - 3)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_numbers_are_as_good_as_plain_float32(dtype):
    x, W_U, gain = draw(200, 300, 2000, dtype=dtype)
    W_U = W_U + 0.2 * W_U[:, :1]  # a common part, as trained unembeddings have: means far from 0
    x[:, 0] *= 40
    options = {"gain": gain, "centre": True, "k": 7, "tracked": [11, 0, 11]}
    ours = decode(x, prepare(W_U, gain=gain, centre=True), k=7, tracked=[11, 0, 11])
    right = truth(x, W_U, **options)
    assert_same_tokens(ours, x, W_U, **options)
    assert_no_worse_than_plain(ours, reference_decode(x, W_U, **options), right, eps=2e-7)


@pytest.mark.parametrize("low", LOW)
def test_statistics_of_large_scores_do_not_overflow(low):
    x, W_U, _ = draw(8, 32, 400)
    W_U[:, 7] *= 1e4  # tau * s in the tens of thousands
    ours, right = decode(x, prepare(W_U, low=low)), truth(x, W_U)
    for name in STATISTICS:
        rtol, atol = (5e-3, 1e-1) if low and name in ("std", "kurtosis", "log_z") else (1e-5, 1e-2)
        torch.testing.assert_close(getattr(ours, name), getattr(right, name), rtol=rtol, atol=atol)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("size", [8, 20, 60])
def test_logits_like_gemmas_are_normalised_in_one_pass(low, size, monkeypatch):
    """Their exponentials overflow, those of their negatives vanish; one token that is never reported is beyond all."""
    x, W_U, _ = draw(24, 64, 3000)
    W_U *= size / 8
    W_U[:, 11] *= 1.5
    if low is None and size < 60:
        monkeypatch.setattr(torch.Tensor, "logsumexp", None)  # of one row after the other
    ours = decode(x, prepare(W_U, low=low, ignore=[11]))
    monkeypatch.undo()
    right = truth(x, W_U, ignore=[11])
    assert torch.equal(ours.ids, right.ids)
    torch.testing.assert_close(ours.log_z, right.log_z, rtol=1e-3 if low else 1e-6, atol=1e-2 if low else 1e-4)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_a_zero_direction_has_no_reading_and_leaves_the_others_theirs(low, score, precision):
    x, W_U, gain = draw(40, 16, 300)
    gain[0] = 0
    zero = torch.zeros(40, dtype=torch.bool)
    zero[[0, 7, 23, 39]] = True
    x[[0, 7]] = 0
    x[23] = torch.eye(16)[0]  # lies where the gain is zero
    x[39] = 0.1 * 2.0**-149  # below the smallest float32
    options = dict(gain=gain, score=score)
    ours = decode(x, prepare(W_U, low=low, precision=precision, **options), k=5, tracked=[2, 3])
    assert torch.equal(ours.zero, zero) and (ours.ids[:, zero] == -1).all() and (ours.norm[zero] == 0).all()
    for name in ("logits", "log_z"):
        assert getattr(ours, name)[:, zero].isnan().all(), name
    for name in ("mean", "std", "kurtosis", "tracked"):
        assert getattr(ours, name)[zero].isnan().all(), name
    alone = decode(x[~zero], prepare(W_U, low=low, precision=precision, **options), k=5, tracked=[2, 3])
    assert torch.equal(ours.ids[:, ~zero], alone.ids) and torch.equal(ours.logits[:, ~zero], alone.logits)
    assert ours.repaired == alone.repaired
    right = truth(x, W_U, k=5, tracked=[2, 3], **options)
    assert torch.equal(right.zero, zero) and torch.equal(ours.ids, right.ids)
    assert all(torch.equal(getattr(ours, name).isnan(), getattr(right, name).isnan()) for name in STATISTICS[1:])


def test_a_constant_direction_is_zero_once_centred():
    x, W_U, _ = draw(6, 8, 50)
    x[5] = 0.1
    unembedding = prepare(W_U, centre=True)
    assert decode(x, unembedding, k=2).zero.tolist() == [False] * 5 + [True]
    assert token_scores(x, torch.zeros(6, 2).long(), unembedding)[5].isnan().all()
    z = token_z(x, torch.zeros(6, 2).long(), unembedding)
    assert z[5].isnan().all() and not z[:5].isnan().any()


def test_a_direction_of_norm_0_is_zero():
    x, W_U, _ = draw(6, 8, 50)
    norm = torch.ones(6)
    norm[2] = 0
    readout = decode(x, prepare(W_U), k=2, norm=norm)
    assert readout.zero.nonzero().flatten().tolist() == [2] and norm.tolist().count(0) == 1


def test_a_W_U_of_zeros_ties_throughout():
    ours = decode(torch.ones(2, 3), prepare(torch.zeros(3, 50)), k=4)
    assert ours.ids.tolist() == [[[0, 1, 2, 3]] * 2] * 2
    assert not ours.logits.any()


def test_own_norm_can_be_overridden():
    x, W_U, _ = draw(20, 16, 100)
    norm = torch.rand(20) + 0.1
    ours, right = decode(x, prepare(W_U), norm=norm), truth(x, W_U, norm=norm)
    torch.testing.assert_close(ours.log_z, right.log_z)
    torch.testing.assert_close(ours.norm, norm)
    assert torch.equal(ours.ids, decode(x, prepare(W_U)).ids)


@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("length", [1e-9, 1e-3, 1e3, 1e20])
def test_a_norm_may_make_logits_of_any_size(length, low):
    x, W_U, _ = draw(12, 64, 2000)
    norm = torch.full((12,), length)
    ours, right = decode(x, prepare(W_U, low=low), norm=norm), truth(x, W_U, norm=norm)
    assert torch.equal(ours.ids, right.ids)
    tolerance = 5e-3 if low else 1e-5
    for name in ("log_z", "std", "kurtosis"):
        torch.testing.assert_close(getattr(ours, name), getattr(right, name), rtol=tolerance, atol=tolerance)


def test_ignored_tokens_are_not_reported_but_counted():
    x, W_U, _ = draw(40, 24, 333)
    free = decode(x, prepare(W_U), k=5)
    ignored = free.ids[:, :, 0].unique()
    ours = decode(x, prepare(W_U, ignore=ignored), k=5)
    assert not torch.isin(ours.ids, ignored).any()
    assert_same_tokens(ours, x, W_U, ignore=ignored, k=5)
    for name in ["log_z", "mean", "std", "kurtosis"]:
        assert torch.equal(getattr(ours, name), getattr(free, name))


def test_a_zero_column_has_cosine_0():
    x, W_U, _ = draw(9, 8, 40)
    W_U[:, 4] = 0
    ours = decode(x, prepare(W_U, score="cosine"), tracked=[4])
    assert not ours.tracked.any()
    assert_same_tokens(ours, x, W_U, score="cosine")


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_token_scores_and_z(score, by_token):
    x, W_U, gain = draw(50, 40, 600)
    unembedding = prepare(W_U.T.contiguous().T if by_token else W_U, gain=gain, centre=True, score=score)
    options = {"gain": gain, "centre": True, "score": score}
    ids = torch.randint(600, (50, 3))
    every = truth(x, W_U, tracked=range(600), **options)
    torch.testing.assert_close(token_scores(x, ids, unembedding), every.tracked.gather(1, ids))
    z = token_z(x, ids, unembedding)
    torch.testing.assert_close(z, every.tracked.gather(1, ids) / every.std[:, None], rtol=1e-4, atol=1e-5)
    assert token_z(x, ids[:, :0], unembedding).shape == (50, 0) and token_z(x[:0], ids[:0], unembedding).shape == (0, 3)


# Exactness ------------------------------------------------------------------------------------------------------------


def heavy_tailed(x, W_U):
    return x / torch.rand_like(x), W_U / torch.rand_like(W_U).square()


def near_tied(x, W_U):
    return x, W_U[:, :1] + 1e-7 * W_U


def one_huge_column(x, W_U):
    W_U[:, W_U.shape[1] // 2] *= 1e5
    return x, W_U


def some_huge_columns(x, W_U):
    W_U[:, ::7] *= 1e3
    return x, W_U


def short_and_long(x, W_U):
    return x * torch.tensor([1e-6, 1e6]).repeat(len(x))[: len(x), None], W_U


def duplicated(x, W_U):
    return x, W_U[:, torch.arange(W_U.shape[1]) % 23]


def few_values(x, W_U):
    return x.sign(), W_U.sign()


def large_mean(x, W_U):
    return x, W_U + 30 * W_U[:, :1]


FAMILIES = [
    heavy_tailed,
    near_tied,
    one_huge_column,
    some_huge_columns,
    short_and_long,
    duplicated,
    few_values,
    large_mean,
]


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    n=st.integers(1, 40),
    d_model=st.integers(2, 80),
    d_vocab=st.integers(1, 400),
    k=st.integers(1, 30),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(FLOAT_DTYPES[1:3]),
    score=st.sampled_from(["dot", "cosine"]),
    low=st.sampled_from(LOW),
)
def test_tokens_are_those_of_float64(family, n, d_model, d_vocab, k, seed, dtype, score, low):
    x, W_U, gain = draw(n, d_model, d_vocab, seed=seed)
    x, W_U = (t.to(dtype) for t in family(x, W_U))
    k = min(k, d_vocab)
    ours = decode(x, prepare(W_U, gain=gain, score=score, low=low), k=k)
    assert_same_tokens(ours, x, W_U, gain=gain, score=score, k=k)


@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_equal_tokens_tie_exactly_and_come_in_order(score):
    x, W_U, _ = draw(64, 37, 30)
    copies = 40
    W_U = W_U.repeat(1, copies)  # token t, t + 30, t + 60 ... are equal
    ours = decode(x, prepare(W_U, score=score), k=copies + 1)
    first = ours.ids[..., :copies]
    assert (ours.logits[..., :copies] == ours.logits[..., :1]).all()
    assert torch.equal(first, first[..., :1] + 30 * torch.arange(copies, dtype=torch.int32))
    assert (first[..., 0] < 30).all()
    assert (ours.ids[..., copies] < 30).all()


def test_rows_without_proof_are_repaired_and_counted():
    x, W_U, _ = draw(64, 37, 900)
    tied = torch.cat([W_U, W_U[:, :1].repeat(1, 100)], 1)  # more equal tokens than candidates
    x[:8] = W_U[:, 0]
    exact, fast = decode(x, prepare(tied)), decode(x, prepare(tied, precision="fast"))
    assert exact.ids[0, :8].tolist() == [[0, *range(900, 909)]] * 8
    assert exact.repaired >= 8
    assert fast.repaired == 0
    assert decode(x, prepare(W_U)).repaired == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("low", LOW[1:])
def test_a_screen_in_low_precision_changes_no_token_and_no_logit(dtype, low):
    x, W_U, gain = draw(48, 96, 3000, dtype=dtype)
    plain = decode(x, prepare(W_U, gain=gain, centre=True), tracked=[1])
    screened = decode(x, prepare(W_U, gain=gain, centre=True, low=low), tracked=[1])
    for name in ["ids", "logits", "norm", "mean", "tracked"]:
        assert torch.equal(getattr(screened, name), getattr(plain, name)), name
    # Sums over the vocabulary are made of rounded scores, but for those of the top tokens.
    torch.testing.assert_close(screened.log_z, plain.log_z, rtol=0, atol=2e-3)
    torch.testing.assert_close(screened.std, plain.std, rtol=5e-4, atol=0)
    torch.testing.assert_close(screened.kurtosis, plain.kurtosis, rtol=0, atol=5e-3)


@pytest.mark.parametrize("spread", [1, 3])
def test_statistics_of_a_bf16_screen_at_the_size_of_gpt2(spread):
    """What README tells of their accuracy; `spread` is the standard deviation of tau * s."""
    x, W_U, _ = draw(32, 768, 50257)
    W_U *= spread / 768**0.5
    ours, right = decode(x, prepare(W_U, low=torch.bfloat16)), truth(x, W_U)
    assert torch.equal(ours.ids, right.ids)
    torch.testing.assert_close(ours.log_z, right.log_z, rtol=0, atol=3e-3)
    torch.testing.assert_close(ours.std, right.std, rtol=1e-4, atol=0)
    torch.testing.assert_close(ours.kurtosis, right.kurtosis, rtol=0, atol=1e-3)


@settings(max_examples=60, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    d_model=st.sampled_from([1, 2, 3, 17, 200]),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(FLOAT_DTYPES[:3]),
    score=st.sampled_from(["dot", "cosine"]),
    low=st.sampled_from(LOW),
)
def test_every_screened_score_is_within_its_bound(family, d_model, seed, dtype, score, low):
    x, W_U, _ = draw(8, d_model, 300, seed=seed)
    x, W_U = (t.to(dtype) for t in family(x, W_U))
    u = prepare(W_U, score=score, low=low)
    plan = kernel_plan.Plan.within(2**24, u, u.fast, 5)
    rescorer = kernel_rescore.Rescorer(u, plan.pairs)
    tile = kernel_tiles.Tile(plan, u.fast, u, torch.empty(plan.buffer_bytes, dtype=torch.uint8), rescorer)
    directions = kernel_directions.Directions.of(x, None, u)
    tile.fill(directions)
    exact = directions.rows @ W_U.double() * (1 if u.column_scale is None else u.column_scale)
    wrong = (tile.as_screened(exact[None], torch.ones(1, 1, 1)) - tile.scores)[0].abs()
    screened = tile.scores.float()
    bound = tile._upper(screened, 0) - screened
    assert (wrong <= bound * (1 + 1e-6) + 1e-6 * screened.abs()).all()


@pytest.mark.parametrize("low", LOW[1:])
def test_a_screen_needs_no_copy_of_a_W_U_held_in_its_dtype(low):
    _, W_U, _ = draw(1, 96, 3000, dtype=low)
    assert prepare(W_U, low=low).fast.weights.data_ptr() == W_U.data_ptr()
    assert prepare(W_U.float(), low=low).fast.weights.dtype == low
    assert prepare(W_U.float()).fast.weights.dtype == torch.float32


@pytest.mark.parametrize("size", [1e-25, 1e-6, 1.0, 1e6, 1e25])
@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_a_float16_screen_proves_as_much_at_every_size_of_W_U(size, score):
    """float16 holds nothing beyond 65,504 and less and less below 6e-5."""
    x, W_U, _ = draw(40, 300, 5000)
    W_U[:, 7] *= 300  # one column that is far longer
    x[3], x[4] = W_U[:, 7] / 300, 1e-20 * W_U[:, 9]
    ours = decode(x, prepare(size * W_U, low=torch.float16, score=score))
    right = truth(x, size * W_U, score=score)
    assert_same_tokens(ours, x, size * W_U, score=score)
    assert ours.repaired <= 2
    for name in ("log_z", "std", "kurtosis"):
        torch.testing.assert_close(getattr(ours, name), getattr(right, name), rtol=2e-3, atol=2e-3, equal_nan=True)


def test_float16_scores_beyond_its_range_are_none():
    """A column so much longer than the others that a typical score in units of log_z would leave it no room."""
    x, W_U, _ = draw(40, 300, 5000)
    W_U[:, 7] *= 1e5
    x[3] = W_U[:, 7] / 1e5
    ours, right = decode(x, prepare(W_U, low=torch.float16)), truth(x, W_U)
    assert_same_tokens(ours, x, W_U)
    for name in ("logits", "log_z", "std", "kurtosis"):
        torch.testing.assert_close(getattr(ours, name), getattr(right, name), rtol=2e-3, atol=2e-3)


def test_the_device_is_asked_once_and_only_where_it_matters():
    device, asked = torch.device("cpu"), kernel_screens.fast_dtype
    faster, hits = asked(device), asked.cache_info().hits
    assert kernel.prepare(torch.ones(2, 3)).fast.dtype == torch.float32
    assert asked.cache_info().hits == hits
    large = kernel.prepare(torch.ones(256, 4096))
    assert asked.cache_info().hits == hits + 1
    assert large.fast.dtype == (faster or torch.float32)


def test_a_device_that_does_not_tell_is_tried(monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    asked = kernel_screens.fast_dtype.__wrapped__
    for wanted in (True, False):
        monkeypatch.setattr(kernel_screens, "_tries_bf16_faster", lambda wanted=wanted: wanted)
        assert asked(torch.device("cpu")) is (torch.bfloat16 if wanted else None)
    monkeypatch.undo()
    assert kernel_screens._tries_bf16_faster() in (True, False)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES[:3])
@pytest.mark.parametrize("low", LOW)
def test_a_copy_by_token_changes_nothing(dtype, low):
    x, W_U, _ = draw(300, 64, 1000, dtype=dtype)
    tolerance = 1e-3 if low else 1e-5  # another layout, another order of sums, and bf16 rounds them
    held, by_token = prepare(W_U, low=low), prepare(W_U.T.contiguous().T, low=low)
    assert_equal(decode(x, held), decode(x, by_token), tolerance=tolerance)
    assert torch.equal(held.by_token, by_token.by_token)  # worth a copy for so many directions
    few, tight = prepare(W_U, low=low), prepare(W_U, low=low)
    assert_equal(decode(x[:1], few), decode(x[:1], by_token), tolerance=tolerance)
    assert few.by_token is None
    assert_equal(decode(x, tight, max_bytes=W_U.nbytes), decode(x, by_token), tolerance=tolerance)
    assert tight.by_token is None


@pytest.mark.parametrize("low", LOW)
def test_all_but_few_tokens_can_be_ignored(low):
    x, W_U, _ = draw(20, 64, 2000)
    W_U -= 10 * x.mean(0)[:, None]  # most scores are below 0
    kept = torch.randperm(2000)[:12]
    ignored = [token for token in range(2000) if token not in kept]
    ours = decode(x, prepare(W_U, ignore=ignored, low=low), k=12)
    assert_same_tokens(ours, x, W_U, ignore=ignored, k=12)
    assert ours.ids.sort(-1).values.tolist() == [[kept.sort().values.tolist()] * 20] * 2


@pytest.mark.parametrize("spread", [1e-4, 0.0])
def test_tokens_that_bf16_cannot_tell_apart_are_repaired(spread):
    """Few such tokens are scored again at once, more by way of float32."""
    x, W_U, _ = draw(40, 64, 4000)
    for n_alike in (100, 2000):
        alike = W_U.clone()
        alike[:, :n_alike] = 3 * x.mean(0)[:, None] + spread * W_U[:, :n_alike]
        ours = decode(x, prepare(alike, low=torch.bfloat16))
        assert ours.repaired > 20
        assert_same_tokens(ours, x, alike)


# Invariances ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_result_does_not_depend_on_tiles_or_threads(dtype):
    x, W_U, gain = draw(255, 123, 5070, dtype=dtype)
    unembedding = prepare(W_U, gain=gain, centre=True)
    whole = decode(x, unembedding, tracked=[1, 2])
    for max_bytes in [2 * 2**20, 5 * 2**20, 11 * 2**20]:
        assert_equal(decode(x, unembedding, tracked=[1, 2], max_bytes=max_bytes), whole, tolerance=2e-6)
    torch.set_num_threads(2)
    assert_equal(decode(x, unembedding, tracked=[1, 2]), whole, tolerance=2e-6)


def test_rows_do_not_depend_on_each_other():
    x, W_U, _ = draw(20, 64, 1000)
    unembedding = prepare(W_U)
    whole = decode(x, unembedding)
    for row in range(0, 20, 7):
        alone = decode(x[row : row + 1], unembedding)
        assert torch.equal(alone.ids[:, 0], whole.ids[:, row])
        assert torch.equal(alone.logits[:, 0], whole.logits[:, row])


def test_permuting_the_vocabulary_permutes_the_ids():
    x, W_U, _ = draw(50, 40, 1234)
    order = torch.randperm(1234)
    there, here = decode(x, prepare(W_U[:, order])), decode(x, prepare(W_U))
    assert torch.equal(order[there.ids.long()].int(), here.ids)
    assert_equal_numbers(there, here)


def assert_equal_numbers(a, b):
    for name in STATISTICS:
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-5, atol=1e-5)


def test_the_poles_of_minus_x_are_swapped():
    x, W_U, _ = draw(50, 40, 1234)
    there, here = decode(-x, prepare(W_U)), decode(x, prepare(W_U))
    assert torch.equal(there.ids, here.ids.flip(0))
    assert torch.equal(there.logits, here.logits.flip(0))
    torch.testing.assert_close(there.log_z, here.log_z.flip(0))


@pytest.mark.parametrize("scale", [1e-6, 0.3, 1e6])
def test_length_changes_neither_tokens_nor_probabilities(scale):
    x, W_U, _ = draw(50, 40, 1234)
    there, here = decode(x.double() * scale, prepare(W_U)), decode(x, prepare(W_U))
    assert torch.equal(there.ids, here.ids)
    torch.testing.assert_close(there.log_z, here.log_z)
    torch.testing.assert_close(there.kurtosis, here.kurtosis)
    torch.testing.assert_close(there.logits / there.std[..., None], here.logits / here.std[..., None])
    torch.testing.assert_close(there.logits, here.logits * scale)


@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_scale_of_W_U_does_not_matter_to_the_screen(scale):
    x, W_U, _ = draw(20, 16, 300)
    there, right = decode(x, prepare(W_U * scale)), truth(x, W_U * scale)
    assert torch.equal(there.ids, right.ids)
    torch.testing.assert_close(there.kurtosis, right.kurtosis)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_arguments_are_left_as_they_are(dtype, low, score):
    given = draw(20, 30, 700, dtype=dtype)
    x, W_U, gain = (t.clone() for t in given)
    unembedding = prepare(W_U, gain=gain, centre=True, score=score, ignore=[3], low=low)
    decode(x, unembedding, tracked=[1])
    token_scores(x, torch.zeros(20, 1, dtype=torch.int64), unembedding)
    token_z(x, torch.zeros(20, 1, dtype=torch.int64), unembedding)
    assert all(torch.equal(after, before) for after, before in zip((x, W_U, gain), given, strict=True))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_W_U_may_have_any_strides(dtype):
    x, W_U, _ = draw(20, 30, 700, dtype=dtype)
    here = decode(x, prepare(W_U))
    wide = torch.zeros(60, 1400, dtype=dtype)
    wide[::2, ::2] = W_U
    for held in [W_U.T.contiguous().T, wide[::2, ::2]]:
        assert_equal(decode(x, prepare(held)), here, tolerance=2e-6)


def test_layers_are_decoded_in_order():
    _, W_U, _ = draw(1, 16, 90)
    layers = [(draw(n, 16, 90, seed=n)[0], torch.rand(n) + 1 if n % 2 else None) for n in (5, 40, 1)]
    together = decode_each(iter(layers), prepare(W_U), k=3, tracked=[8])
    for (x, norm), ours in zip(layers, together, strict=True):
        assert_equal(ours, decode(x, prepare(W_U), norm=norm, k=3, tracked=[8]))


def test_no_directions_make_an_empty_readout():
    _, W_U, _ = draw(1, 16, 50)
    empty = decode(torch.empty(0, 16), prepare(W_U), k=3)
    assert empty.ids.shape == (2, 0, 3)
    assert empty.repaired == 0


def test_callers_settings_neither_reach_the_product_nor_are_left_changed():
    x, W_U, _ = draw(30, 200, 900)
    x.requires_grad_()
    here = decode(x, prepare(W_U))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            there = decode(x, prepare(W_U))
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_equal(there, here)


@pytest.mark.skipif(not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="from torch 2.9 on")
def test_the_newer_settings_of_precision_are_respected_too():
    x, W_U, _ = draw(30, 200, 900)
    here, matmul = decode(x, prepare(W_U)), torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        assert_equal(decode(x, prepare(W_U)), here)
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


# Memory ---------------------------------------------------------------------------------------------------------------

MEMORY = """
import sys, torch
from tl_flash.kernel import decode, prepare, reference_decode
torch.set_num_threads(1)
x, W_U = torch.randn(3072, 256), torch.randn(256, 50257, dtype=getattr(torch, sys.argv[2]))
decode(x[:64, :8].contiguous(), prepare(W_U[:8, :500].contiguous()))  # code pages and thread pools, once
def kib(field):  # VmRSS is resident now, VmHWM was at most; getrusage would tell the parent's peak too
    return int(open("/proc/self/status").read().split(field)[1].split()[0])
before = kib("VmRSS:")
if sys.argv[1] == "decode":
    decode(x, prepare(W_U), max_bytes=64 * 2**20)
else:
    reference_decode(x[:256], W_U)
print(kib("VmHWM:") - before)
"""


def grown_mib(what, dtype):
    done = subprocess.run([sys.executable, "-c", MEMORY, what, dtype], capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_stays_within_the_budget(dtype):
    low_precision_copy, results = 256 * 50257 * 2 / 2**20, 3072 * (2 * 10 * 8 + 6 * 4) / 2**20
    assert grown_mib("decode", dtype) < 64 + low_precision_copy + results + 40


def test_the_memory_test_can_fail():
    assert grown_mib("reference", "float32") > 64 + 256 * 50257 * 2 / 2**20 + 1 + 40


# Refusals -------------------------------------------------------------------------------------------------------------


def with_value(shape, value, at):
    x = torch.randn(shape)
    x[at] = value
    return x


W = torch.randn(8, 50)
X = torch.randn(6, 8)

REFUSALS = [
    (lambda: prepare([[1.0]]), TypeError, r"W_U: expected a torch.Tensor, got list"),
    (lambda: prepare(torch.ones(3, 4).long()), TypeError, r"W_U: expected a float dtype, got torch.int64"),
    (lambda: prepare(torch.ones(4)), ValueError, r"W_U: expected shape \[d_model, d_vocab\], got \[4\]"),
    (lambda: prepare(torch.ones(4, 0)), ValueError, r"W_U: expected at least one token .* got shape \[4, 0\]"),
    (lambda: prepare(with_value((8, 50), math.nan, (1, 2))), ValueError, r"W_U: expected finite weights"),
    (lambda: prepare(with_value((8, 50), math.inf, (1, 2))), ValueError, r"W_U: expected finite weights"),
    (
        lambda: prepare(with_value((8, 50), math.nan, (1, 2)), score="cosine"),
        ValueError,
        r"W_U: expected finite weights",
    ),
    (lambda: prepare(W.double() * 1e40), ValueError, r"W_U: expected columns of lengths between"),
    (lambda: prepare(W, gain=torch.ones(7)), ValueError, r"gain: expected shape \[8\].* got \[7\]"),
    (lambda: prepare(W, gain=torch.ones(8).int()), TypeError, r"gain: expected a float dtype"),
    (lambda: prepare(W, gain=with_value(8, math.inf, 1)), ValueError, r"gain: expected finite scales"),
    (lambda: prepare(W, score="angle"), ValueError, r"score: expected one of 'dot', 'cosine', got 'angle'"),
    (lambda: prepare(W, precision="low"), ValueError, r"precision: expected one of 'exact', 'fast', got 'low'"),
    (lambda: prepare(W, ignore=[50]), ValueError, r"ignore: expected token ids from 0 to 49, got 50"),
    (lambda: prepare(W, ignore=[1.5]), TypeError, r"ignore: expected token ids, whole numbers, got torch.float32"),
    (lambda: prepare(W, ignore=[[1]]), ValueError, r"ignore: expected a flat sequence"),
    (lambda: decode(X.tolist(), prepare(W)), TypeError, r"x: expected a torch.Tensor, got list"),
    (lambda: decode(X.long(), prepare(W)), TypeError, r"x: expected a float dtype"),
    (lambda: decode(X[0], prepare(W)), ValueError, r"x: expected shape \[n, 8\], got \[8\]"),
    (lambda: decode(X.sign() * 3e38, prepare(W)), ValueError, r"x: expected logits within float32, .* row 0"),
    (lambda: decode(X, prepare(W), max_bytes="1G"), TypeError, r"max_bytes: expected a whole number of bytes, got str"),
    (lambda: decode(X[:, :7], prepare(W)), ValueError, r"x: expected shape \[n, 8\], got \[6, 7\]"),
    (lambda: decode(with_value((6, 8), math.nan, 4), prepare(W)), ValueError, r"x: expected finite .* row 4"),
    (lambda: prepare(W, gain=torch.zeros(8)), ValueError, "gain: .* not zero throughout"),
    (lambda: decode(X, prepare(W), k=0), ValueError, r"k: expected 1 to 50, .* got 0"),
    (lambda: decode(X, prepare(W, ignore=[7]), k=50), ValueError, r"k: expected 1 to 49, .* got 50"),
    (lambda: decode(X, prepare(W), k=2.0), TypeError, r"k: expected a whole number of tokens, got float"),
    (lambda: decode(X, prepare(W), tracked=[-1]), ValueError, r"tracked: expected token ids from 0 to 49, got -1"),
    (lambda: decode(X, prepare(W), norm=torch.ones(5)), ValueError, r"norm: expected shape \[6\].* got \[5\]"),
    (lambda: decode(X, prepare(W), norm=with_value(6, -1, 2)), ValueError, r"norm: .* got -.* in row"),
    (lambda: decode(X, prepare(W), max_bytes=1000), ValueError, r"max_bytes: expected at least \d+ .* got 1000"),
    (lambda: token_scores(X, torch.zeros(5, 2).long(), prepare(W)), ValueError, r"ids: expected shape \[6, m\]"),
    (lambda: token_scores(X, torch.full((6, 2), 50), prepare(W)), ValueError, r"ids: expected token ids from 0"),
    (
        lambda: token_z(X[:, :3], torch.zeros(6, 2).long(), prepare(W)),
        ValueError,
        r"x: expected shape \[n, 8\], got \[6, 3\]",
    ),
]


@pytest.mark.parametrize(("call", "error", "message"), REFUSALS, ids=[message[:40] for *_, message in REFUSALS])
def test_refusals_say_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_every_field_of_a_readout_is_on_the_cpu():
    x, W_U, _ = draw(3, 8, 50)
    readout = decode(x, prepare(W_U), k=2)
    tensors = [getattr(readout, f.name) for f in fields(readout) if f.name != "repaired"]
    assert all(t.device.type == "cpu" for t in tensors)
    assert readout.ids.dtype == torch.int32
    assert all(t.dtype == torch.float32 for t in tensors[1:])


# GPU kernels, on Triton's interpreter ---------------------------------------------------------------------------------

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
needs_triton = pytest.mark.skipif(not INTERPRETED, reason="needs Triton, and TRITON_INTERPRET=1")


@needs_triton
@pytest.mark.parametrize(("n", "d_vocab", "group"), [(5, 5003, 16), (3, 20011, 64), (2, 17, 64), (4, 507, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_triton_reduces_as_torch_does(n, d_vocab, group, dtype):
    from tl_flash.kernel import triton_kernels

    blocks = -(-d_vocab // (8 * group)) * 8
    scores = (4 * torch.randn(n, group * blocks)).to(dtype)
    mean, slope = torch.randn(n, 1), 30 * torch.rand(n, 1)
    never = torch.rand(d_vocab) < 0.3
    never[::blocks] = True  # a whole block
    named = torch.nn.functional.pad(~never, (0, group * blocks - d_vocab))
    padded = scores.clone()
    padded[:, d_vocab:] = math.nan  # no token's
    ours = triton_kernels.reduce(padded, d_vocab, blocks, mean, slope, named)
    numbers = torch.cat([never.nonzero()[:, 0], torch.arange(d_vocab, group * blocks)])
    whole = torch.empty(2, n, blocks, dtype=kernel_reduce.extremes_dtype(dtype))
    work = kernel_reduce.Work(*torch.empty(2, 2 * scores[0].numel()), whole)
    right = kernel_reduce.reduce(scores, d_vocab, mean, slope, numbers, work)
    extremes = kernel_reduce.as_floats(right.extremes)
    named = extremes > -6e4  # where there is none, the least finite number of the dtype that they are held in
    assert torch.equal(ours.extremes > -6e4, named)
    torch.testing.assert_close(ours.extremes[named], extremes[named], rtol=0, atol=0)
    for got, expected in zip(ours[1:], right[1:], strict=True):
        torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)
    assert triton_kernels.reduce(padded, d_vocab, blocks, mean, None, None).log_z.isnan().all()


@needs_triton
@pytest.mark.parametrize("some_are_ignored", [False, True])
@pytest.mark.parametrize(("d_vocab", "blocks", "count"), [(5003, 80, 32), (20011, 320, 13)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_selects_the_greatest_bounds(dtype, d_vocab, blocks, count, some_are_ignored):
    from tl_flash.kernel import triton_kernels

    n, size, rounding, underflow = 5, 64, 1e-3, 1e-6
    scores = (4 * torch.randn(n, size * blocks)).to(dtype)
    scores[:, d_vocab:] = math.nan
    fixed, reach, length, lost = torch.rand(d_vocab), torch.rand(d_vocab), torch.rand(n, 1), torch.rand(n, 1)
    named = torch.rand(size * blocks) < 0.7 if some_are_ignored else None
    real = torch.arange(size * blocks) < d_vocab
    able = real if named is None else named & real
    signed = torch.stack([scores, -scores]).float()
    extremes = signed.masked_fill(~able, -3e38).view(2, n, size, blocks).amax(2)
    of_blocks = [
        torch.nn.functional.pad(of, (0, size * blocks - d_vocab)).view(size, -1).amax(0) for of in (fixed, reach)
    ]
    ids, upper, outside = triton_kernels.select(
        scores,
        d_vocab,
        extremes,
        (fixed, of_blocks[0]),
        (reach, of_blocks[1]),
        length,
        lost,
        named,
        count,
        rounding,
        underflow,
    )
    of_tokens = signed[..., :d_vocab]
    bounds = of_tokens + of_tokens.abs() * rounding + underflow + length * fixed + lost * reach
    bounds = bounds.masked_fill(~able[:d_vocab], -math.inf)
    torch.testing.assert_close(bounds.gather(-1, ids), upper)
    assert (upper.diff() <= 0).all() and all(len(set(row)) == count for row in ids.flatten(0, 1).tolist())
    rest = bounds.scatter(-1, ids, -math.inf).amax(-1, keepdim=True)
    assert (rest <= outside + 1e-5).all()
    of_block = extremes + extremes.abs() * rounding + underflow + length * of_blocks[0] + lost * of_blocks[1]
    looked_into = torch.zeros(2, n, blocks, dtype=torch.bool).scatter(-1, of_block.topk(count).indices, True)
    within = bounds.masked_fill(~looked_into[..., torch.arange(d_vocab) % blocks], -math.inf)
    torch.testing.assert_close(upper, within.topk(count).values)


@needs_triton
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_triton_scores_pairs_as_torch_does(dtype, transposed):
    from tl_flash.kernel import triton_kernels

    x, W_U, _ = draw(7, 300, 900, dtype=dtype)
    held = W_U.T.contiguous().T if transposed else W_U
    ids = torch.randint(900, (7, 37))
    expected = (x.double() @ W_U.double()).gather(1, ids)
    ids[2, 5:9] = -1
    expected[2, 5:9] = -math.inf
    torch.testing.assert_close(triton_kernels.exact_scores(x.double(), ids, held), expected, rtol=1e-12, atol=1e-12)


@needs_triton
@pytest.mark.parametrize("held_by_token", [False, True])
@pytest.mark.parametrize("d_vocab", [1500, 5000])  # of these many blocks the candidates are selected in one kernel
@pytest.mark.parametrize("low", LOW)
@pytest.mark.parametrize("score", ["dot", "cosine"])
def test_decode_through_triton(low, score, d_vocab, held_by_token, monkeypatch):
    x, W_U, gain = draw(6, 40, d_vocab)
    unembedding = prepare(W_U, gain=gain, score=score, low=low, ignore=[4])
    plain = decode(x, unembedding)
    if held_by_token:
        unembedding.hold_by_token()
    for module in (kernel_plan, kernel_rescore, kernel_tiles):
        monkeypatch.setattr(module, "has_triton", lambda device: True)
    through_triton = decode(x, unembedding)
    assert torch.equal(through_triton.ids, plain.ids)
    assert torch.equal(through_triton.logits, plain.logits)
    right = truth(x, W_U, gain=gain, score=score)
    for name in STATISTICS[1:]:
        loose = low and name in ("log_z", "kurtosis")
        got, expected = getattr(through_triton, name), getattr(right if loose else plain, name)
        tolerances = {"rtol": 1e-3, "atol": 1e-3} if loose else {"rtol": 1e-5, "atol": 1e-5}
        torch.testing.assert_close(got, expected, equal_nan=True, **tolerances)


@needs_triton
@pytest.mark.filterwarnings("ignore:All-NaN|invalid value:RuntimeWarning")  # numpy's, which stands for the device
def test_through_triton_many_tokens_broken_rows_and_none(monkeypatch):
    x, W_U, _ = draw(4, 40, 5000)
    u, plain = prepare(W_U, low=torch.float16), decode(x, prepare(W_U), k=200)
    for module in (kernel_plan, kernel_rescore, kernel_tiles):
        monkeypatch.setattr(module, "has_triton", lambda device: True)
    assert torch.equal(decode(x, u, k=200).ids, plain.ids), "more candidates than one kernel takes"
    few, right = decode(x, prepare(W_U, low=torch.float16, ignore=range(4990)), k=5), truth(x, W_U)
    assert few.ids.min() >= 4990 and (few.kurtosis - right.kurtosis).abs().max() < 1e-3, "most may not be named"
    torch.testing.assert_close(few.log_z, right.log_z, rtol=0, atol=1e-3)
    assert decode(x[:0], u).ids.shape == (2, 0, 10)
    x[1, 3] = math.nan
    with pytest.raises(ValueError, match="row 1"):
        decode(x, u)
    from tl_flash.kernel import triton_kernels

    assert triton_kernels.exact_scores(x.double(), torch.empty(4, 0, dtype=torch.int64), W_U).shape == (4, 0)


def test_halves_hold_a_number():
    x = torch.nn.functional.normalize(torch.randn(50, 300), dim=1)
    high, low = halves(x)
    assert high.dtype == low.dtype == torch.float16
    assert (((high.double() + low.double()) / HALVES_UNIT - x).abs().amax(1) <= 2**-20 * x.abs().amax(1)).all()


# What is kept, what few directions cost -------------------------------------------------------------------------------


@pytest.mark.parametrize("by_token", [False, True])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("n", [1, 3, 70])
def test_an_unembedding_that_was_not_measured_before(n, dtype, by_token):
    x, W_U, gain = draw(n, 48, 1300, dtype=dtype)
    W_U = W_U.T.contiguous().T if by_token else W_U
    unembedding = prepare(W_U, gain=gain, centre=True, keep=False)
    assert not unembedding.measured
    ours, usual = decode(x, unembedding, tracked=[3]), decode(x, prepare(W_U, gain=gain, centre=True), tracked=[3])
    assert unembedding.measured and torch.equal(ours.ids, usual.ids)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(ours, name), getattr(usual, name), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("by_token", [False, True])
def test_few_directions_see_what_no_version_counts(by_token, score):
    x, W_U, _ = draw(3, 48, 1300)
    prepare = partial(kernel.prepare, score=score)
    W_U = W_U.T.contiguous().T if by_token else W_U
    first = prepare(W_U, keep=False)
    decode(x, first)
    assert prepare(W_U, keep=False).measures is first.measures, "found again"

    def scaled(W):
        W.mul_(3)

    def moved(W):
        W[:, 5] += 4

    for change in (scaled, moved):
        change(W_U.data)
        ours, fresh = decode(x, prepare(W_U, keep=False)), decode(x, prepare(W_U.clone(), keep=False))
        assert torch.equal(ours.ids, fresh.ids)
        for name in STATISTICS:
            got, expected = getattr(ours, name), getattr(fresh, name)
            torch.testing.assert_close(got, expected, rtol=2e-6, atol=2e-6, equal_nan=True)
    W_U.data[7, 9] = math.nan
    with pytest.raises(ValueError, match="W_U: expected finite weights"):
        decode(x, prepare(W_U, keep=False))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("by_token", [False, True])
def test_weights_that_are_not_finite_are_refused_by_the_first_decode(value, by_token):
    W_U = with_value((8, 50), value, (1, 2))
    unmeasured = prepare(W_U.T.contiguous().T if by_token else W_U, keep=False)
    with pytest.raises(ValueError, match="W_U: expected finite weights"):
        decode(X, unmeasured)


@pytest.mark.parametrize("scale", [1e-29, 1e-20, 1e-11, 1e11, 1e20, 1e29])
@pytest.mark.parametrize("keep", [False, True])
def test_lengths_far_from_one_are_measured_all_the_same(scale, keep):
    x, W_U, _ = draw(3, 40, 700)
    W_U[:, :650] *= 1e-3
    W_U = W_U * scale
    unembedding = prepare(W_U, keep=keep)
    decode(x, unembedding)
    lengths = W_U.double().norm(dim=0)
    reach = unembedding.measures.reach.double()
    assert (reach >= lengths).all() and (reach <= 1.0001 * lengths + 1e-17).all()
    assert_same_tokens(decode(x, unembedding), x, W_U)


def test_what_was_found_of_an_unembedding_is_found_again_while_it_is_as_it_was():
    kernel.forget()
    W_U, held = torch.randn(40, 600), kernel.held_bytes()
    found = prepare(W_U)
    assert kernel.held_bytes() - held == found.held_bytes > 0
    assert prepare(W_U).measures is found.measures, "found again"
    assert prepare(W_U.T.contiguous().T).measures is not found.measures, "another"
    W_U[3, 5] += 1
    after = prepare(W_U)
    assert after.measures is not found.measures, "changed"
    W_U.data[7, 9] -= 1  # which no version counts
    again = prepare(W_U)
    assert again.measures is not after.measures
    torch.testing.assert_close(again.mean_column, W_U.double().mean(1))
    assert prepare(W_U, score="cosine").column_scale is not None and prepare(W_U).column_scale is None
    del found, after, again, W_U
    assert kernel.held_bytes() == held, "no longer than the weights"


def test_few_directions_are_screened_in_float32_without_a_copy(monkeypatch):
    monkeypatch.setattr(kernel_unembedding, "screened_in", lambda W_U: torch.bfloat16)
    x, W_U, _ = draw(400, 256, 4100)
    kernel.forget()
    unembedding = kernel.prepare(W_U)
    decode(x[:100], unembedding)
    assert unembedding.held_bytes < W_U.nbytes / 20
    many = decode(x, unembedding)
    assert unembedding.held_bytes > W_U.nbytes / 2
    assert_same_tokens(many, x, W_U)


# The accuracy of statistics -------------------------------------------------------------------------------------------


def unlike_rows(d_model, d_vocab):
    """An unembedding like trained ones, in which a few directions spread most and many columns are next to the same.

    And directions: peaked ones (columns), flat ones, heavy-tailed, along the columns that are the same, huge and tiny.
    """
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(d_model, d_model, generator=generator) * torch.linspace(4, 0.2, d_model).square()
    W_U = (torch.randn(d_vocab, d_model, generator=generator) @ spread.T).T / d_model
    W_U[:, 100:200] = W_U[:, 100:101] + 1e-3 * torch.randn(d_model, 100, generator=generator)
    flat = torch.linalg.eigh(W_U @ W_U.T).eigenvectors
    noise = torch.randn(d_model, 16, generator=generator)
    rows = [
        W_U[:, 1000:1016],
        flat[:, :16],
        flat[:, -16:],
        noise,
        noise.pow(5),
        W_U[:, 100:116],
        W_U[:, 5:9] - noise[:, :4],
    ]
    x = torch.cat(rows, dim=1).T.contiguous()
    return torch.cat([x, 1e12 * x[::9], 1e-12 * x[::9]]), W_U


@pytest.mark.parametrize("factor", [0.3, 3.0, 12.0])
def test_statistics_of_a_bf16_screen_are_those_of_float64_on_every_row(factor):
    x, W_U = unlike_rows(256, 6000)
    W_U = factor * W_U / W_U.std() / 16
    ours, right = decode(x, prepare(W_U, low=torch.bfloat16)), truth(x, W_U)
    assert torch.equal(ours.ids, right.ids) or ours.ids.ne(right.ids).float().mean() < 0.02, "but for ties"
    assert (ours.log_z - right.log_z).abs().max() < 1e-3
    assert (ours.std / right.std - 1).abs().max() < 1e-5
    assert ((ours.kurtosis - right.kurtosis) / (right.kurtosis.abs() + 1)).abs().max() < 1e-3


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_that_are_rounded_alike_do_not_show(dtype, score):
    """A third of the vocabulary is next to the same, as tokens are that training never saw."""
    x, W_U, _ = draw(200, 256, 6000)
    W_U[:, 1000:3000] = W_U[:, :1] + 0.03 * W_U[:, 1000:3000]
    x[:100] += 0.2 * W_U[:, 0] * x[:100].norm(dim=1, keepdim=True) / W_U[:, 0].norm()
    W_U = W_U.to(dtype)
    unembedding = prepare(W_U, low=torch.bfloat16, score=score)
    ours, right = decode(x, unembedding), truth(x, W_U, score=score)
    assert unembedding.alike.ids.flatten().tolist() == list(range(1024, 2944)), "whole runs of 128"
    assert ((ours.kurtosis - right.kurtosis) / (right.kurtosis.abs() + 1)).abs().max() < 1e-3
    assert score == "cosine" or (ours.log_z - right.log_z).abs().max() < 1e-3
    assert prepare(draw(1, 256, 6000)[1]).alike is None


def test_tokens_that_are_exact_already_are_not_moved():
    """A run of alike tokens, most of them at the top: what they are moved by does not count twice."""
    x, W_U, _ = draw(40, 256, 6000)
    W_U[:, 1024:1152] = 2 * W_U[:, :1] + 1e-3 * W_U[:, 1024:1152]
    x += 0.2 * W_U[:, 0] * x.norm(dim=1, keepdim=True) / W_U[:, 0].norm()
    W_U = W_U.bfloat16()
    ours, right = decode(x, prepare(W_U, low=torch.bfloat16), k=128), truth(x, W_U, k=128)
    assert (ours.ids[0] // 128 == 8).float().mean() > 0.8
    assert ((ours.kurtosis - right.kurtosis) / (right.kurtosis.abs() + 1)).abs().max() < 1e-3
    assert (ours.log_z - right.log_z).abs().max() < 1e-3


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_tokens_are_found_alike_whatever_the_scale_of_W_U(scale):
    _, W_U, _ = draw(1, 256, 6000)
    W_U[:, 1000:3000] = W_U[:, :1] + 0.03 * W_U[:, 1000:3000]
    assert prepare(W_U * scale).alike.ids.flatten().tolist() == list(range(1024, 2944))
    assert prepare(draw(1, 8, 100)[1]).alike is None, "fewer tokens than a run has"


@pytest.mark.parametrize("score", ["dot", "cosine"])
@pytest.mark.parametrize("low", LOW)
def test_a_token_that_is_ignored_counts_however_great(low, score):
    x, W_U, _ = draw(64, 256, 6000)
    W_U[:, 7] *= 12
    x[:32] += 3 * W_U[:, 7] / W_U[:, 7].norm()
    ours, right = decode(x, prepare(W_U, low=low, ignore=[7], score=score)), truth(x, W_U, ignore=[7], score=score)
    assert torch.equal(ours.ids, right.ids)
    assert score == "cosine" or (ours.log_z - right.log_z).abs().max() < 1e-3
    assert ((ours.kurtosis - right.kurtosis) / (right.kurtosis.abs() + 1)).abs().max() < 1e-3
    if score == "dot":
        unproven = decode(x, prepare(W_U, low=low, ignore=[7], precision="fast"))
        assert ((unproven.log_z - right.log_z).abs() <= 2**-7 * right.log_z.abs()).all(), "what bf16 rounds away"
