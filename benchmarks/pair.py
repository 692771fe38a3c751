"""How fast a pair writes: every way of nudging the engine knows, its models alone, and rivals.

    python -m benchmarks.pair                                      # the pocket pair
    python -m benchmarks.pair --base-shape 100m --guide-shape 10m  # its texts at the cost of 100 M + 10 M

One request at a time, greedy.  The arms of ours that write one text are held to writing it, every time.  All
texts are equally long by default: the base alone may have nothing to say, and its speed is a yardstick.
"""

from __future__ import annotations

import fnmatch
import platform
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.arms.arm import Arm, Limits, Prompts, Rival, Setting
from benchmarks.arms.ours import engine_arms
from benchmarks.bandwidth import read_bandwidth
from benchmarks.inflate import SHAPES, inflate_checkpoint
from benchmarks.report import Figures, figures, show, write
from benchmarks.rivals import Likeness, likeness, open_rivals
from benchmarks.rounds import Record, run_rounds
from nudging import LLM, Base, Nudging, SamplingParams
from nudging.api.loading import resolve
from nudging.errors import BadRequest
from nudging.pocket.grade import load_questions
from nudging.text.prompts import read_chat

RESULTS = Path(__file__).parent / "results"
WIDTH = 120  # of the table in a pipe or a file
MEASURE_FLAGS = ("dtype", "device", "questions", "rounds", "seed", "only", "rivals", "openvino_ir")


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
    rivals: bool = True,
    openvino_ir: Path | None = None,
    progress: Progress | None = None,
) -> tuple[list[Figures], dict[str, Any]]:
    """The figures of every arm (those whose name a pattern of `only` matches, where given), and the facts of
    the run.

    Raises DifferentText where arms of ours that must write one text do not, DifferentModel where a rival's
    base is not ours, BadRequest for a pattern that no arm matches.
    """
    options: dict[str, Any] = {
        "dtype": dtype,
        "device": device,
        "kv_cache_memory": "512MiB",
        "progress": False,
        "record_ahead": False,
    }
    with ExitStack() as stack:
        llm = stack.enter_context(LLM(base, guide, **options))
        looking_up = stack.enter_context(LLM(base, guide, drafter="ngram", **options))
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        setting = Setting(base, guide, torch.device(device), torch.get_num_threads(), folder, openvino_ir)
        ours = engine_arms(llm, looking_up, policy)
        others, left_out = open_rivals(setting, lambda name: matches(name, only)) if rivals else ([], {})
        arms = [*(arm for arm in ours if matches(arm.name, only)), *others]
        check_patterns(only, arms, left_out)
        prompts = pocket_prompts(llm, questions)
        alike = compare_models(llm, others, prompts, limits)
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
            "versions": versions(),
            "rivals": {name: asdict(found) for name, found in alike.items()},
            "left_out": left_out,
        }
        return figures(run.records, sizes, max(run.probes)), facts


def matches(name: str, patterns: Sequence[str]) -> bool:
    """Whether an arm is to be run: always where there is no pattern ("llama.cpp*")."""
    return not patterns or any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def check_patterns(patterns: Sequence[str], arms: Sequence[Arm], left_out: Mapping[str, str]) -> None:
    """Raise BadRequest for a pattern that matches no arm: a name mistyped, or an engine that is not there."""
    for pattern in patterns:
        if not any(matches(arm.name, [pattern]) for arm in arms):
            reasons = "".join(f"; {name}: {reason}" for name, reason in left_out.items())
            raise BadRequest(f"no arm is named {pattern!r}; without --arm the table shows all{reasons}")


def compare_models(
    llm: LLM, rivals: Sequence[Rival], prompts: Sequence[Prompts], limits: Limits
) -> dict[str, Likeness]:
    """How near each rival's base is to ours, on the prompts and the base's texts.  Raises DifferentModel."""
    if not rivals:
        return {}
    params = SamplingParams(max_tokens=limits.max_tokens, ignore_eos=limits.ignore_eos)
    results = llm.generate([dict(prompt) for prompt in prompts], params, Base(), "off")
    texts = [
        prompt["base"] + list(result.outputs[0].token_ids)
        for prompt, result in zip(prompts, results, strict=True)
    ]
    ours = [torch.from_numpy(llm.logits("base", ids)).float() for ids in texts]
    return {rival.name: likeness(rival, texts, ours) for rival in rivals}


def versions() -> dict[str, str]:
    """The versions of the engines that are installed."""
    packages = ("transformers", "llama-cpp-python", "gguf", "openvino", "openvino-genai", "vllm", "sglang")
    installed = {d.name.lower(): d.version for d in metadata.distributions()}
    return {name: installed[name] for name in packages if name in installed}


def pocket_prompts(llm: LLM, count: int) -> list[Prompts]:
    """Questions spread over all kinds, in each role's own form."""
    listed = load_questions()
    step = max(len(listed) // count, 1)
    roles = list(llm.roles.values())
    prompts = []
    for question in listed[::step][:count]:
        read = read_chat({}, [{"role": "user", "content": question.question}], roles)
        prompts.append({name: prompt.ids for name, prompt in read.items()})
    return prompts


def pass_bytes(llm: LLM, role: str) -> int:
    """Bytes of weights that a pass reads: all but an embedding that is not the head."""
    decoder = llm._engine.runners[llm.roles[role].model].decoder
    embed = decoder.weights.embed
    return decoder.weight_bytes - (0 if embed is decoder.weights.head else embed.nbytes)


def parameters(llm: LLM, role: str) -> int:
    return llm._engine.runners[llm.roles[role].model].decoder.num_parameters


def agreement(llm: LLM, prompts: Sequence[Prompts], records: Sequence[Record]) -> float | None:
    """The share of the base's tokens in the nudged texts that the guide would have written, too; None where
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
    return sum(same) / len(same) if same else None


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


@click.command(context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
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
@click.option(
    "--arm", "only", multiple=True, help="Only this arm, or those like 'llama.cpp*'; may be repeated."
)
@click.option("--rivals/--no-rivals", default=True, help="Run what other engines are installed.")
@click.option("--openvino-ir", type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="The base, exported for OpenVINO.")  # fmt: skip
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS, help="A folder for the JSON file.")
@click.option("--name", help="Of the JSON file; by default the shapes.")
def main(base: str, guide: str, base_shape: str | None, guide_shape: str | None, **flags: Any) -> None:
    """Measure how fast a pair of models writes nudged text."""
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=WIDTH)
    policy = Nudging(flags["threshold"], flags["granularity"])
    limits = Limits(flags["max_tokens"], not flags["natural_ends"])
    wanted = {key: flags[key] for key in MEASURE_FLAGS}
    with ExitStack() as stack:
        base_path = stack.enter_context(inflated(base, base_shape, flags["device"]))
        guide_path = stack.enter_context(inflated(guide, guide_shape, flags["device"]))
        with Progress(console=Console(stderr=True), transient=True) as progress:
            try:
                listed, facts = measure(base_path, guide_path, policy, limits, **wanted, progress=progress)
            except BadRequest as error:
                raise click.UsageError(str(error)) from error
    models = {"base": base_shape or base, "guide": guide_shape or guide}
    title = f"{models['base']} + {models['guide']}, {flags['dtype']}, one request at a time"
    show(console, listed, facts, title)
    name = flags["name"] or f"pair-{base_shape or 'pocket'}-{guide_shape or 'pocket'}"
    path = flags["out"] / f"{name}.json"
    write(listed, {"models": models, **facts}, path)
    console.print(f"written to {path}", soft_wrap=True, highlight=False)


if __name__ == "__main__":
    main()
