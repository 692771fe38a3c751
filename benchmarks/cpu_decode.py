"""Tokens per second of one text, ours against transformers, same checkpoint and dtype, in turns.

    python benchmarks/cpu_decode.py --threads 2
    python benchmarks/cpu_decode.py --threads 1 --cpu-time      # on a machine that has other work

Models with random weights are made by transformers in a temporary directory.  `engine` is the whole
`LLM.generate` with the base alone, `forward` the decode step of our decoder in it.  `share of read` is the
bytes of weights that `forward` reads in a second, over those of a plain read of memory in the same turns.
The last line is the result as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bandwidth import plain_memory
from transformers import LlamaConfig, LlamaForCausalLM

from nudging import LLM, Base, SamplingParams
from nudging.models.batch import Batch
from nudging.models.decoder import Decoder
from nudging.models.kv_cache import KVCache
from nudging.models.loader import Quantization, load_model

SHAPES: dict[str, dict[str, Any]] = {
    "100M": {
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "intermediate_size": 2048,
        "vocab_size": 32000,
    },
    "2M": {
        "hidden_size": 160,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 432,
        "vocab_size": 2048,
    },
}
PROMPT_LEN = 64
ROWS = (1, 2, 4, 8, 9, 16)


def make(directory: Path, shape: dict[str, Any]) -> LlamaForCausalLM:
    """A Llama with random bf16 weights, saved to `directory`."""
    torch.manual_seed(0)
    config = LlamaConfig(
        **shape, tie_word_embeddings=True, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    model.save_pretrained(directory)
    return model


def decode_step(decoder: Decoder, rows: int = 1) -> Callable[[], object]:
    """One pass of so many rows after PROMPT_LEN tokens, the engine left out."""
    config = decoder.config
    kv = KVCache(
        config.num_layers, 16, 16, config.num_kv_heads, config.head_dim, decoder.dtype, decoder.device
    )
    for cache in (kv.k, kv.v):
        cache.zero_()
    at = torch.arange(PROMPT_LEN, PROMPT_LEN + rows)
    batch = Batch(
        ids=torch.arange(rows),
        positions=at,
        slot_mapping=at,
        cu_seqlens_q=torch.tensor([0, rows], dtype=torch.int32),
        seq_lens=torch.tensor([PROMPT_LEN + rows], dtype=torch.int32),
        block_tables=torch.arange(16, dtype=torch.int32)[None],
        logit_rows=torch.arange(rows),
    )
    return torch.inference_mode()(lambda: decoder.forward(batch, kv))


def verify_costs(decoder: Decoder, turns: int, clock: Callable[[], float]) -> dict[int, float]:
    """Median milliseconds of a pass by its number of rows, in alternating turns."""
    steps = {rows: decode_step(decoder, rows) for rows in ROWS}
    seconds: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for turn in range(4 * turns + 1):
        for rows in random.Random(turn).sample(ROWS, len(ROWS)):
            begin = clock()
            steps[rows]()
            if turn > 0:
                seconds[rows].append(clock() - begin)
    return {rows: 1000 * statistics.median(times) for rows, times in seconds.items()}


def compare(
    shape: dict[str, Any], tokens: int, turns: int, clock: Callable[[], float], quantization: Quantization
) -> dict[str, Any]:
    """Median tokens/s of each arm, GB/s of a plain read, in alternating turns; then passes by rows."""
    with tempfile.TemporaryDirectory() as name:
        model = make(Path(name), shape)
        llm = LLM(name, kv_cache_memory="64MiB", quantization=quantization)
        decoder = load_model(name, quantization=quantization)
    prompt = torch.randint(shape["vocab_size"], (PROMPT_LEN,), generator=torch.Generator().manual_seed(1))
    step = decode_step(decoder)
    params = SamplingParams(max_tokens=tokens, ignore_eos=True)
    plain = plain_memory(192 << 20, torch.int64, torch.device("cpu"))
    written: dict[str, list[int]] = {}

    def ours() -> None:
        written["ours"] = list(llm.generate(prompt.tolist(), params, Base())[0].outputs[0].token_ids)

    def theirs() -> None:
        with torch.inference_mode():
            out = model.generate(
                prompt[None],
                attention_mask=torch.ones_like(prompt[None]),
                max_new_tokens=tokens,
                do_sample=False,
            )
        written["theirs"] = out[0, PROMPT_LEN:].tolist()

    arms: dict[str, Callable[[], object]] = {
        "engine": ours,
        "transformers": theirs,
        "forward": lambda: [step() for _ in range(tokens)],
        "read": plain.sum,
    }
    work = dict.fromkeys(arms, float(tokens)) | {"read": plain.nbytes / 1e9}
    seconds: dict[str, list[float]] = {arm: [] for arm in arms}
    for turn in range(turns + 1):
        for arm in random.Random(turn).sample(list(arms), len(arms)):
            begin = clock()
            arms[arm]()
            if turn > 0:  # the first warms up
                seconds[arm].append(clock() - begin)
    llm.close()
    same = sum(a == b for a, b in zip(written["ours"], written["theirs"], strict=True)) / tokens
    rate = {arm: work[arm] / statistics.median(times) for arm, times in seconds.items()}
    # An int8 decoder looks its embeddings up in a table of its own, of which a pass reads a row.
    looked_up = 0 if quantization is None else decoder.weights.embed.nbytes
    read_share = rate["forward"] * (decoder.weight_bytes - looked_up) / 1e9 / rate["read"]
    found = {**rate, "ratio": rate["engine"] / rate["transformers"], "share": read_share, "same": same}
    return found | {"ms_by_rows": verify_costs(decoder, turns, clock)}


def main() -> None:
    """Print a line for each shape, then the JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--shape", choices=SHAPES, nargs="+", default=list(SHAPES))
    parser.add_argument("--quantization", choices=["int8"])
    parser.add_argument("--cpu-time", action="store_true", help="count the process's time (1 thread only)")
    options = parser.parse_args()
    if options.cpu_time and options.threads != 1:
        parser.error("--cpu-time counts the time of all threads together; it needs --threads 1")
    clock = time.process_time if options.cpu_time else time.perf_counter
    torch.set_num_threads(options.threads)
    results = {}
    for name in options.shape:
        results[name] = found = compare(
            SHAPES[name], options.tokens, options.turns, clock, options.quantization
        )
        print(
            f"{name:>5}: engine {found['engine']:7.1f} tok/s, transformers {found['transformers']:6.1f} "
            f"({found['ratio']:.2f}x), forward {found['forward']:7.1f}, read {found['read']:.1f} GB/s "
            f"(share of read {found['share']:.2f}), same tokens {found['same']:.2f}",
            flush=True,
        )
        by_rows = found["ms_by_rows"]
        costs = ", ".join(f"{rows}: {ms:.2f} ({ms / by_rows[1]:.2f})" for rows, ms in by_rows.items())
        print(f"       ms of a pass by rows (of one row's): {costs}", flush=True)
    told = {"threads": options.threads, "load": os.getloadavg()[0], "torch": torch.__version__}
    print(json.dumps(told | {"results": results}))


if __name__ == "__main__":
    main()
