"""Writes a GGUF llama checkpoint as a Hugging Face folder of bf16: `twin.py MODEL.gguf FOLDER`.

Runs in the environment of transformers, which loads GGUF files but does not save what it loaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


def rotary_halves(weight: np.ndarray, heads: int) -> np.ndarray:
    """GGUF interleaves the two halves of each head's rotary rows; put them back one by one."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, -1)


def main() -> None:
    source, folder = Path(sys.argv[1]).resolve(), Path(sys.argv[2])
    reader = gguf.GGUFReader(source)

    def field(name: str) -> object:
        return reader.fields[name].contents()

    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    names = {tensor.name for tensor in reader.tensors}
    config = LlamaConfig(
        vocab_size=len(field("tokenizer.ggml.tokens")),
        hidden_size=field("llama.embedding_length"),
        intermediate_size=field("llama.feed_forward_length"),
        num_hidden_layers=field("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=field("llama.embedding_length") // heads,
        max_position_embeddings=field("llama.context_length"),
        rms_norm_eps=round(float(field("llama.attention.layer_norm_rms_epsilon")), 12),
        rope_parameters={"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=field("tokenizer.ggml.bos_token_id"),
        eos_token_id=field("tokenizer.ggml.eos_token_id"),
        pad_token_id=field("tokenizer.ggml.padding_token_id"),
        dtype="bfloat16",
    )
    state = {}
    for tensor in reader.tensors:
        value = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        parts = tensor.name.split(".")
        if parts[0] == "blk":
            name = f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"
            if parts[2] in ("attn_q", "attn_k"):
                value = rotary_halves(value, heads if parts[2] == "attn_q" else kv_heads)
        else:
            name = f"{OUTSIDE[parts[0]]}.{parts[1]}"
        state[name] = torch.from_numpy(np.ascontiguousarray(value)).to(torch.bfloat16)
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    lacking = [name for name in missing if not (config.tie_word_embeddings and "lm_head" in name)]
    if lacking or unexpected:
        raise SystemExit(f"missing {lacking}, unexpected {unexpected}")
    model.tie_weights()
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    print(sorted(path.name for path in folder.iterdir()))


if __name__ == "__main__":
    main()
