"""`furiosa-llm serve` whose model says what it is told: `python -m tests.support.server.scripted FOLDER ARTIFACT ...`.

All of the command runs as ever, and the model, too; but each completion takes the first file of FOLDER, if there is
one, and its tokens are those of the file's text, in place of those that the sampler would choose. What the request
does not allow, by a grammar or otherwise, is not said: it is noted in FOLDER/refused, and the sampler chooses from
there on.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from furiosa_llm.cli.main import main as furiosa_llm
from furiosa_llm.runtime.requests import request
from furiosa_llm.runtime.tokens.sampler import Floats, Sampler

SUFFIX = ".txt"
REFUSED = "refused"


def scripted(folder: Path, tokenizer: Tokenizer) -> type[Sampler]:
    """Samplers that say what is in `folder`."""

    class Scripted(Sampler):
        def __init__(self, *arguments: Any, stop_token_ids: Any = (), **options: Any) -> None:
            super().__init__(*arguments, stop_token_ids=stop_token_ids, **options)
            self._text = _next(folder)
            self._script = [] if self._text is None else tokenizer.encode(self._text, add_special_tokens=False).ids
            self._ends = sorted(stop_token_ids)

        @property
        def takes_likeliest(self) -> bool:
            return self._text is None and super().takes_likeliest

        def choose(self, scores: Floats, top: np.float32) -> int:
            place = len(self._output)
            if self._text is None or place > len(self._script):
                return super().choose(scores, top)
            wanted = self._script[place : place + 1] or self._ends
            allowed = [token for token in wanted if np.isfinite(scores[token])]
            if allowed:
                return allowed[0]
            said = tokenizer.decode(self._script[:place], skip_special_tokens=False)
            with (folder / REFUSED).open("a", encoding="utf-8") as file:
                file.write(f"{self._text!r}: not allowed behind {said!r}\n")
            self._text = None
            return super().choose(scores, top)

    return Scripted


def _next(folder: Path) -> str | None:
    """The first text, which is taken away."""
    for file in sorted(folder.glob(f"*{SUFFIX}"))[:1]:
        text = file.read_text(encoding="utf-8")
        file.unlink()
        return text
    return None


def main() -> None:
    """See the module."""
    folder, artifact = map(Path, sys.argv[1:3])
    tokenizer = Tokenizer.from_file(str(artifact / "tokenizer.json"))
    vars(request)["Sampler"] = scripted(folder, tokenizer)
    sys.argv = ["furiosa-llm", "serve", *sys.argv[2:]]
    furiosa_llm()


if __name__ == "__main__":
    main()
