"""Write a trained model as a checkpoint that transformers, and all that read its layout, can load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from llama import Llama
from safetensors.torch import save_file
from vocabulary import ASSISTANT_TEMPLATE, BASE_TEMPLATE, BOS_ID, EOS_ID, write_settings

CONTEXT = 512  # positions a checkpoint accepts; it was trained on 128
SHIPPED = ("base", "base-aligned", "guide", "guide-base", "guide-sp")


def export(name: str, model: Llama, tokenizer: Path, out: Path) -> None:
    """Write `out/name`, replacing what was there; stages that only prepare others are not shipped."""
    if name not in SHIPPED:
        return
    folder = out / name
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.to("cpu", torch.bfloat16).contiguous() for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write(folder / "config.json", model.size.config(CONTEXT))
    _write(
        folder / "generation_config.json",
        {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "do_sample": False},
    )
    shutil.copyfile(tokenizer, folder / tokenizer.name)
    write_settings(
        folder,
        template=BASE_TEMPLATE if name in ("base", "guide-base") else ASSISTANT_TEMPLATE,
        pieces=tokenizer.suffix == ".model",
        context=CONTEXT,
    )


def _write(path: Path, settings: dict[str, object]) -> None:
    path.write_text(json.dumps(settings, indent=2) + "\n")
