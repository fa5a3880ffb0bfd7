"""A model that was changed after its class made it is read as it is, or refused: its norms, its head, its wrappers."""

import pytest
import torch
import transformers
from torch import nn

from tests import classes
from tl_flash import weights
from tl_flash.weights.calls import Call, Unreadable
from tl_flash.weights.norms import logit_factor, nearer_factor, traced_final_norm
from tl_flash.weights.seen_norms import as_norm


def llama(**changes):
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**classes.TINY | changes)).eval()


class Doubled(nn.Module):
    """A wrapper that passes its norm's weight on, and does something else."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    @property
    def weight(self):
        return self.norm.weight

    def forward(self, x):
        return 2 * self.norm(x)


# Norms


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("other", [lambda norm: nn.LayerNorm(32), Doubled], ids=["LayerNorm", "wrapper"])
def test_a_norm_that_was_replaced_is_refused(other, dtype):
    model = llama()
    layer = model.model.layers[1]
    layer.post_attention_layernorm = other(layer.post_attention_layernorm)
    read = weights.read(model.to(dtype))
    assert read.layer(0).gain_pre is not None
    with pytest.raises(ValueError, match=r"layers\.1\.post_attention_layernorm: .* not the RMSNorm.*module replaced"):
        read.layer(1)


def test_a_final_norm_that_was_replaced_is_refused():
    model = llama()
    model.model.norm = Doubled(model.model.norm)
    with pytest.raises(ValueError, match=r"model\.norm: a Doubled that is not the RMSNorm"):
        weights.read(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_norm_with_another_weight_is_read(dtype):
    model = llama().to(dtype)
    weight = model.model.layers[1].post_attention_layernorm.weight.data.normal_()
    assert torch.equal(weights.read(model).layer(1).gain_pre, weight.float())


class Constant(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return self.factor * nn.functional.rms_norm(x, x.shape[-1:])


@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_norm_without_a_weight_scales_by_one_or_is_refused(factor):
    x = torch.randn(1, 4, 32, dtype=torch.float64)
    norm = as_norm(Call("ln", Constant(factor), x, x, 0, ((x,), {})))
    if factor == 1:
        assert norm.named("").weight is None
    else:
        with pytest.raises(Unreadable, match="scales by something else than its weight"):
            norm.named("")


# Heads


class Louder(transformers.LlamaForCausalLM):
    def forward(self, *args, **kwargs):
        answer = super().forward(*args, **kwargs)
        answer.logits = 3 * answer.logits
        return answer


def test_logits_that_are_not_the_heads_answer_are_refused():
    model = Louder(transformers.LlamaConfig(**classes.TINY)).eval()
    with pytest.raises(ValueError, match="Louder's logits are not what its unembedding answers"):
        traced_final_norm(model, model.lm_head)


def test_a_softcap_is_no_other_answer():
    model = transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**classes.TINY, head_dim=8, final_logit_softcapping=2.0)
    ).eval()
    gain, centre = traced_final_norm(model, model.lm_head)
    assert not centre
    torch.testing.assert_close(gain, 1 + model.model.norm.weight.detach())


def test_a_factor_is_told_in_half_precision_and_no_third_is_taken():
    answer = torch.randn(4, 500).bfloat16()
    seen = logit_factor(answer * 0.0625, answer)
    assert nearer_factor(seen, 1.0, 0.0625) == 0.0625
    with pytest.raises(ValueError, match="multiplies its unembedding's answer by 0.0625; expected 1 or 0.5"):
        nearer_factor(seen, 1.0, 0.5)


@pytest.mark.parametrize("kind", ["TokenClassification", "SequenceClassification"])
def test_a_classifier_is_refused_however_it_is_given(kind, tmp_path):
    config = transformers.LlamaConfig(**classes.TINY, pad_token_id=1)
    model = getattr(transformers, f"LlamaFor{kind}")(config).eval()
    model.save_pretrained(tmp_path)
    for given in (model, tmp_path):
        for read in (weights.read, weights.layout):
            with pytest.raises(ValueError, match=f"LlamaFor{kind}: it has no unembedding"):
                read(given)


# Wrappers


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_model_has_the_layout_of_its_model():
    model = llama()
    assert weights.layout(torch.compile(model)) == weights.layout(model)
    assert weights.layout(model).readable == [0, 1]


# Experts in a list


class Expert(nn.Module):
    def __init__(self, d_model, d_mlp):
        super().__init__()
        self.up, self.gate, self.down = (
            nn.Linear(d_model, d_mlp),
            nn.Linear(d_model, d_mlp),
            nn.Linear(d_mlp, d_model),
        )

    def forward(self, x):
        return self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class ListMLP(nn.Module):
    """Experts in a list, of which each token passes one."""

    def __init__(self, d_model, widths):
        super().__init__()
        self.router = nn.Linear(d_model, len(widths))
        self.experts = nn.ModuleList(Expert(d_model, width) for width in widths)

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        out = torch.zeros_like(rows)
        odds = self.router(rows).softmax(-1)
        for at, expert in enumerate(self.experts):
            chosen = (odds.argmax(-1) == at).nonzero().flatten()
            out.index_add_(0, chosen, odds[chosen, at, None] * expert(rows[chosen]))
        return out.view_as(x)


class ListModel(transformers.LlamaForCausalLM):
    widths = (24, 24, 24, 24, 24, 24)

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListMLP(config.hidden_size, self.widths)


class UnlikeModel(ListModel):
    widths = (24, 24, 24, 24, 24, 40)


def test_experts_in_a_list_are_read_also_those_that_the_trace_did_not_run():
    torch.manual_seed(0)
    model = ListModel(transformers.LlamaConfig(**classes.TINY)).eval()
    read = weights.read(model).layer(1)
    experts = model.model.layers[1].mlp.experts
    assert read.n_experts == 6
    assert torch.equal(torch.cat(read.W_in), torch.cat([expert.up.weight for expert in experts]))
    assert torch.equal(torch.cat(read.W_gate), torch.cat([expert.gate.weight for expert in experts]))
    assert torch.equal(torch.cat(read.W_out), torch.cat([expert.down.weight.T for expert in experts]))


def test_experts_in_a_list_that_differ_are_refused_where_one_did_not_run():
    torch.manual_seed(0)
    model = UnlikeModel(transformers.LlamaConfig(**classes.TINY)).eval()
    with pytest.raises(ValueError, match=r"mlp\.experts holds modules that differ, of which .* did not run"):
        weights.read(model)
