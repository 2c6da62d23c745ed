"""The transformer block of chapter 06a computes what the Llama layer of `transformers` does."""
import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from hclm_repro.transformer import Block, attention, turn_heads, turns
from hclm_repro.model import randomise

UNITS, HEADS, HIDDEN, POSITIONS = 64, 4, 96, 11


def pair(kv_heads):
    "Our block and theirs, with the same weights."
    ours = randomise(Block(UNITS, HEADS, HIDDEN, kv_heads))
    config = LlamaConfig(hidden_size=UNITS, intermediate_size=HIDDEN, num_attention_heads=HEADS,
                         num_key_value_heads=kv_heads, rms_norm_eps=1e-6, attn_implementation='eager')
    theirs = LlamaDecoderLayer(config, 0)
    reads, mlp = theirs.self_attn, theirs.mlp
    width = UNITS // HEADS
    q, k, v = ours.qkv.weight.split([UNITS, kv_heads * width, kv_heads * width])
    gate, up = ours.gate_up.weight.chunk(2)
    copies = {reads.q_proj: q, reads.k_proj: k, reads.v_proj: v, reads.o_proj: ours.out.weight,
              mlp.gate_proj: gate, mlp.up_proj: up, mlp.down_proj: ours.down.weight,
              theirs.input_layernorm: ours.attention_norm.weight, theirs.post_attention_layernorm: ours.norm.weight}
    with torch.no_grad():
        for module, weight in copies.items(): module.weight.copy_(weight)
    return ours, theirs, LlamaRotaryEmbedding(config)


@pytest.mark.parametrize('kv_heads', [4, 2, 1])
def test_block_is_llamas(kv_heads):
    ours, theirs, rotary = pair(kv_heads)
    positions = torch.arange(POSITIONS)
    turn = turns(positions, UNITS // HEADS, torch.float32)
    attend = lambda qkv: attention(*turn_heads(qkv, kv_heads, turn), is_causal=True)
    mask = torch.full((POSITIONS, POSITIONS), torch.finfo(torch.float32).min).triu(1)[None, None]
    x = torch.randn(2, POSITIONS, UNITS)
    sides = []
    for run in (lambda x: ours(x, attend),
                lambda x: theirs(x, attention_mask=mask, position_embeddings=rotary(x, positions[None]))):
        inputs = x.clone().requires_grad_()
        outputs = run(inputs)
        outputs.square().sum().backward()
        sides.append((outputs, inputs.grad))
    for a, b in zip(*sides): torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())
    assert (sides[0][0] - x).abs().mean() > 0.1   # the layer does something
