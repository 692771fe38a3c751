"""A text that another thread ends: what was written stays."""

import threading

from nudging import LLM, SamplingParams

with LLM.pocket() as llm:
    handle = llm.submit("Tell me", SamplingParams(max_tokens=400, ignore_eos=True))
    first = next(iter(handle))
    threading.Thread(target=handle.cancel).start()
    output = handle.result().outputs[0]
    print(output.finish_reason, output.text.startswith(first.text))
