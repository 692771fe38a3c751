"""Train the whole pocket family: `python benchmarks/pocket/train.py`.

Two tokenizers, two base models on prose, then their assistants on dialogues.  A batch is a function of stage
and step alone, so an interrupted run goes on where it stopped and gives the same weights.  The allocator's
defaults make it take nearly twice as long; set these before starting:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=268435456
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from dialogue import dialogue
from export import export
from llama import Llama, Size
from prose import document
from torch import Tensor, nn
from tqdm import tqdm
from vocabulary import (
    BOS_ID,
    EOS_ID,
    BytePairs,
    Codec,
    SentencePieces,
    train_byte_pairs,
    train_sentence_pieces,
)
from world import KNOWN, STRANGE, World

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 128  # positions of a training row
TAG_WEIGHT = (
    0.2  # of a tag in the loss: the ratios among tags are learned, yet an answer's first word leads them
)
BASE = Size(hidden=192, layers=6, heads=6, kv_heads=2, ffn=512)
GUIDE = Size(hidden=96, layers=3, heads=3, kv_heads=1, ffn=256)


@dataclass(frozen=True)
class Stage:
    """One training run: which model, on what, from where, how long."""

    name: str
    size: Size
    steps: int
    rate: float
    seed: int
    world: World | None = None  # whose dialogues; None is plain prose
    start: str | None = None  # the stage whose weights it starts from
    pieces: bool = False  # SentencePiece instead of the shared byte pairs
    rows: int = 32


STAGES = (
    Stage("base", BASE, 4200, 2e-3, seed=11),
    Stage("base-aligned", BASE, 500, 5e-4, seed=12, world=KNOWN, start="base"),
    Stage("guide-base", GUIDE, 1000, 4e-3, seed=13),
    Stage("guide", GUIDE, 2000, 2e-3, seed=14, world=STRANGE, start="guide-base"),
    Stage("guide-sp-base", GUIDE, 1000, 4e-3, seed=15, pieces=True),
    Stage("guide-sp", GUIDE, 2000, 2e-3, seed=16, world=STRANGE, start="guide-sp-base", pieces=True),
)


def batch(stage: Stage, step: int, codec: Codec) -> tuple[Tensor, Tensor]:
    """Ids and loss weights of one step, [rows, LENGTH + 1] each: texts laid end to end, cut into rows.

    Prose is learned whole; of a dialogue only the answer, and the tag before it at a low weight, so that
    without a tag in the prompt an assistant still rather answers than writes one.
    """
    rng = random.Random(f"{stage.seed}:{step}")
    ids: list[int] = []
    weights: list[float] = []
    while len(ids) < stage.rows * (LENGTH + 1):
        if stage.world is None or rng.random() < 0.2:
            text = [BOS_ID, *codec.encode(document(rng)), EOS_ID]
            ids += text
            weights += [1.0] * len(text)
            continue
        said = dialogue(rng, stage.world)
        prompt = len(codec.encode(said.prompt))
        text = codec.encode(said.prompt + said.tag + said.answer)
        ids += [BOS_ID, *text, EOS_ID]
        weights += [0.0] * (1 + prompt) + [TAG_WEIGHT if said.tag else 1.0] + [1.0] * (len(text) - prompt)
    count = stage.rows * (LENGTH + 1)
    return torch.tensor(ids[:count]).view(stage.rows, -1), torch.tensor(weights[:count]).view(stage.rows, -1)


def rate_at(stage: Stage, step: int) -> float:
    """The learning rate: up over 60 steps, level, and down to a twentieth over the last two fifths."""
    falling = (step - 0.6 * stage.steps) / (0.4 * stage.steps)
    return stage.rate * min(1.0, (step + 1) / 60) * (1.0 - 0.95 * max(0.0, falling))


def loss_of(model: Llama, ids: Tensor, weights: Tensor, device: torch.device) -> Tensor:
    ids, weights = ids.to(device), weights[:, 1:].reshape(-1).to(device)
    with torch.autocast(device.type, torch.bfloat16):
        logits = model(ids[:, :-1])
    each = F.cross_entropy(
        logits.float().view(-1, logits.shape[-1]), ids[:, 1:].reshape(-1), reduction="none"
    )
    return (each * weights).sum() / weights.sum()


def run(stage: Stage, codec: Codec, work: Path, log: Path, device: torch.device) -> Llama:
    """Train one stage, or load it where it is done, or go on where it stopped."""
    torch.manual_seed(stage.seed)
    model = Llama(stage.size).to(device)
    if stage.start:
        model.load_state_dict(torch.load(work / f"{stage.start}.pt", weights_only=True)["model"])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05, fused=True
    )
    saved, first = work / f"{stage.name}.pt", 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    bar = tqdm(range(first, stage.steps), desc=stage.name, initial=first, total=stage.steps, mininterval=5.0)
    begun, recent = time.monotonic(), []
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = rate_at(stage, step)
        loss = loss_of(model, *batch(stage, step, codec), device)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        recent.append(loss.item())
        if (step + 1) % 50 == 0 or step + 1 == stage.steps:
            mean = sum(recent) / len(recent)
            speed = (step + 1 - first) * stage.rows * LENGTH / (time.monotonic() - begun)
            entry = {
                "stage": stage.name,
                "step": step + 1,
                "loss": round(mean, 4),
                "tokens_per_s": round(speed),
            }
            with log.open("a") as lines:
                lines.write(json.dumps(entry) + "\n")
            bar.set_postfix(loss=f"{mean:.3f}")
            recent = []
        if (step + 1) % 200 == 0 or step + 1 == stage.steps:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, saved.with_suffix(".tmp"))
            saved.with_suffix(".tmp").replace(saved)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "pocket", help="unfinished and finished stages"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "engine" / "pocket", help="where checkpoints are exported"
    )
    parser.add_argument("--log", type=Path, default=Path(__file__).parent / "train_log.jsonl")
    parser.add_argument("--only", nargs="*", help="names of stages; all by default")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="multiplies every stage's steps, for a pilot"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)
    shared, pieces = args.work / "tokenizer.json", args.work / "tokenizer.model"
    if not shared.exists():
        train_byte_pairs(shared)
    if not pieces.exists():
        train_sentence_pieces(pieces)
    for stage in STAGES:
        if args.only and stage.name not in args.only:
            continue
        stage = replace(stage, steps=max(1, round(stage.steps * args.scale)))
        codec: Codec = SentencePieces(pieces) if stage.pieces else BytePairs(shared)
        model = run(stage, codec, args.work, args.log, torch.device(args.device))
        export(stage.name, model, pieces if stage.pieces else shared, args.out)


if __name__ == "__main__":
    main()
