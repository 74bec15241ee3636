"""Have a model write the passages that mining sets thresholds on, one beginning after another, and put them in a file.

`python bench/passages.py [--model MODEL] [--count N] [--tokens N] [--seed N] [--out FILE]`. Each passage goes on from a
beginning with a name in it: a control entity's, a word of the vocabulary, or one before the other; the model makes the
rest of the name, and its surroundings, up. Sampled at temperature 1 from the nucleus of 0.97 (Holtzman et al. 2020).
Passages that go round in circles are left out, and those with addresses or telephone numbers, made up as these are.
What ships was written by the embedded model, in 25 minutes on two cores; one more passage was taken out by hand.
"""

import argparse
import random
import re
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from kif_runtime import load_model
from kif_runtime.mining.corpus import WRITTEN, corpus

BEGINNINGS = (
    "{} is", "{} was", "The history of {}", "In {} ,", "A short account of {} :", "{} (", "According to {} ,",
    "News about {} :", "{} and its", "After {} ,", "He had never heard of {} until", "Many people compare {} with",
    '" {} " ,', "Reviews of {} :", "The town of {}", "The film {}", "The battle of {}", "A novel by {}", "Professor {}",
    "Saint {}", "The species {}", "The {} Company", "The {} River", "Mr. {} said that", "On 14 May , {}",
    "In the album {} ,", "The {} Party", "{} scored", "The road from {} to", "Mount {}", "King {}", "The {} language",
    "HMS {}", "The {} dynasty", "The asteroid {}", "A song called {} ,",
)  # fmt: skip
BATCH = 64
FEWEST_DIFFERENT = 0.5  # tokens of a passage, as a share of all
ADDRESS = re.compile(r"https?:|www\.|\w@\w|\d{3}-\d{3}|\ufffd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--count", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=72, help="tokens that follow a beginning")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=WRITTEN)
    args = parser.parse_args()
    model, tokenizer = load_model(args.model)
    rng = random.Random(args.seed)
    torch.manual_seed(args.seed)
    given = sorted(beginnings(tokenizer, args.count, rng), key=lambda text: len(tokenizer(text)["input_ids"]))
    found = []
    for start in track(range(0, len(given), BATCH), "writing"):
        found += written(model, tokenizer, given[start : start + BATCH], args.tokens)
    args.out.write_text("\n\n".join(dict.fromkeys(found)) + "\n", encoding="utf-8")
    print(f"{len(found)} of {len(given)} passages kept in {args.out}")


def beginnings(tokenizer: Any, count: int, rng: random.Random) -> list[str]:
    """A third with the name of a control entity, a third with a word of the vocabulary, a third with either or both."""
    decoded = (tokenizer.decode([token]) for token in range(len(tokenizer)))
    words = [w[1:] for w in decoded if len(w) > 3 and w[0] == " " and w[1].isupper() and w[1:].isalpha()]
    names = [entity.name for entity in corpus().entities]
    found = []
    for number in range(count):
        name = rng.choice(names if number % 3 == 0 else words)
        if number % 3 == 2 and rng.random() < 0.5:
            name = f"{rng.choice(words)} {rng.choice(names)}"
        found.append(rng.choice(BEGINNINGS).format(name))
    return found


@torch.no_grad()
def written(model: Any, tokenizer: Any, given: list[str], tokens: int) -> list[str]:
    """The passages that go on from `given`, each on one line."""
    inputs = tokenizer(given, return_tensors="pt", padding=True, padding_side="left").to(model.device)
    rows = model.generate(**inputs, do_sample=True, temperature=1.0, top_p=0.97, top_k=0, max_new_tokens=tokens)
    special, found = set(tokenizer.all_special_ids), []
    for row in rows.tolist():
        inside = [token for token in row if token not in special]
        text = " ".join(tokenizer.decode(inside).split())
        if len(set(inside)) >= FEWEST_DIFFERENT * len(inside) and not ADDRESS.search(text):
            found.append(text)
    return found


if __name__ == "__main__":
    main()
