from __future__ import annotations

import gzip
import re
from pathlib import Path

import pytest

from bigtrain.errors import ConfigError
from bigtrain.slurm.options import OPTIONS, parse_assignment, read_options

MANUAL = Path("/usr/share/man/man1/sbatch.1.gz")


@pytest.mark.skipif(not MANUAL.exists(), reason="no manual page of sbatch to compare with")
def test_every_option_of_the_manual_is_known() -> None:
    text = gzip.decompress(MANUAL.read_bytes()).decode()
    heads = re.findall(
        r"^\\fB(?:\\-\w\\fR, \\fB|\\-\w, )?\\-\\-([a-z\\-]+)\\fR", text, re.MULTILINE
    )
    manual = {head.replace("\\", "") for head in heads}
    assert len(manual) > 90
    assert manual <= set(OPTIONS)


def test_options_are_said_as_people_say_them() -> None:
    said = {
        "partition": "gpu",
        "mem_per_cpu": "4G",
        "t": "24:00:00",
        "exclusive": True,
        "hold": False,
        "requeue": "false",
        "no_kill": "off",
        "contiguous": "true",
        "container_writable": False,
        "dependency": ["afterok:12", "afterany:13"],
        "nice": 100,
    }
    assert read_options(said, origins={}) == {
        "partition": "gpu",
        "mem-per-cpu": "4G",
        "time": "24:00:00",
        "exclusive": None,
        "hold": False,
        "requeue": False,
        "no-kill": "off",
        "contiguous": None,
        "container-writable": False,
        "dependency": "afterok:12,afterany:13",
        "nice": "100",
    }


def test_all_faults_are_told_at_once_with_their_place_and_the_fix() -> None:
    said = {
        "partiton": "gpu",
        "nodes": 3,
        "hold": "maybe",
        "qos": True,
        "comment": "two\nrows",
        "mem": {"a": 1},
    }
    origins = {key: f"run.yaml:{line}" for line, key in enumerate(said, start=10)}
    with pytest.raises(ConfigError) as caught:
        read_options(said, origins=origins)
    assert caught.value.faults == (
        "run.yaml:10: cluster.slurm.partiton: sbatch has no such option; did you mean 'partition'?",
        "run.yaml:11: cluster.slurm.nodes: bigtrain sets it itself: it follows from --nodes",
        "run.yaml:12: cluster.slurm.hold: it takes no value, and has 'maybe'; use true or false",
        "run.yaml:13: cluster.slurm.qos: it needs a value",
        "run.yaml:14: cluster.slurm.comment: 'two\\nrows' can't be written in one line of a script",
        "run.yaml:15: cluster.slurm.mem: {'a': 1} is neither text, a number nor a list of these",
    )


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        (
            "time",
            ("90", "90:30", "24:00:00", "1-12", "1-12:30", "7-00:00:00", "UNLIMITED"),
            ("24hours", "1d", "24:00:00:00", "1-", "a day"),
        ),
        (
            "signal",
            ("USR2@600", "12@60", "USR1", "R:USR2@60", "TERM@60", "SIGUSR2@59999"),
            ("B:USR2@60", "USR2@10m", "INT@60", "KILL", "9@60", "USR2@65536", "usr3"),
        ),
    ],
)
def test_a_form_that_sbatch_would_misread_is_refused(
    option: str, good: tuple[str, ...], bad: tuple[str, ...]
) -> None:
    for text in good:
        assert read_options({option: text}, origins={}) == {option: text}
    for text in bad:
        with pytest.raises(ConfigError, match=f"slurm.{option}: '{text}' is not .*, as in "):
            read_options({option: text}, origins={})


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("qos=high", ("qos", "high")),
        ("--qos=high", ("qos", "high")),
        ("exclusive", ("exclusive", True)),
        ("comment=a=b", ("comment", "a=b")),
    ],
)
def test_a_flag_may_be_written_with_its_dashes(text: str, expected: tuple[str, object]) -> None:
    assert parse_assignment(text) == expected
