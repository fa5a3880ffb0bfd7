"""Small models of other families than the embedded pair's, trained here in seconds on its texts."""

from functools import cache

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPTNeoXConfig

from tests import families
from tl_flash import demo

LENGTH, STEPS, BATCH = 40, 200, 16
CONFIGS = {
    "gpt2": GPT2Config(
        n_embd=64,
        n_layer=4,
        n_head=4,
        n_positions=64,
        initializer_range=0.05,
        attn_pdrop=0,
        resid_pdrop=0,
        embd_pdrop=0,
    ),
    "neox": GPTNeoXConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=64,
        initializer_range=0.05,
    ),
}


def tokens(n, seed):
    """Token ids [text, position] of the embedded pair's kind of text."""
    tokenizer = AutoTokenizer.from_pretrained(demo.path("base"))
    rows = [torch.tensor(tokenizer.encode(text)[:LENGTH]) for text in demo.texts(2 * n, seed=seed)]
    return torch.stack([row for row in rows if len(row) == LENGTH][:n])


@cache
def model(name):
    """A TransformerBridge of a model that has learned the most of these texts' words and phrases."""
    if not families.HAS_BRIDGE:
        pytest.skip("TransformerLens 2 has no TransformerBridge")
    from transformer_lens.model_bridge import TransformerBridge

    tokenizer = AutoTokenizer.from_pretrained(demo.path("base"))
    config = CONFIGS[name]
    config.vocab_size, config.bos_token_id, config.eos_token_id = len(tokenizer), 0, 1
    torch.manual_seed(0)
    learner = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    texts = tokens(800, seed=7)
    optimizer = torch.optim.AdamW(learner.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=STEPS)
    for _ in range(STEPS):
        batch = texts[torch.randint(len(texts), (BATCH,))]
        loss = learner(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    assert loss < 4, "that of an untrained model is 7.8"
    learner.config.architectures = [type(learner).__name__]
    return TransformerBridge.boot_transformers(
        f"tiny/{name}", hf_model=learner.eval(), tokenizer=tokenizer, device="cpu"
    )
