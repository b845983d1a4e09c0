"""What a user.conf may hold: LoadGen itself ignores what it does not know."""

from __future__ import annotations

from pathlib import Path

import pytest

from furiosa_llm.mlperf.user_conf import check_user_conf
from furiosa_llm.runtime.errors import InputError

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "mlperf"


def write(folder: Path, text: str) -> Path:
    path = folder / "user.conf"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(FIXTURES.glob("*.conf")), ids=lambda path: path.name)
def test_the_shipped_files_are_good(path: Path) -> None:
    check_user_conf(path)


def test_comments_empty_lines_and_other_models_are_fine(tmp_path: Path) -> None:
    check_user_conf(
        write(
            tmp_path,
            "# all\n\n*.Server.target_qps = 1.5 # a rate\nbert.Server.target_qps = 1900\n"
            "wan-2.2-t2v-a14b.*.min_query_count = 3\n*.Server.target_latency_percentile = 99.9\n",
        )
    )


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("*.Server.target_qps=4", r"expected MODEL.SCENARIO.KEY = VALUE with spaces"),
        ("*.Server.target_qps = 4 5", r"expected MODEL.SCENARIO.KEY = VALUE"),
        ("*.Server.target_qps : 4", r"expected MODEL.SCENARIO.KEY = VALUE with spaces"),
        ("target_qps = 4", r"found 'target_qps', expected MODEL.SCENARIO.KEY"),
        ("llama3.1-8b.Server.target_qps = 4", r"knows no model 'llama3.1-8b'"),
        ("*.server.target_qps = 4", r"knows no scenario 'server'"),
        ("*.Server.target_pqs = 4", r"knows no setting 'target_pqs', expected one of .*target_qps"),
        ("*.Server.target_qps = four", r"target_qps is 'four', expected a number"),
        ("*.Server.target_qps = 0", r"target_qps is 0, expected a number above 0"),
        ("*.Server.target_qps = -1", r"target_qps is -1, expected a number above 0"),
        ("*.Server.target_qps = nan", r"target_qps is nan, expected a number above 0"),
        ("*.Server.target_qps = inf", r"target_qps is inf, expected a number above 0"),
        ("*.Server.min_duration = 1.5", r"min_duration is '1.5', expected an integer of at least 0"),
        ("*.Server.min_query_count = -3", r"min_query_count is '-3', expected an integer"),
        ("*.Server.target_latency_percentile = 101", r"percentile is 101, expected a percentage"),
        ("llama3_1-8b.Server.ttft_latency = 9000", r"ttft_latency cannot be set here: LoadGen takes it from its own"),
        ("*.*.mode = 2", r"mode cannot be set here: --test-mode"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    path = write(tmp_path, f"# first\n{line}\n")
    with pytest.raises(InputError, match=rf"--user-conf: .*user.conf, line 2: .*{said}"):
        check_user_conf(path)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"--user-conf: .*none.conf cannot be read"):
        check_user_conf(tmp_path / "none.conf")
