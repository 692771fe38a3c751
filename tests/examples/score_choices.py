"""The likeliest of several answers, under each of the models and under both together."""

from nudging import LLM, Base, Guide, Nudging

PROMPT = "Question: What is 12 plus 30?\nAnswer:"
CHOICES = (" 42.", " 41.", " 18.")

with LLM.pocket() as llm:
    for policy in (Base(), Guide(), Nudging(granularity="token")):
        scores = {choice: sum(llm.score(PROMPT, choice, policy)) for choice in CHOICES}
        best = max(CHOICES, key=lambda choice: scores[choice])
        print(type(policy).__name__, best, {choice: round(score, 1) for choice, score in scores.items()})
