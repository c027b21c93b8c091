"""Write a tiny random Llama model as a GGUF file: half a megabyte, no download, nonsense answers, real llama.cpp.

Run it as `python tests/support/tiny_model.py tiny.gguf`. Needs the packages numpy and gguf.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

WIDTH = 64
HIDDEN = 128
LAYERS = 2
HEADS = 4
CONTEXT = 2048
FIRST_BYTE_TOKEN = 3
FIRST_WORD = FIRST_BYTE_TOKEN + 256
WORDS = (
    *("\u2581hello", "\u2581world", "\u2581the", "\u2581a", "\u2581model", "\u2581tiny", "\u2581is"),
    *("\u2581and", "\u2581of", "\u2581to", ".", ",", "\u2581"),
    *"abcdefghijklmnopqrstuvwxyz",
)
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def vocabulary(types: Any) -> tuple[list[bytes], list[int]]:
    """Return tokens and their types: three specials, 256 byte fallbacks, a few words, padding to a multiple of 32."""
    tokens = [b"<unk>", b"<s>", b"</s>", *(f"<0x{byte:02X}>".encode() for byte in range(256)), *(word.encode() for word in WORDS)]
    kinds = [types.UNKNOWN, types.CONTROL, types.CONTROL, *[types.BYTE] * 256, *[types.NORMAL] * len(WORDS)]
    padding = -len(tokens) % 32
    tokens += [f"[PAD{number}]".encode() for number in range(padding)]
    kinds += [types.UNUSED] * padding
    return tokens, [int(kind) for kind in kinds]


def write_tiny_model(path: Path, *, seed: int = 0) -> Path:
    """Write the model to `path` (complete or not at all) and return the path."""
    gguf: Any = importlib.import_module("gguf")
    numpy: Any = importlib.import_module("numpy")
    draw = numpy.random.default_rng(seed)

    def weights(*shape: int) -> Any:
        return (draw.standard_normal(shape) * 0.05).astype(numpy.float32)

    def ones() -> Any:
        return numpy.ones(WIDTH, numpy.float32)

    tokens, kinds = vocabulary(gguf.TokenType)
    partial = path.with_name(f"{path.name}.{os.getpid()}.part")
    writer = gguf.GGUFWriter(str(partial), "llama")
    writer.add_name("tiny-random")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0 if index < FIRST_WORD else -float(index) for index in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)

    writer.add_tensor("token_embd.weight", weights(len(tokens), WIDTH))
    writer.add_tensor("output_norm.weight", ones())
    output = weights(len(tokens), WIDTH)
    output[:FIRST_WORD] *= 0.1  # seldom a raw byte, which may be half a character
    output[FIRST_WORD + 13 : FIRST_WORD + len(WORDS)] *= 4
    output[2] *= 0  # seldom the end token, so that max_tokens decides the length
    writer.add_tensor("output.weight", output)
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            writer.add_tensor(f"{block}.{name}.weight", weights(WIDTH, WIDTH))
        writer.add_tensor(f"{block}.ffn_gate.weight", weights(HIDDEN, WIDTH))
        writer.add_tensor(f"{block}.ffn_up.weight", weights(HIDDEN, WIDTH))
        writer.add_tensor(f"{block}.ffn_down.weight", weights(WIDTH, HIDDEN))
        writer.add_tensor(f"{block}.attn_norm.weight", ones())
        writer.add_tensor(f"{block}.ffn_norm.weight", ones())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return partial.replace(path)


if __name__ == "__main__":
    print(write_tiny_model(Path(sys.argv[1] if len(sys.argv) > 1 else "tiny.gguf")))
