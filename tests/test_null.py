"""Which null draws are decoded, and what they say of all."""

import pytest
import torch

from tl_flash.decode.null import NULL_DRAWS, null_of, shuffled_rows, to_decode
from tl_flash.kernel import decode, extreme_tokens, greatest_z, prepare, reference_decode, widest_tokens

D, V = 24, 800


def unembedding(seed, longest=1.0, **how):
    """A twentieth of the columns as much longer than the others."""
    generator = torch.Generator().manual_seed(seed)
    W_U = torch.randn(D, V, generator=generator)
    W_U[:, ::20] *= longest
    return prepare(W_U, **how)


def draws(seed):
    """Shuffled directions, some of whose coordinates have heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3000, D, generator=generator)
    x[:, :4] = x[:, :4] ** 3
    return x.gather(0, shuffled_rows(len(x), D, seed=seed).long())


def top_z(x, u):
    read = decode(x, u, k=1)
    return read.logits[..., 0] / read.std


@pytest.mark.parametrize("longest", [1.0, 3.0])
def test_the_share_beyond_a_bar_is_estimated_without_bias(longest):
    u, shares = unembedding(0, longest), []
    bar = torch.cat([top_z(draws(seed), u).flatten() for seed in range(40)]).quantile(0.99)
    for seed in range(100, 180):
        z = null_of(decode(to_decode(draws(seed), u), u, k=1))["null.z"]
        assert z.shape == (2 * NULL_DRAWS,) and torch.equal(z, z.sort().values)
        shares.append(float((z > bar).float().mean()))
    shares = torch.tensor(shares)
    error = float(shares.std() / len(shares) ** 0.5)
    assert abs(float(shares.mean()) - 0.01) < 4 * error < 0.01


def test_where_few_tokens_hold_the_tail_all_of_it_is_found():
    u = unembedding(0, 3.0)
    for seed in range(5):
        x = draws(seed)
        some = null_of(decode(to_decode(x, u), u, k=1))["null.z"]
        assert torch.equal(some[-10:], top_z(x, u).flatten().sort().values[-10:])


def test_of_cosines_all_are_decoded():
    u = unembedding(0, 3.0, score="cosine")
    assert to_decode(draws(0), u).shape == (NULL_DRAWS, D)
    with pytest.raises(ValueError, match="cosine"):
        greatest_z(draws(0), torch.arange(3), u)


def test_the_widest_tokens_are_those_whose_scores_are_spread_most():
    x, u = draws(0), unembedding(0, 3.0, gain=torch.rand(D) + 0.1, ignore=[0, 10])
    W = u.W_U - u.W_U.mean(1, keepdim=True)
    spread = ((x.square().mean(0) * u.gain.float().square()) @ W.square()).index_fill_(0, u.ignored, -1)
    assert torch.equal(widest_tokens(x, 50, u), spread.topk(50).indices.sort().values)
    assert len(widest_tokens(x, V, u)) == V - 2
    for scale in (1e-25, 1e25):
        scaled = prepare(u.W_U * scale, gain=u.gain, ignore=[0, 10])
        assert torch.equal(widest_tokens(x, 50, scaled), widest_tokens(x, 50, u)), "nothing over- or underflows"


def test_the_extreme_tokens_are_those_of_single_coordinates():
    u = unembedding(0, ignore=[7, 20])
    expected = {t for row in u.W_U for t in (row[u.reportable].argmax(), row[u.reportable].argmin())}
    tokens = u.reportable.nonzero()[:, 0]
    assert extreme_tokens(u).tolist() == sorted({int(tokens[t]) for t in expected})


def test_draws_that_one_coordinate_carries_are_found():
    """Their top token is a narrow one, far out in that coordinate, in which the wide ones are not."""
    generator = torch.Generator().manual_seed(0)
    W_U = torch.randn(D, V, generator=generator)
    W_U[:, ::20] *= 3
    W_U[10] *= 0.2
    W_U[10, ::20] = 0
    W_U[:, 11] *= 0.05
    W_U[10, 11] = 3
    x = torch.randn(3000, D, generator=generator)
    x[5:14, 10] = 60
    u, x = prepare(W_U), x.gather(0, shuffled_rows(len(x), D, seed=3).long())
    every, some = top_z(x, u).flatten().sort().values, null_of(decode(to_decode(x, u), u, k=1))["null.z"]
    carried = (x[:, 10] == 60).nonzero()[:, 0]
    assert len(carried) and carried.min() > 100, "none is of the sample"
    assert 11 not in widest_tokens(x, V // 32, u)
    assert torch.equal(some[-len(carried) :], every[-len(carried) :])


@pytest.mark.parametrize("centre", [False, True])
def test_the_greatest_z_is_that_of_the_plain_definition(centre):
    u, x = unembedding(0, gain=torch.rand(D) + 0.1, centre=centre), draws(1)[:50]
    x[3] = 0
    ids = torch.arange(0, V, 7)
    read = reference_decode(x, u.W_U, k=1, gain=u.gain, centre=centre, tracked=ids)
    expected = (read.tracked / read.std[:, None]).abs().amax(1).nan_to_num(0)
    torch.testing.assert_close(greatest_z(x, ids, u), expected, rtol=1e-4, atol=1e-5)
