"""transformers: a greedy loop on the model class, in one process or tensor parallel over gloo in several.

Of several processes the first is the one that is asked. It starts the others, and tells each what it is told.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
import transformers
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.distributed import DistributedConfig

from benchmarks.peers.protocol import Generation, Tokens, serve, timed_generation

_MODULE = "benchmarks.peers.engines.torch_transformers"


class Transformers:
    """A folder in Hugging Face's format, in float32 on one of `size` processes with a share of the threads each."""

    def __init__(self, folder: str, threads: int, size: int, rank: int, store: str) -> None:
        self._folder = folder
        self._size = size
        self._threads = max(1, threads // size)
        torch.set_num_threads(self._threads)
        if size > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), GLOO_SOCKET_IFNAME="lo")
            torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)

    @property
    def version(self) -> str:
        """See `Engine.version`."""
        return f"{transformers.__version__}, torch {torch.__version__}"

    def load(self) -> str:
        """See `Engine.load`."""
        split = {"distributed_config": DistributedConfig(tp_size=self._size, tp_plan="auto")} if self._size > 1 else {}
        self._model = AutoModelForCausalLM.from_pretrained(self._folder, dtype=torch.float32, **split).eval()
        return f"{self._size} processes x {self._threads} threads" if self._size > 1 else f"{self._threads} threads"

    def generate(self, prompts: Tokens, count: int) -> Generation:
        """See `Engine.generate`."""
        with torch.inference_mode():
            return self._generate(prompts, count)

    def _generate(self, prompts: Tokens, count: int) -> Generation:
        cache = DynamicCache(config=self._model.config)

        def step(new: Tokens) -> Sequence[int]:
            found = self._model(torch.tensor(new), past_key_values=cache, use_cache=True, logits_to_keep=1)
            tokens: list[int] = found.logits[:, -1].argmax(dim=-1).tolist()
            return tokens

        return timed_generation(prompts, count, step)


class Leader:
    """The first of several processes: an engine that has the others do the same."""

    def __init__(self, folder: str, threads: int, size: int) -> None:
        store = str(Path(tempfile.mkdtemp()) / "store")
        arguments = [sys.executable, "-m", _MODULE, folder, str(threads), str(size), store]
        followers = [
            subprocess.Popen([*arguments, str(rank)], stdin=subprocess.PIPE, text=True) for rank in range(1, size)
        ]
        self._followers: list[IO[str]] = [one.stdin for one in followers if one.stdin is not None]
        self._own = Transformers(folder, threads, size, 0, store)

    @property
    def version(self) -> str:
        """See `Engine.version`."""
        return self._own.version

    def load(self) -> str:
        """See `Engine.load`."""
        self._tell({})
        return self._own.load()

    def generate(self, prompts: Tokens, count: int) -> Generation:
        """See `Engine.generate`."""
        self._tell({"prompts": prompts, "count": count})
        return self._own.generate(prompts, count)

    def _tell(self, request: dict[str, object]) -> None:
        for follower in self._followers:
            follower.write(json.dumps(request) + "\n")
            follower.flush()


def follow(engine: Transformers) -> None:
    """Does what the leader is told: loads at the first line, and generates at each that follows."""
    sys.stdin.readline()
    engine.load()
    for line in sys.stdin:
        engine.generate(**json.loads(line))


def main() -> None:
    """FOLDER THREADS PROCESSES; the leader adds STORE and RANK for each that it starts."""
    folder, threads, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if sys.argv[4:]:
        follow(Transformers(folder, threads, size, int(sys.argv[5]), sys.argv[4]))
    else:
        serve(Leader(folder, threads, size) if size > 1 else Transformers(folder, threads, 1, 0, ""))


if __name__ == "__main__":
    main()
