"""lm-eval against the real server: its log likelihoods beside those of the unsplit model, item by item.

    build/lm-eval/venv/bin/python -m benchmarks.lm_eval_served ARTIFACT MODEL --furiosa-llm .venv/bin/furiosa-llm

Runs in an environment of its own (`make lm-eval`), since lm-eval brings much along. The tasks are those in
fixtures/lm_eval. lm-eval makes tokens by the server's /tokenize and asks its /v1/completions; each answer is compared
with plain onnxruntime on MODEL, the model that ARTIFACT was built from. Exits with 1 if a bar is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.update({"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"})

import lm_eval
import numpy as np
import onnxruntime as ort
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer

from fixtures.perplexity import prefill_inputs

TASKS = Path("fixtures/lm_eval")
MAX_LENGTH = 512
LIMIT = 1e-3
"""Nats for each token."""


@dataclass(slots=True)
class Unsplit:
    """The model without the split, in plain onnxruntime; what it was asked once is kept."""

    model: Path
    session: ort.InferenceSession = field(init=False)
    tokenizer: Tokenizer = field(init=False)
    known: dict[tuple[tuple[int, ...], int], tuple[float, bool]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.session = ort.InferenceSession(self.model, providers=["CPUExecutionProvider"])
        self.tokenizer = Tokenizer.from_file(str(self.model.parent / "tokenizer.json"))

    def score(self, tokens: Sequence[int], context: int) -> tuple[float, bool]:
        """The log likelihood of `tokens` behind the first `context` of them, and whether all are the likeliest."""
        key = (tuple(tokens), context)
        if key not in self.known:
            ids = np.array([tokens], dtype=np.int64)
            (found,) = self.session.run(["logits"], prefill_inputs(self.model.parent, self.session, ids))
            logits = found[0, context - 1 : -1].astype(np.float64)
            logits -= logits.max(axis=-1, keepdims=True)
            said = np.array(tokens[context:], dtype=np.int64)
            chosen = np.take_along_axis(logits, said[:, None], axis=-1)[:, 0]
            total = float((chosen - np.log(np.exp(logits).sum(axis=-1))).sum())
            self.known[key] = total, bool((chosen == 0).all())
        return self.known[key]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A request of lm-eval's: the text and its tokens, and what both said of it."""

    text: tuple[str, str] | None
    num_tokens: int
    served: tuple[float, bool]
    unsplit: tuple[float, bool]

    @property
    def difference(self) -> float:
        """Nats for each token."""
        return abs(self.served[0] - self.unsplit[0]) / max(1, self.num_tokens)


class Compared(LocalCompletionsAPI):  # type: ignore[misc]  # lm-eval has no types
    """lm-eval's own client of a server, with the unsplit model asked the same beside it."""

    def __init__(self, unsplit: Unsplit, **options: Any) -> None:
        super().__init__(**options)
        self._unsplit = unsplit
        self.items: list[Item] = []
        self.other_tokens: list[str] = []

    def tok_encode(self, string: str, **options: Any) -> Any:
        """The server's tokens, compared with those of the model's own tokenizer."""
        found = super().tok_encode(string, **options)
        if found != self._unsplit.tokenizer.encode(string, add_special_tokens=False).ids:
            self.other_tokens.append(string)
        return found

    def _loglikelihood_tokens(self, requests: Any, **options: Any) -> Any:
        answers = list(super()._loglikelihood_tokens(requests, **options))
        for (text, context, continuation), served in zip(requests, answers, strict=True):
            tokens = (context + continuation)[-self.max_length :]  # as lm-eval cuts them
            before = len(tokens) - len(continuation)
            unsplit = self._unsplit.score(tokens, before)
            self.items.append(Item(text=text, num_tokens=len(continuation), served=served, unsplit=unsplit))
        return answers


def run(unsplit: Unsplit, url: str, name: str, tasks: Sequence[str], **options: Any) -> int:
    """Runs the tasks, prints a line for each, and returns how many bars are missed."""
    missed = 0
    for task in tasks:
        client = Compared(
            unsplit, model=name, base_url=f"{url}/v1/completions", tokenizer_backend="remote", max_length=MAX_LENGTH,
            max_retries=1, **options,
        )  # fmt: skip
        made = lm_eval.simple_evaluate(
            model=client, tasks=[task], task_manager=TaskManager(include_path=str(TASKS)), bootstrap_iters=0
        )
        assert made is not None
        samples = made["samples"][task]
        differences = [item.difference for item in client.items]
        other = [sample["doc_id"] for sample in samples if not same_ranking(client.items, sample)]
        greedy = sum(item.served[1] != item.unsplit[1] for item in client.items)
        tokens = sum(item.num_tokens for item in client.items)
        scores = {
            key.removesuffix(",none"): round(value, 4)
            for key, value in made["results"][task].items()
            if isinstance(value, float) and "stderr" not in key
        }
        bad = [max(differences) > LIMIT, bool(other), bool(greedy), bool(client.other_tokens), not client.items]
        missed += sum(bad)
        print(
            f"{task:12} {len(samples):4} documents {len(client.items):4} requests {tokens:5} tokens   "
            f"nats/token: max {max(differences):.1e} mean {np.mean(differences):.1e}   "
            f"other rankings {len(other)}, greedy flags {greedy}, tokens {len(client.other_tokens)}   {scores}"
            f"{'   MISSED' if any(bad) else ''}"
        )
    return missed


def same_ranking(items: Sequence[Item], sample: dict[str, Any]) -> bool:
    """Whether both order the answers of one document alike."""
    by_text = {item.text: item for item in items}
    choices = [by_text.get(tuple(one.values())) for one in arguments_of(sample)]
    found = [choice for choice in choices if choice is not None]
    orders = [np.argsort([getattr(choice, who)[0] for choice in found]).tolist() for who in ("served", "unsplit")]
    return bool(orders[0] == orders[1])


def arguments_of(sample: dict[str, Any]) -> list[dict[str, Any]]:
    """What the model was asked for one document."""
    arguments = sample["arguments"]
    if isinstance(arguments, dict):
        return list(arguments.values())
    return [{f"arg_{number}": value for number, value in enumerate(one)} for one in arguments]


@contextlib.contextmanager
def serving(furiosa_llm: str, artifact: Path) -> Iterator[str]:
    """The URL of a server of the artifact, in a process of its own."""
    command = [furiosa_llm, "serve", str(artifact), "--host", "127.0.0.1", "--port", "0", "--disable-log-stats"]
    command += ["--max-model-len", str(MAX_LENGTH), "--served-model-name", "local"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert process.stdout is not None
    said = []
    try:
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"Uvicorn running on (http://127\.0\.0\.1:\d+) ", line):
                # What it says later has to be read, or its pipe would fill.
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield found[1]
                return
        raise SystemExit(f"the server did not start: {''.join(said)}")
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare a server's log likelihoods with the unsplit model's.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("model", type=Path, help="the .onnx file that the artifact was built from")
    parser.add_argument("--furiosa-llm", default="furiosa-llm", help="the command")
    arguments = parser.parse_args()
    unsplit = Unsplit(arguments.model)
    with serving(arguments.furiosa_llm, arguments.artifact) as url:
        print("prompts of token ids, eight in a request")
        missed = run(unsplit, url, "local", ("local_facts", "local_edges", "local_novel"), batch_size=8)
        print("prompts of text, four requests at once")
        missed += run(unsplit, url, "local", ("local_facts",), tokenized_requests=False, num_concurrent=4)
    print(f"{missed} bars missed; the limit is {LIMIT} nats for each token, and everything else equal")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
