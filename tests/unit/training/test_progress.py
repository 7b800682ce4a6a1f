"""The progress display: plain lines in a log, one live line on a terminal, and other output left whole."""

from __future__ import annotations

import sys

import pytest

from nemo_automodel.components.training.progress import ProgressDisplay, format_duration, format_metrics

METRICS = {"loss": 2.5, "grad_norm": 1.25, "lr": 1e-4, "tokens_per_s": 12345.6, "mem_gib": 1.5}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59, "59s"), (59.9, "1:00"), (725, "12:05"), (11045, "3:04:05")]
)
def test_format_duration(seconds, text):
    assert format_duration(seconds) == text


def test_format_metrics_shows_what_there_is():
    assert format_metrics(METRICS, 61) == "loss 2.5000  12,346 tok/s  ETA 1:01  1.50 GiB  lr 1.0e-04  grad 1.25"
    assert format_metrics({"loss": 1.0}, None) == "loss 1.0000"


def test_a_log_file_gets_about_twenty_plain_lines(capsys):
    display = ProgressDisplay(total_steps=1000, live=False)
    for step in range(1, 1001):
        display.update(step, METRICS)
    display.stop()
    shown = capsys.readouterr().err.splitlines()
    assert 20 <= len(shown) <= 22
    assert shown[0].startswith("step 1/1000  loss 2.5000")
    assert shown[-1].startswith("step 1000/1000")
    assert not any("\x1b" in line for line in shown)


def test_a_short_or_resumed_run_shows_its_first_and_last_step(capsys):
    display = ProgressDisplay(total_steps=100, first_step=97, live=False)
    for step in (98, 99, 100):
        display.update(step, METRICS)
    shown = [line.split()[1] for line in capsys.readouterr().err.splitlines()]
    assert shown == ["98/100", "100/100"]


def test_the_live_line_leaves_other_output_whole(capsys):
    display = ProgressDisplay(total_steps=2, live=True)
    display.update(1, METRICS)
    print("a line of somebody else", file=sys.stderr)
    display.print("saved checkpoints/[odd]/epoch_0_step_1")
    display.update(2, METRICS)
    display.stop()
    display.stop()
    shown = capsys.readouterr().err
    assert "a line of somebody else\n" in shown
    assert "saved checkpoints/[odd]/epoch_0_step_1\n" in shown
    assert "\x1b[?25h" in shown  # the cursor is back


def test_disabled_shows_nothing(capsys):
    display = ProgressDisplay(total_steps=1, enabled=False)
    display.update(1, METRICS)
    display.print("hidden")
    display.stop()
    assert capsys.readouterr().err == ""
