"""A chat that is printed as it is written, the guide's words in brackets."""

from nudging import LLM, SamplingParams

with LLM.pocket() as llm:
    messages = [{"role": "user", "content": "What is 12 plus 30?"}]
    for delta in llm.stream_chat(messages, SamplingParams(max_tokens=24)):
        for segment in delta.segments:
            print(f"[{segment.text}]" if segment.author == "guide" else segment.text, end="", flush=True)
    print()
