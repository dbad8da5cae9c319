"""`dist-vasp explain`: the words say what Recommender.explain says."""

from __future__ import annotations

from dist_vasp import Recommender
from dist_vasp.commands import explain
from tests.support.paths import ROOT

FIXTURES = ROOT / "tests" / "fixtures" / "format1"


def test_users_of_a_file_in_words(call, capsys):
    run, file = FIXTURES / "vasp" / "run", FIXTURES / "histories.csv"
    call(explain.main, "--run", run, "--histories", file, "--users", 2, "--k", 2, "--reasons", 1)
    first, second = capsys.readouterr().out.split("\n\n")
    model = Recommender.load(run)
    rows = [line.split(",") for line in file.read_text().splitlines()[1:]]
    history = [int(item) for user, item in rows if user == "0"]
    known = sorted(set(history) & set(model.items.ids.to_pylist()))
    lines = first.splitlines()
    assert lines[0].startswith("user 0 likes ") and second.startswith("user 1 likes ")
    assert set(map(int, lines[0].split("likes ")[1].split(" and ")[0].split(", "))) <= set(known)
    ids, _ = model.recommend([known], k=2)
    assert len(lines) == 3
    for place, (line, item) in enumerate(zip(lines[1:], ids[0], strict=True), 1):
        why = model.explain(known, item, n=1)
        assert line == f"  {place}. {item}: {explain.in_words(why)}"
        assert f"because of {why.reasons[0].item} ({why.reasons[0].weight:+.2f})" in line
        assert f"p {why.p:.3f} = deep {why.p_flvae:.3f} x shallow {why.p_nease:.3f}" in line


def test_one_user_and_one_item(call, capsys):
    run, file = FIXTURES / "ease" / "run", FIXTURES / "histories.csv"
    item = Recommender.load(run).items.ids[5].as_py()
    call(explain.main, "--run", run, "--histories", file, "--user", 1, "--item", item)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[0].startswith("user 1 likes ")
    assert lines[1].startswith(f"  1. {item}: score ")


def test_a_list_that_is_shorter_than_k(call, capsys):
    """Places without an item are not explained; a user who has seen everything has no list."""
    run = FIXTURES / "vasp" / "run"
    ids = Recommender.load(run).items.ids.to_pylist()
    call(explain.main, "--run", run, "--k", len(ids), "--history", *ids[:3])
    assert len(capsys.readouterr().out.splitlines()) == 1 + len(ids) - 3


def test_a_user_who_has_seen_everything(call, capsys, tmp_path):
    run = FIXTURES / "vasp" / "run"
    ids = Recommender.load(run).items.ids.to_pylist()
    file = tmp_path / "histories.csv"
    file.write_text("user,item\n" + "".join(f"0,{item}\n" for item in ids) + f"1,{ids[0]}\n")
    call(explain.main, "--run", run, "--histories", file, "--k", 1)
    first, second = capsys.readouterr().out.split("\n\n")
    assert first.splitlines()[1] == "  there is no item left to recommend"
    assert second.splitlines()[1].startswith("  1. ")
