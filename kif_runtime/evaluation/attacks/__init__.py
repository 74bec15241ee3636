"""Attacks: ways to draw out of a model what was erased from it.

An attack is a function (model, tokenizer, facts, …) -> `Outcome`: which facts it got out, and what it was allowed to
spend. It judges any model: run it on the untouched model to see that it works, and on one that never knew to see what
it gets by guessing or by teaching. Whatever happens inside, the model is left bit for bit as it was.

| file | attacks | what the attacker holds |
| --- | --- | --- |
| prompting | prefilled answers, roles, many-shot, other ways to write the name | prompts |
| sampling | best of N | prompts |
| distractor | a forgotten name in a question about others: does that break? | prompts |
| extraction | candidates by head projection and probability delta | the states |
| soft_prompt | embeddings tuned on some facts, judged on others | gradients |
| relearning | a few steps on the same facts, on some of them, on other text | the weights |
| quantisation | round trips through 8 and 4 bits | the weights |
| ablation | the direction that the erasure writes, taken out | the states |
| restoration | removed directions or sparse features, put back | the untouched model's states |
"""

from .outcome import Asked, Outcome, ask
from .trials import run

__all__ = ["Asked", "Outcome", "ask", "run"]
