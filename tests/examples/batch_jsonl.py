"""A file of prompts to a file of answers, as the command line does it."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

PAIR = ("--base", "pocket:base", "--guide", "pocket:guide")

with tempfile.TemporaryDirectory() as folder:
    prompts, answers = Path(folder) / "prompts.jsonl", Path(folder) / "answers.jsonl"
    lines = [json.dumps({"prompt": f"Question: What is {n} plus 20?\nAnswer:"}) for n in (12, 35)]
    prompts.write_text("\n".join(lines))
    command = [sys.executable, "-m", "nudging", "generate", *PAIR, "--max-tokens", "20"]
    subprocess.run([*command, "--input", str(prompts), "--output", str(answers)], check=True)
    for line in answers.read_text().splitlines():
        print(json.loads(line)["text"])
