"""Files of an artifact that are harmed at random moments while it serves: `make harmed-files` (MOMENTS=100).

A process serves the artifact in one of several ways, and compares what it generates with what it generated at first.
This one cuts files short, writes over them, and replaces, renames and deletes them and their folder.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from furiosa_llm.runtime.artifact.layout import Mesh
from tests.support.runtime.blocks import llama_blocks
from tests.support.runtime.models import LlamaSize
from tests.support.runtime.spmd import WEIGHTS

WAYS: tuple[dict[str, int], ...] = (
    {"threads": 2},
    {"workers": 2},
    {"data_parallel_size": 2, "pipeline_parallel_size": 2, "threads": 2},
    {"data_parallel_size": 2, "workers": 2},
)
_HARMS_OF_A_LIFE = 5

_CHILD = """
import json, select, sys
from furiosa_llm.runtime import LLM, SamplingParams

prompts = [[1, 2, 3], [4, 5], [6, 7, 8, 9]]
params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
with LLM.load_artifact(sys.argv[1], **json.loads(sys.argv[2])) as llm:
    expected = [[one.token_ids for one in output.outputs] for output in llm.generate(prompts, params)]
    print("ready", flush=True)
    rounds = wrong = 0
    while not select.select([sys.stdin], [], [], 0)[0]:
        found = [[one.token_ids for one in output.outputs] for output in llm.generate(prompts, params)]
        rounds, wrong = rounds + 1, wrong + (found != expected)
print(json.dumps([rounds, wrong]), flush=True)
"""


def _cut(path: Path, draw: random.Random) -> None:
    os.truncate(path, draw.randrange(path.stat().st_size + 1))


def _write_over(path: Path, draw: random.Random) -> None:
    with path.open("r+b") as file:
        file.write(draw.randbytes(path.stat().st_size))


def _replace(path: Path, draw: random.Random) -> None:
    other = path.with_name("other")
    other.write_bytes(draw.randbytes(path.stat().st_size))
    other.replace(path)


def _link(path: Path, _: random.Random) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def _delete(path: Path, _: random.Random) -> None:
    path.unlink()


def _delete_all(path: Path, _: random.Random) -> None:
    shutil.rmtree(path.parent)


def _rename_folder(path: Path, _: random.Random) -> None:
    shutil.rmtree(path.parent.with_name("elsewhere"), ignore_errors=True)
    path.parent.rename(path.parent.with_name("elsewhere"))


HARMS: tuple[Callable[[Path, random.Random], None], ...] = (
    *(_cut, _write_over, _replace, _link, _delete, _delete_all, _rename_folder),
)


def served_model(folder: Path) -> Path:
    """A model of two blocks on four PEs."""
    artifact = llama_blocks(Mesh((2, 2)), LlamaSize(layers=2), folder)
    (folder / "manifest.json").write_bytes(artifact.manifest.to_bytes())
    return folder


def serve(model: Path, place: Path, way: dict[str, int], harms: int, draw: random.Random) -> tuple[int, int, str]:
    """How many rounds of requests were served during so many harms, how many of them wrong, and how it died, or ""."""
    folder = shutil.copytree(model, place / "artifact")
    command = [sys.executable, "-c", _CHILD, str(folder), json.dumps(way)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        ready = child.stdout.readline()
        for _ in range(harms if ready else 0):
            try:
                child.wait(draw.uniform(0.0, 0.3))
            except subprocess.TimeoutExpired:
                # Most of the time the weights, which alone are of use to a model that runs.
                name = draw.choice([WEIGHTS] * 3 + ["program.onnx", "source.onnx", "manifest.json"])
                path = folder / name
                if path.is_file() and not path.is_symlink():
                    draw.choice(HARMS)(path, draw)
                else:
                    shutil.rmtree(folder, ignore_errors=True)
                    shutil.copytree(model, folder)
        output, errors = child.communicate(b"\n", timeout=120)
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(place / "elsewhere", ignore_errors=True)
    if child.returncode or not output:
        return 0, 0, f"{way}: ended with {child.returncode}: {errors.decode()[-500:]}"
    rounds, wrong = json.loads(output)
    return rounds, wrong, ""


def run(moments: int, seed: int) -> tuple[int, int, list[str]]:
    """Rounds of requests, how many of them were wrong, and deaths, with files harmed so often."""
    draw = random.Random(seed)
    rounds = wrong = done = 0
    deaths: list[str] = []
    with tempfile.TemporaryDirectory() as made:
        place = Path(made)
        model = served_model(place / "model")
        for number in range(-(-moments // _HARMS_OF_A_LIFE)):
            harms = min(_HARMS_OF_A_LIFE, moments - done)
            found = serve(model, place, WAYS[number % len(WAYS)], harms, draw)
            rounds, wrong, done = rounds + found[0], wrong + found[1], done + harms
            deaths += [found[2]] if found[2] else []
    return rounds, wrong, deaths


def main(arguments: Sequence[str] | None = None) -> int:
    """Whether something went wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--moments", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    rounds, wrong, deaths = run(options.moments, options.seed)
    sys.stdout.write("".join(f"{death}\n" for death in deaths))
    sys.stdout.write(
        f"{options.moments} moments, {rounds} rounds of requests: {wrong} with wrong tokens, {len(deaths)} deaths\n"
    )
    return int(bool(wrong or deaths or not rounds))


if __name__ == "__main__":
    sys.exit(main())
