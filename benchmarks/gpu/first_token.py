"""A process that opens a pair and writes one token.

    python -m benchmarks.gpu.first_token BASE GUIDE DEVICE MEMORY BEGAN

Prints as JSON how many seconds after BEGAN (of Unix) the engine was open and the token there.
"""

from __future__ import annotations

import json
import sys
import time

from nudging import LLM, Nudging, SamplingParams

QUESTION = [{"role": "user", "content": "What is 12 plus 30?"}]


def main(base: str, guide: str, device: str, memory: str, began: str) -> None:
    with LLM(base, guide, device=device, kv_cache_memory=memory, progress=False) as llm:
        opened = time.time()
        llm.chat(QUESTION, SamplingParams(max_tokens=1), Nudging(0.4, "word"))
        print(json.dumps({"engine opened": opened - float(began), "first token": time.time() - float(began)}))


if __name__ == "__main__":
    main(*sys.argv[1:])
