"""An `LLM` that nobody closes: in processes that end while it runs, in forks, and when nothing refers to it."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import weakref
from pathlib import Path

import pytest

from furiosa_llm import LLM, SamplingParams
from furiosa_llm.runtime.errors import EngineDeadError, InputError
from tests.support.artifacts import artifact_of

GREEDY = SamplingParams(temperature=0.0, max_tokens=3)

BEGIN = """
import os, signal, sys, threading, time
from furiosa_llm import LLM, SamplingParams
signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it
llm = LLM.load_artifact({artifact!r})
threading.Thread(target=llm.generate, args=("x", SamplingParams(max_tokens=500, ignore_eos=True)), daemon=True).start()
time.sleep(0.05)
"""
ENDS = {
    "exception": ("raise SystemError('mine')", 1),
    "exit": ("sys.exit(7)", 7),
    "interrupt": ("signal.raise_signal(signal.SIGINT)", -signal.SIGINT),
    "end": ("", 0),
}


@pytest.fixture(scope="module")
def artifact() -> Path:
    return artifact_of("tiny-llama-optimum")


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_a_process_ends_as_it_would_without_a_model(artifact: Path, name: str) -> None:
    last, status = ENDS[name]
    code = BEGIN.format(artifact=str(artifact)) + last
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert ended.returncode == status, ended.stderr
    assert "terminate called" not in ended.stderr
    assert "Fatal" not in ended.stderr


def test_a_fork_is_told_at_once(artifact: Path) -> None:
    with LLM.load_artifact(artifact) as llm:
        llm.generate("x", GREEDY)
        pid = os.fork()
        if pid == 0:
            try:
                llm.generate("x", GREEDY)
            except EngineDeadError as error:
                os._exit(0 if "load it here, after the fork" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert llm.generate("x", GREEDY).outputs


def test_what_nobody_refers_to_ends(artifact: Path) -> None:
    before = {thread.name for thread in threading.enumerate()}
    llm = LLM.load_artifact(artifact)
    llm.generate("x", GREEDY)
    replicas = [weakref.ref(one) for one in llm._model.core.replicas]
    assert {thread.name for thread in threading.enumerate()} - before
    del llm
    gc.collect()
    assert {thread.name for thread in threading.enumerate()} - before == set()
    assert [one() for one in replicas] == [None] * len(replicas)


def test_token_ids_are_a_list_of_one_prompt(artifact: Path) -> None:
    with LLM.load_artifact(artifact) as llm:
        [output] = llm.generate([1, 2, 3], GREEDY)
        assert output.prompt_token_ids == [1, 2, 3]
        assert output.outputs[0].token_ids == llm.generate({"prompt_token_ids": [1, 2, 3]}, GREEDY).outputs[0].token_ids
        template = "{{ thinking }}{{ messages[0].content }}"
        [answer] = llm.chat(
            [{"role": "user", "content": "x"}], GREEDY, template, chat_template_kwargs={"thinking": "no"}
        )
        assert answer.prompt == "nox"
        with pytest.raises(InputError, match="cannot hold tools: the request has its own place"):
            llm.chat([{"role": "user", "content": "x"}], chat_template_kwargs={"tools": []})
        with pytest.raises(InputError, match=r"found \[1\], expected a mapping"):
            llm.chat([{"role": "user", "content": "x"}], chat_template_kwargs=[1])  # type: ignore[arg-type]
