"""What the benchmarks train."""

import torch
from transformers import Gemma2Config, Gemma2ForCausalLM


def random_decoder(width: int, layers: int, tokens: int) -> Gemma2ForCausalLM:
    """A random Gemma2 decoder, the same at every call, whose layers outweigh its embeddings."""
    torch.manual_seed(0)
    config = Gemma2Config(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=width // 8,
        vocab_size=512,
        max_position_embeddings=tokens,
        attn_implementation="eager",
        use_cache=False,
    )
    return Gemma2ForCausalLM(config).train()
