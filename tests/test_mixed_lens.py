import pytest
import torch

from tl_flash import jacobian_lens
from tl_flash.lens.estimate import Estimate
from tl_flash.lens.mixed import Metric, mix
from tl_flash.weights import read

TOKENS = torch.randint(2, 72, (12, 14), generator=torch.Generator().manual_seed(0))
D = 160


def noisy(truth, size, seed):
    generator = torch.Generator().manual_seed(seed)
    return truth + size * torch.randn(D, D, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("bias", "noise"), [(0.3, 0.3), (0.1, 1.0), (1.0, 0.1), (0.5, 2.0)])
def test_the_weights_are_those_that_the_truth_would_choose(bias, noise):
    """Of a lens that is wrong in one way and two that are wrong by chance; the metric knows no truth."""
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(2, D, D, generator=generator, dtype=torch.float64)
    metric = Metric(A @ A.T / D, B @ B.T / D)
    truth = torch.randn(D, D, generator=generator, dtype=torch.float64)
    field, a, b = noisy(truth, bias, 2), noisy(truth, noise, 3), noisy(truth, noise, 4)
    found = metric.weights(field, a, b)
    parts = [field, (a + b) / 2]
    gram = torch.tensor([[metric.product(one, other) for other in parts] for one in parts])
    best = torch.linalg.solve(gram, torch.tensor([metric.product(one, truth) for one in parts]))

    def error(weights):
        left = truth - sum(weight * part for weight, part in zip(weights, parts, strict=True))
        return metric.product(left, left)

    assert error(found) < 1.1 * error(best)
    assert error(found) < 1.02 * min(error((1, 0)), error((0, 1)))


def test_the_metric_is_that_of_what_neurons_do_to_the_logits():
    generator = torch.Generator().manual_seed(0)
    W_U, writes = torch.randn(D, 99, generator=generator), torch.randn(7, D, generator=generator)
    centred = W_U - W_U.mean(1, keepdim=True)
    metric = Metric((centred @ centred.T / 99).double(), (writes.T @ writes).double())
    A, B = torch.randn(2, D, D, generator=generator)
    logits = [writes @ matrix.T @ W_U for matrix in (A, B)]
    each = [logit - logit.mean(1, keepdim=True) for logit in logits]
    assert metric.product(A, B) == pytest.approx(float((each[0] * each[1]).mean(1).sum()), rel=1e-4)


def test_where_both_are_the_same_they_share_the_weight():
    generator = torch.Generator().manual_seed(0)
    field = torch.randn(D, D, generator=generator, dtype=torch.float64)
    metric = Metric(torch.eye(D, dtype=torch.float64), torch.eye(D, dtype=torch.float64))
    assert metric.weights(field, field * (1 + 1e-7), field * (1 - 1e-7)) == pytest.approx((0.5, 0.5), abs=1e-3)


def test_what_both_show_of_the_choice_of_texts_is_taken_off(bridge):
    """Where the exact mean differs between texts as the mean-field lens does, it becomes that of all texts."""
    generator = torch.Generator().manual_seed(0)
    truth, bias = torch.randn(2, 2, 40, 40, generator=generator)
    shifts = [torch.randn(2, 40, 40, generator=generator) for _ in range(2)]

    def estimate(J):
        return Estimate(J, torch.zeros_like(J), 4, 40)

    halves = [estimate(truth + 1.5 * shift) for shift in shifts]
    fields = [estimate(truth + 0.1 * bias + shift) for shift in shifts]
    made = mix(read(bridge), [0, 1], estimate(truth + 0.1 * bias), halves, fields)
    for layer in (0, 1):
        assert float((made.J[layer] - truth[layer]).norm() / truth[layer].norm()) < 0.02


def test_it_is_a_sum_of_the_other_two(bridge):
    lens = jacobian_lens(bridge, TOKENS, method="mixed", exact_prompts=4)
    some = TOKENS[[0, 3, 6, 9]]
    parts = [jacobian_lens(bridge, TOKENS), jacobian_lens(bridge, some), jacobian_lens(bridge, some, method="exact")]
    for layer in (0, 1):
        columns = torch.stack([part.at(layer).flatten() for part in parts], dim=1)
        weights = torch.linalg.lstsq(columns, lens.at(layer).flatten()[:, None], driver="gelsd").solution
        assert torch.allclose((columns @ weights)[:, 0], lens.at(layer).flatten(), atol=1e-5)
    assert lens.source.method == "mixed" and lens.source.prompts == 12 and lens.stderr.isfinite().all()


def test_too_few_prompts_are_refused(bridge):
    for n in (1, 13):
        with pytest.raises(ValueError, match="exact_prompts: expected 2 to 12"):
            jacobian_lens(bridge, TOKENS, method="mixed", exact_prompts=n)


def test_options_that_would_not_be_used_are_refused(bridge):
    for method in ("mean_field", "exact"):
        with pytest.raises(ValueError, match='exact_prompts: it is for method="mixed"'):
            jacobian_lens(bridge, TOKENS, method=method, exact_prompts=8)
    with pytest.raises(ValueError, match="chat: it is for prompts of your own"):
        jacobian_lens(bridge, chat=True)
