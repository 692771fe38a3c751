"""One beginning, continued twice: the cache of the beginning is shared."""

from nudging import LLM, SamplingParams

with LLM.pocket() as llm, llm.open("Question: What is 12 plus 30?\nAnswer:") as text:
    text.extend(SamplingParams(max_tokens=4))
    with text.fork() as other:
        print(text.extend(SamplingParams(max_tokens=8)).text)
        print(other.extend(SamplingParams(max_tokens=8, temperature=1.0, seed=1)).text)
