"""Several prompts at once from async code: each result as soon as it is there."""

import asyncio

from nudging import AsyncLLM, SamplingParams

QUESTIONS = ("What is 12 plus 30?", "What is 7 plus 5?", "What is 50 minus 8?")


async def ask(llm: AsyncLLM, question: str) -> str:
    result = await llm.chat([{"role": "user", "content": question}], SamplingParams(max_tokens=24))
    return f"{question}{result[0].outputs[0].text}"


async def main() -> None:
    async with AsyncLLM.pocket() as llm:
        for answer in asyncio.as_completed([ask(llm, question) for question in QUESTIONS]):
            print(await answer)


asyncio.run(main())
