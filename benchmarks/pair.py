"""How fast a pair writes: every way of nudging the engine knows, its models alone, and rivals.

    python -m benchmarks.pair                                      # the pocket pair
    python -m benchmarks.pair --base-shape 100m --guide-shape 10m  # its texts at the cost of 100 M + 10 M

One request at a time, greedy.  The arms of ours that write one text are held to writing it, every time.  All
texts are equally long by default: the base alone may have nothing to say, and its speed is a yardstick.
"""

from __future__ import annotations

import importlib.util
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.arms.arm import Arm, Limits, Prompts
from benchmarks.arms.hf import transformers_arms
from benchmarks.arms.ours import engine_arms
from benchmarks.bandwidth import read_bandwidth
from benchmarks.inflate import SHAPES, inflate_checkpoint
from benchmarks.report import Figures, figures, show, write
from benchmarks.rounds import Record, run_rounds
from nudging import LLM, Nudging
from nudging.loading import resolve
from nudging.pocket.grade import load_questions
from nudging.prompts import read_chat

RESULTS = Path(__file__).parent / "results"
WIDTH = 120  # of the table in a pipe or a file
RIVALS = ("transformers",)


def measure(
    base: Path,
    guide: Path,
    policy: Nudging,
    limits: Limits,
    *,
    dtype: str = "bfloat16",
    device: str = "cpu",
    questions: int = 6,
    rounds: int = 5,
    seed: int = 0,
    only: Sequence[str] = (),
    rivals: Sequence[str] = RIVALS,
    progress: Progress | None = None,
) -> tuple[list[Figures], dict[str, Any]]:
    """The figures of every arm (those of `only`, where given), and the facts of the run.

    Raises DifferentText where arms of ours that must write one text do not.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "kv_cache_memory": "512MiB",
        "progress": False,
    }
    with LLM(base, guide, **options) as llm, LLM(base, guide, drafter="ngram", **options) as looking_up:
        arms = engine_arms(llm, looking_up, policy)
        arms += rival_arms(rivals, base, guide, device)
        arms = [arm for arm in arms if not only or arm.name in only]
        prompts = pocket_prompts(llm, questions)
        task = None
        if progress is not None:
            task = progress.add_task("warming up", total=len(arms) * len(prompts) * (rounds + 1))

        def advance(name: str) -> None:
            if progress is not None and task is not None:
                progress.update(task, advance=1, description=name)

        run = run_rounds(
            arms, prompts, limits, rounds, seed, lambda: read_bandwidth(torch.device(device)), advance
        )
        sizes = {role: pass_bytes(llm, role) for role in ("base", "guide")}
        facts = {
            "policy": repr(policy),
            "dtype": dtype,
            "max_tokens": limits.max_tokens,
            "ignore_eos": limits.ignore_eos,
            "questions": questions,
            "rounds": rounds,
            "seed": seed,
            "device": device_name(device),
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "parameters": {role: parameters(llm, role) for role in ("base", "guide")},
            "pass_bytes": sizes,
            "read_bandwidths": run.probes,
            "load_averages": run.load_averages,
            "agreement": agreement(llm, prompts, run.records),
        }
        return figures(run.records, sizes, max(run.probes)), facts


def rival_arms(names: Sequence[str], base: Path, guide: Path, device: str) -> list[Arm]:
    """Those of `names` that are installed and known."""
    if "transformers" in names and importlib.util.find_spec("transformers"):
        return transformers_arms(base, guide, torch.device(device), ["bf16", "fp32"])
    return []


def pocket_prompts(llm: LLM, count: int) -> list[Prompts]:
    """Questions spread over all kinds, in each role's own form."""
    listed = load_questions()
    step = max(len(listed) // count, 1)
    roles = list(llm.roles.values())
    prompts = []
    for question in listed[::step][:count]:
        read = read_chat([{"role": "user", "content": question.question}], roles)
        prompts.append({name: prompt.ids for name, prompt in read.items()})
    return prompts


def pass_bytes(llm: LLM, role: str) -> int:
    """Bytes of weights that a pass reads: all but an embedding that is not the head."""
    decoder = llm._engine.runners[llm.roles[role].model].decoder
    embed = decoder.weights.embed
    return decoder.weight_bytes - (0 if embed is decoder.weights.head else embed.nbytes)


def parameters(llm: LLM, role: str) -> int:
    return llm._engine.runners[llm.roles[role].model].decoder.num_parameters


def agreement(llm: LLM, prompts: Sequence[Prompts], records: Sequence[Record]) -> float:
    """The share of the base's tokens in the nudged texts that the guide would have written, too; NaN where
    no arm nudged.
    """
    same: list[bool] = []
    nudged = next((r for r in records if r.arm.text == "nudged"), None)
    for prompt, sample in zip(prompts, nudged.rounds[0] if nudged else [], strict=nudged is not None):
        ids = list(sample.token_ids)
        rows = llm.logits("guide", prompt["guide"] + ids)[len(prompt["guide"]) - 1 :]
        guesses = rows.argmax(-1).tolist()
        pairs = zip(guesses, ids, sample.authors, strict=False)
        same += [guess == token for guess, token, author in pairs if author == "base"]
    return sum(same) / len(same) if same else float("nan")


def device_name(device: str) -> str:
    """What computes: the GPU's name, or the processor's."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(torch.device(device))
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


@contextmanager
def inflated(name: str, shape: str | None, device: str) -> Iterator[Path]:
    """The checkpoint's directory; inflated to a shape, one that is gone afterwards."""
    if shape is None:
        yield resolve(name)
        return
    with tempfile.TemporaryDirectory() as folder:
        inflate_checkpoint(resolve(name), Path(folder), SHAPES[shape], device=device)
        yield Path(folder)


@click.command(context_settings={"show_default": True})
@click.option("--base", default="pocket:base", help="A checkpoint.")
@click.option("--guide", default="pocket:guide", help="A checkpoint with the base's tokenizer.")
@click.option("--base-shape", type=click.Choice(list(SHAPES)), help="Inflate the base to this.")
@click.option("--guide-shape", type=click.Choice(list(SHAPES)), help="Inflate the guide to this.")
@click.option("--threshold", default=0.4)
@click.option("--granularity", default="word")
@click.option("--dtype", type=click.Choice(["bfloat16", "float32"]), default="bfloat16")
@click.option("--device", default="cpu")
@click.option("--questions", default=6, help="Prompts of every arm in a round.")
@click.option("--max-tokens", default=64)
@click.option("--natural-ends", is_flag=True, help="Let texts end where they end, and not all be as long.")
@click.option("--rounds", default=5, help="Timed rounds, after one that is not.")
@click.option("--seed", default=0, help="Of the order of the arms.")
@click.option("--arm", "only", multiple=True, help="Only this arm; may be repeated.")
@click.option("--rivals/--no-rivals", default=True, help="Run what other engines are installed.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="A folder for the JSON file.")
@click.option("--name", help="Of the JSON file; by default the shapes.")
def main(base: str, guide: str, base_shape: str | None, guide_shape: str | None, **flags: Any) -> None:
    """Measure how fast a pair of models writes nudged text."""
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=WIDTH)
    policy = Nudging(flags["threshold"], flags["granularity"])
    limits = Limits(flags["max_tokens"], not flags["natural_ends"])
    with ExitStack() as stack:
        base_path = stack.enter_context(inflated(base, base_shape, flags["device"]))
        guide_path = stack.enter_context(inflated(guide, guide_shape, flags["device"]))
        with Progress(console=Console(stderr=True), transient=True) as progress:
            listed, facts = measure(
                base_path,
                guide_path,
                policy,
                limits,
                **{key: flags[key] for key in ("dtype", "device", "questions", "rounds", "seed", "only")},
                rivals=RIVALS if flags["rivals"] else (),
                progress=progress,
            )
    models = {"base": base_shape or base, "guide": guide_shape or guide}
    title = f"{models['base']} + {models['guide']}, {flags['dtype']}, one request at a time"
    show(console, listed, facts, title)
    name = flags["name"] or f"pair-{base_shape or 'pocket'}-{guide_shape or 'pocket'}"
    path = flags["out"] / f"{name}.json"
    write(listed, {"models": models, **facts}, path)
    console.print(f"written to {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
