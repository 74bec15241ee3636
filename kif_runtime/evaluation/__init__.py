"""Evaluation: what a model still knows, what else changed, and what gets past the gate.

Plain functions on a loaded model and its tokenizer. Whoever calls has capsules attached, an adapter on, or nothing;
the functions do not care. `run.evaluate` measures before and after. An `audit.Audit` holds the models compared,
`suites.run_suites` runs suites on it, and `verdict.verdict` says what they come to.
"""

from .facts import Fact, answer_probabilities, excess_kept, load_facts, prior_probabilities
from .run import evaluate
from .statistics import bootstrap
from .text import perplexity

__all__ = [
    "Fact",
    "answer_probabilities",
    "bootstrap",
    "evaluate",
    "excess_kept",
    "load_facts",
    "perplexity",
    "prior_probabilities",
]
