"""Names of folders on the hub, and when a name is one of this disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from clt_plugins import HubPlace, Refused
from clt_plugins.files.hub.names import hub_place, place_of_copy

NAMES = {
    "user/clt": ("user/clt", "", None),
    "user/clt/": ("user/clt", "", None),
    "hf://user/clt": ("user/clt", "", None),
    "hf:/user/clt": ("user/clt", "", None),
    "hf://models/user/clt": ("user/clt", "", None),
    "user/clt/a/b": ("user/clt", "a/b", None),
    "user/clt@v1": ("user/clt", "", "v1"),
    "user/clt/a@feature/x": ("user/clt", "a", "feature/x"),
    "user/clt@v1/a/b": ("user/clt", "a/b", "v1"),
    "user/clt@feature%2Fx": ("user/clt", "", "feature/x"),
    "user/clt@refs/pr/3": ("user/clt", "", "refs/pr/3"),
    "user/clt@refs/pr/3/a": ("user/clt", "a", "refs/pr/3"),
    "my.user/clt-gpt2_small.1": ("my.user/clt-gpt2_small.1", "", None),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_taken_apart(name):
    place = HubPlace.parse(name)
    assert (place.repository, place.folder, place.revision) == NAMES[name]
    assert HubPlace.parse(str(place)) == place


@pytest.mark.parametrize(
    "name",
    [
        "hf://",
        "hf://user",
        "hf://user/",
        "hf://../clt",
        "hf://user/a--b",
        "hf://user/clt/../other",
        "hf://user/clt/a\\b",
        "hf://user/clt/a\nb",
        "hf://user/clt@",
        "hf://user/clt@../x",
        "hf://user/clt@-x y",
        "hf://datasets/user/texts",
        "hf://us er/clt",
        "hf://user/clt/" + 300 * "a",
    ],
)
def test_what_is_no_name_is_refused(name):
    with pytest.raises(Refused) as caught:
        hub_place(name)
    assert len(str(caught.value).splitlines()) == 1


def test_what_is_on_this_disk_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_place("user/clt") == HubPlace("user/clt")
    assert hub_place(Path("hf://user/clt@v1")) == HubPlace("user/clt", "", "v1")
    (tmp_path / "user").mkdir()
    assert hub_place("user/clt") is None, "a folder of that first name is here: a slip of the pen stays here"
    assert hub_place("hf://user/clt") == HubPlace("user/clt")
    for local in ("clt", "./user/clt", "../clt", "/user/clt", "~/clt", str(tmp_path), "a b/c", "runs//x/../y"):
        assert hub_place(local) is None, local


def test_a_folder_of_the_cache_says_where_it_is_from():
    commit = 40 * "a"
    folder = Path(f"/home/x/.cache/huggingface/hub/models--user--my-clt/snapshots/{commit}/a/transcoder")
    assert place_of_copy(folder) == HubPlace("user/my-clt", "a/transcoder", commit)
    assert place_of_copy(folder.parents[1]) == HubPlace("user/my-clt", "", commit)
    for other in (Path("/runs/x/transcoder"), Path("/x/snapshots/main/y"), Path(f"/datasets--u--x/snapshots/{commit}")):
        assert place_of_copy(other) is None
