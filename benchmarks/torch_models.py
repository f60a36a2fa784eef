"""Exports transformers with random weights; runs where torch and transformers are.

    python benchmarks/torch_models.py FOLDER NAME ...

`benchmarks/exports.py` makes that environment and calls this.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 2000
WIDTH = 512
BATCH, LENGTH = 2, 9
BASE: dict[str, Any] = {"hidden_size": WIDTH, "num_hidden_layers": 4}
HEADS: dict[str, Any] = {"num_attention_heads": 8}
TEXT = ("input_ids", "attention_mask")


class Plain(torch.nn.Module):
    """A model that takes its inputs by place and returns its first output only."""

    def __init__(self, model: torch.nn.Module, inputs: tuple[str, ...], cache: bool):
        super().__init__()
        self.model, self.inputs = model, inputs
        self.more = {"use_cache": False} if cache else {}

    def forward(self, *values: torch.Tensor) -> torch.Tensor:
        given = dict(zip(self.inputs, values, strict=True))
        return self.model(**given, return_dict=False, **self.more)[0]


def bert(attention: str) -> Plain:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        intermediate_size=4 * WIDTH,
        attn_implementation=attention,
        **BASE,
        **HEADS,
    )
    return Plain(transformers.BertModel(config), (*TEXT, "token_type_ids"), False)


def gpt2(attention: str) -> Plain:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=4,
        n_head=8,
        n_positions=512,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation=attention,
    )
    return Plain(transformers.GPT2LMHeadModel(config), TEXT, True)


def llama(attention: str) -> Plain:
    """Two heads of keys and values for eight of queries."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        intermediate_size=1376,
        max_position_embeddings=1024,
        attn_implementation=attention,
        **BASE,
        **HEADS,
    )
    return Plain(transformers.LlamaForCausalLM(config), TEXT, True)


def vit(attention: str) -> Plain:
    config = transformers.ViTConfig(
        intermediate_size=4 * WIDTH,
        num_labels=100,
        attn_implementation=attention,
        **BASE,
        **HEADS,
    )
    return Plain(transformers.ViTForImageClassification(config), ("pixel_values",), False)


def swin(attention: str) -> Plain:
    """Swin-T in full, with ImageNet's 1,000 classes, and its own choice of attention."""
    del attention
    config = transformers.SwinConfig(num_labels=1000)
    model = transformers.SwinForImageClassification(config)
    return Plain(model, ("pixel_values",), False)


MAKERS = {"bert": bert, "gpt2": gpt2, "llama": llama, "vit": vit, "swin": swin}


def example(name: str) -> torch.Tensor:
    """One input; text is (batch, sequence), an image has a free batch."""
    if name == "pixel_values":
        return torch.randn(BATCH, 3, 224, 224)
    if name == "input_ids":
        return torch.randint(0, VOCABULARY, (BATCH, LENGTH))
    fill = torch.ones if name == "attention_mask" else torch.zeros
    return fill(BATCH, LENGTH, dtype=torch.long)


def export(name: str, path: Path) -> None:
    """Export `MODEL-EXPORTER[-ATTENTION]`; exporter: legacy, dynamo or dynamo-raw."""
    maker, _, exporter = name.partition("-")
    sdpa = exporter.endswith("-sdpa")
    exporter = exporter.removesuffix("-sdpa")
    torch.manual_seed(0)
    model = MAKERS[maker]("sdpa" if sdpa else "eager").eval()
    inputs = tuple(example(item) for item in model.inputs)
    axes = {0: "batch", 1: "sequence"} if model.inputs[0] == "input_ids" else {0: "batch"}
    names = {
        "input_names": list(model.inputs),
        "output_names": ["hidden" if maker == "bert" else "logits"],
    }
    with torch.no_grad():
        if exporter == "legacy":
            dynamic = dict.fromkeys((*model.inputs, *names["output_names"]), axes)
            torch.onnx.export(
                model,
                inputs,
                path,
                dynamo=False,
                opset_version=17,
                dynamic_axes=dynamic,
                **names,
            )
            return
        torch.onnx.export(
            model,
            inputs,
            path,
            dynamo=True,
            optimize=exporter == "dynamo",
            dynamic_shapes=(tuple(axes for _ in inputs),),
            external_data=False,
            **names,
        )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for given in sys.argv[2:]:
        made = folder / f".{given}.onnx"
        export(given, made)
        made.rename(folder / f"{given}.onnx")
        print(given, flush=True)
