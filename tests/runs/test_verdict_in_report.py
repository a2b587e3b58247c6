"""The report shows the verdict of `diagnose` first, each finding and each table once."""

import html
import json
import re

import pytest
import torch
from bad_input_helpers import binary, refused, small

import pyro_vae as pv
from pyro_vae.diagnostics.attribution import PARTS
from pyro_vae.report.page import shown_verdict
from pyro_vae.runs import metrics as run_metrics

EVIDENCE = {
    name: {"kind": "place", "tool": "gaps", "words": f"{name} <is> off", "nats": None}
    for name in ("mean", "scale", "tail")
}


def blame(part, nats, *names):
    evidence = [EVIDENCE[name] for name in names]
    return {"part": part, "nats": nats, "evidence": evidence, "next": f"a new {part}"}


FOUND = {
    "blamed": [blame("encoder", 0.714, "mean", "scale"), blame("family", None, "scale", "tail")],
    "findings": [
        {"kind": "fault", "words": "the encoder, in one sentence", "about": "encoder"},
        {"kind": "trust", "words": "first <reliable> thing", "about": "a"},
        {"kind": "trust", "words": "second reliable thing", "about": "b"},
        {"kind": "doubt", "words": "a doubtful thing", "about": "c"},
        {"kind": "unchecked", "words": "an unknown thing", "about": "d"},
        {"kind": "next", "words": "some advice", "about": "c"},
    ],
    "tables": {"gaps": "the table of gaps", "latents": "the table of latents"},
    "pictures": {},
    "notes": {"gaps": ["a remark"]},
    "not_applicable": {"nuts": "no latents"},
    "failed": {},
    "left_out": {"annealing": "it did not run", "gaps": "it ran at size 1 of 5"},
    "seconds": {"gaps": 3.2, "latents": 1.2},
    "budget": 10.0,
    "num_examples": 345,
    "summary": "",
}


@pytest.fixture(scope="module")
def shelf(tmp_path_factory):
    pair = small()
    return pair, pv.save(pair, tmp_path_factory.mktemp("run"))


def page(shelf, found):
    """The report of a run with these findings."""
    pair, run = shelf
    run_metrics.write_metrics(run, pair, {"elbo": -1.5, "diagnostics": found})
    return pv.write_report(pair, binary(), run=run).read_text()


@pytest.fixture(scope="module")
def whole(shelf):
    return page(shelf, FOUND)


def seen(text):
    """The text of a page as a reader sees it, with a line for each element."""
    body = re.sub(r"(?s)<style>.*?</style>|<img[^>]*>", "", text)
    lines = (line.strip() for line in html.unescape(re.sub(r"<[^>]+>", "\n", body)).split("\n"))
    return [line for line in lines if line]


def test_the_verdict_comes_first_and_each_finding_is_an_item(whole):
    lines = seen(whole)
    start, end = lines.index("Can the inference be believed?"), lines.index("Numbers")
    assert lines[start + 1 : end] == [
        "At fault:",
        PARTS["encoder"][0],
        "(0.71 nats per example). Try a new encoder.",
        "mean <is> off",
        "scale <is> off",
        PARTS["family"][0],
        ". Try a new family.",
        "tail <is> off",
        "the evidence of the parts above",
        "Reliable:",
        "first <reliable> thing.",
        "second reliable thing.",
        "Not reliable:",
        "a doubtful thing.",
        "Not checked:",
        "an unknown thing.",
        "Try next:",
        "some advice.",
        "The diagnosis took 4 s (budget 10 s), with at most 345 test data. For lack of time, 2 "
        "diagnostics did not run or not at full size: pyro-vae diagnose gives them more.",
    ]
    items = re.findall(r"<li>(.*?)</li>", whole)
    assert "second reliable thing." in items
    assert "an unknown thing." in items
    assert 'name="viewport" content="width=device-width' in whole  # readable on a phone


def test_no_table_finding_or_reason_is_shown_twice(whole):
    lines = seen(whole)
    for words in ("the table of gaps", "the table of latents", "note: a remark"):
        assert lines.count(words) == 1
        assert lines.index(words) > lines.index("Diagnostics") > lines.index("Numbers")
    text = "\n".join(lines)
    for part in FOUND["findings"][1:]:
        assert text.count(part["words"]) == 1
    assert text.count("the encoder, in one sentence") == 0  # told in parts
    assert text.count("nuts does not apply: no latents") == 1
    assert text.count("gaps lacked time: it ran at size 1 of 5") == 1


def test_a_verdict_without_faults_names_its_limit():
    lines = seen(shown_verdict(FOUND | {"blamed": [], "findings": []}))
    at = lines.index("At fault:")
    assert lines[at + 1] == "no part, as far as the diagnostics have checked"
    nothing = FOUND | {"blamed": [], "findings": [], "tables": {}}
    assert "At fault:" not in seen(shown_verdict(nothing))


def test_findings_of_0_1_0_are_shown():
    """Version 0.1.0 looked for no part at fault, and recorded neither time nor size."""
    new = ("blamed", "seconds", "budget", "num_examples")
    lines = seen(shown_verdict({key: FOUND[key] for key in FOUND if key not in new}))
    assert lines[:2] == ["Can the inference be believed?", "Reliable:"]
    assert lines[-1] == "some advice."


EVIL = "</li></pre><script>alert(1)</script>"

WRONG = {
    "a size in words": {"blamed": [blame("encoder", "large", "mean")]},
    "a part without evidence": {"blamed": [{"part": "encoder", "nats": 1.0, "next": "x"}]},
    "a part that is a list": {"blamed": [blame(["encoder"], 1.0)]},
    "a budget in words": {"budget": "long"},
    "seconds as a list": {"seconds": [1, 2]},
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
def test_a_damaged_verdict_is_refused_in_one_line(wrong, shelf):
    refused(lambda: page(shelf, FOUND | wrong), "metrics.json", "does not have its format")


def test_text_of_the_verdict_is_escaped():
    evidence = {"kind": EVIL, "tool": EVIL, "words": EVIL, "nats": None}
    evil = {"part": EVIL, "nats": None, "evidence": [evidence], "next": EVIL}
    text = shown_verdict(FOUND | {"blamed": [evil]})
    assert "<script>" not in text
    assert seen(text).count(EVIL) == 2  # the part, and its evidence


def test_the_page_shows_what_diagnose_has_written(shelf):
    """Names and types of the record are those that the page reads."""
    pair, _ = shelf
    found = pv.diagnose(pair, binary(60), budget=0.5, progress=False)
    text = page(shelf, json.loads(json.dumps(found.as_dict())))
    lines = seen(text)
    for finding in found.findings:
        if finding.kind != "fault":
            assert f"{finding.words}." in lines
    for fault in found.blamed:
        assert PARTS[fault.part][0] in lines
    took = sum(found.seconds.values())
    assert f"The diagnosis took {took:.0f} s (budget 0.5 s), with at most 60 test data." in text
    assert torch.equal(found.rows.sort().values, torch.arange(60))
