"""The page of `cdpo rate`: its answers, what it saves, and a person at a real browser."""

import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from headless_browser import Browser, box_of
from rated_runs import HOSTILE, NUM_IMAGES, NUM_PROMPTS, rated_run, vote_on

from cdpo_ray.cli import main
from cdpo_ray.evaluation.people import people_of
from cdpo_ray.evaluation.rating import RatingSession
from cdpo_ray.evaluation.votes import SAMPLED, Vote, digest_of, rated_images, read_votes, votes_path, write_votes
from cdpo_ray.pages.server import MAX_BODY_BYTES, PageServer
from cdpo_ray.records import HELDOUT, VOTES
from cdpo_ray.store import RunFolder, copy_tree

TOKEN = "t0ken"
NUM_PAIRS = NUM_PROMPTS * NUM_IMAGES


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return rated_run(tmp_path_factory.mktemp("rating") / "run")


def session_of(run: Path, votes_dir: Path, *, voter: str = "ana", kind: str = HELDOUT) -> RatingSession:
    images = rated_images(RunFolder(run, foreign=True), kind)
    return RatingSession(images, votes_path(votes_dir, kind, voter), voter=voter, run_name="run")


def shown(session: RatingSession) -> dict[str, Any]:
    answer = session.answer("/pair")
    assert answer is not None
    state: dict[str, Any] = json.loads(answer.content)
    return state


def choose(session: RatingSession, choice: str, pair: str | None = None) -> dict[str, Any]:
    """The state after a choice; ``pair``: id of the pair that the page shows, by default the current one."""
    body = {"pair": shown(session)["pair"] if pair is None else pair, "choice": choice}
    answer = session.accept("/vote", json.dumps(body).encode())
    assert answer is not None and answer.status == 200
    state: dict[str, Any] = json.loads(answer.content)
    return state


def test_what_the_page_gets_does_not_say_which_model_made_an_image(run: Path, tmp_path: Path) -> None:
    session, ids = session_of(run, tmp_path), set[str]()
    for number in range(NUM_PAIRS):
        state = shown(session)
        assert {*state} == {"fault", "rated", "total", "pair", "prompt", "left", "right"}
        assert (state["rated"], state["total"], state["fault"]) == (number, NUM_PAIRS, "")
        assert not re.search("base|tuned", json.dumps(state))
        ids |= {state["pair"], state["left"], state["right"]}
        choose(session, "left")
    assert len(ids) == 3 * NUM_PAIRS and all(re.fullmatch(r"[\w-]{16}", each) for each in ids)
    left = [vote["left"].partition("-")[0] for vote in read_votes(session.path)]
    assert {"base", "tuned"} == {*left}
    assert shown(session) == {"fault": "", "rated": NUM_PAIRS, "total": NUM_PAIRS, "pair": ""}


def test_an_image_is_served_by_its_id_while_its_pair_is_shown(run: Path, tmp_path: Path) -> None:
    session = session_of(run, tmp_path)
    state = shown(session)
    left = session.answer(f"/image/{state['left']}")
    assert left is not None and left.kind == "image/png"
    choose(session, "left")
    [vote] = read_votes(session.path)
    assert digest_of(left.content) == vote["left_digest"]
    assert session.answer(f"/image/{state['left']}") is None, "its pair is not shown any more"
    for path in (
        "/image/",
        "/image/../comparison.parquet",
        "/votes/heldout/ana.jsonl",
        "/vote",
        "/x",
        "/rating.html.jinja",
    ):
        assert session.answer(path) is None
    assert session.accept("/pair", b"{}") is None


def test_each_vote_is_on_the_disk_before_the_next_pair_is_shown_and_undo_shows_the_last_one_again(
    run: Path, tmp_path: Path
) -> None:
    session = session_of(run, tmp_path)
    prompts = [shown(session)["prompt"]]
    for number, choice in enumerate(["left", "tie", "right"], start=1):
        prompts.append(choose(session, choice)["prompt"])
        assert [vote["choice"] for vote in read_votes(session.path)][-1] == choice
        assert len(read_votes(session.path)) == number
    before = read_votes(session.path)
    state = choose(session, "undo")
    assert (state["prompt"], state["rated"]) == (prompts[2], 2) and read_votes(session.path) == before[:2]
    choose(session, "left")
    again = read_votes(session.path)[2]
    assert (again["left"], again["right"], again["choice"]) == (before[2]["left"], before[2]["right"], "left")
    for _ in range(4):
        state = choose(session, "undo")
    assert (state["rated"], state["prompt"]) == (0, prompts[0]) and read_votes(session.path) == []


def test_a_session_continues_where_the_voter_stopped_and_other_voters_have_their_own_votes(
    run: Path, tmp_path: Path
) -> None:
    first = session_of(run, tmp_path)
    for _ in range(5):
        choose(first, "left")
    expected = shown(first)["prompt"]
    second = session_of(run, tmp_path)
    assert (shown(second)["rated"], shown(second)["prompt"]) == (5, expected)
    assert choose(second, "undo")["rated"] == 4
    assert shown(session_of(run, tmp_path, voter="ben"))["rated"] == 0
    assert shown(session_of(run, tmp_path, kind=SAMPLED))["rated"] == 0


def test_a_pair_whose_images_were_made_again_is_shown_again_and_the_old_vote_is_kept(run: Path, tmp_path: Path) -> None:
    images = rated_images(RunFolder(run), HELDOUT)
    old = vote_on(images, 0, "tuned") | {"left_digest": "0" * 32}
    write_votes(votes_path(tmp_path, HELDOUT, "ana"), [old])
    session = session_of(run, tmp_path)
    assert shown(session)["prompt"] == images.prompts[images.pairs[0].prompt_index]
    choose(session, "left")
    votes = read_votes(session.path)
    assert votes[0] == old and len(votes) == 2 and choose(session, "undo")["rated"] == 0
    assert read_votes(session.path) == [old]


def test_a_second_click_on_one_pair_changes_nothing(run: Path, tmp_path: Path) -> None:
    session = session_of(run, tmp_path)
    pair = shown(session)["pair"]
    after = choose(session, "left", pair)
    assert choose(session, "right", pair) == choose(session, "undo", pair) == after
    assert [vote["choice"] for vote in read_votes(session.path)] == ["left"]


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b'{"pair": 1, "choice": "left"}', b'{"pair": "", "choice": "both"}', b'{"choice": "left"}', b"\xff"],
)
def test_a_body_that_is_not_a_choice_is_refused(body: bytes, run: Path, tmp_path: Path) -> None:
    session = session_of(run, tmp_path)
    shown(session)
    answer = session.accept("/vote", body)
    assert answer is not None and answer.status == 400 and not session.path.exists()


def test_fault_60_a_vote_that_cannot_be_saved_is_not_counted_and_the_page_says_so(run: Path, tmp_path: Path) -> None:
    session = session_of(run, tmp_path)
    pair = shown(session)["pair"]
    (tmp_path / HELDOUT).write_text("a file in place of the folder")
    state = choose(session, "left", pair)
    assert (state["rated"], state["pair"]) == (0, pair) and "cannot be" in state["fault"]
    (tmp_path / HELDOUT).unlink()
    state = choose(session, "left", pair)
    assert (state["rated"], state["fault"]) == (1, "")


def test_two_sessions_of_one_voter_do_not_overwrite_each_other(run: Path, tmp_path: Path) -> None:
    one, other = session_of(run, tmp_path), session_of(run, tmp_path)
    choose(one, "left")
    state = choose(other, "right")
    assert "was changed by another session; end the other one" in state["fault"] and state["rated"] == 0
    assert [vote["choice"] for vote in read_votes(one.path)] == ["left"]


def test_a_run_in_an_object_store_is_rated_and_its_votes_are_saved_there(run: Path, s3: Path) -> None:
    copy_tree(run, s3 / "run")
    session = session_of(s3 / "run", s3 / "run" / VOTES)
    for choice in ("left", "tie", "undo", "right"):
        choose(session, choice)
    again = session_of(s3 / "run", s3 / "run" / VOTES)
    assert [vote["choice"] for vote in read_votes(again.path)] == ["left", "right"] and shown(again)["rated"] == 2
    people = people_of(RunFolder(s3 / "run", foreign=True), s3 / "run" / VOTES)
    assert people is not None and people["num_votes"] == 2


# --- the server


@pytest.fixture
def server(run: Path, tmp_path: Path) -> Iterator[PageServer]:
    session = session_of(run, tmp_path / "votes")
    with PageServer(session.answer, accept=session.accept, token=TOKEN) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def status_of(server: PageServer, method: str, path: str, body: bytes = b"", **headers: str | None) -> int:
    """Status of an answer; headers of a page of the server, unless given, where `None` leaves one out."""
    own = f"127.0.0.1:{server.server_port}"
    given = {
        "Host": own,
        "Origin": f"http://{own}",
        "Content-Type": "application/json",
        "Content-Length": str(len(body)),
    }
    given |= {name.replace("_", "-"): value for name, value in headers.items()}  # type: ignore[dict-item]
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    for name, value in given.items():
        if value is not None:
            connection.putheader(name, value)
    connection.endheaders(body)
    status = connection.getresponse().status
    connection.close()
    return status


def test_fault_64_only_a_page_of_the_server_with_the_token_can_vote(server: PageServer) -> None:
    pair = json.load(urllib.request.urlopen(f"{server.url}pair", timeout=60))["pair"]
    body, path = json.dumps({"pair": pair, "choice": "left"}).encode(), f"/{TOKEN}/vote"
    own = f"127.0.0.1:{server.server_port}"
    refused = {
        "no token": status_of(server, "POST", "/vote", body),
        "another token": status_of(server, "POST", "/t0keN/vote", body),
        "a longer token": status_of(server, "POST", f"/{TOKEN}x/vote", body),
        "another site": status_of(server, "POST", path, body, Origin="https://attacker.example"),
        "a sandboxed page": status_of(server, "POST", path, body, Origin="null"),
        "no browser": status_of(server, "POST", path, body, Origin=None),
        "another port": status_of(server, "POST", path, body, Origin="http://127.0.0.1:1"),
        "a name that leads here": status_of(
            server, "POST", path, body, Host="evil.example", Origin="http://evil.example"
        ),
        "a form": status_of(server, "POST", path, body, Content_Type="text/plain"),
        "too large": status_of(server, "POST", path, b" " * (MAX_BODY_BYTES + 1)),
        "no length": status_of(server, "POST", path, Content_Length=None),
        "a length below 0": status_of(server, "POST", path, Content_Length="-1"),
        "GET": status_of(server, "GET", path),
        "another method": status_of(server, "PUT", path, body),
    }
    assert refused == {
        "no token": 404,
        "another token": 404,
        "a longer token": 404,
        "another site": 403,
        "a sandboxed page": 403,
        "no browser": 403,
        "another port": 403,
        "a name that leads here": 421,
        "a form": 415,
        "too large": 413,
        "no length": 413,
        "a length below 0": 413,
        "GET": 404,
        "another method": 501,
    }
    assert json.load(urllib.request.urlopen(f"{server.url}pair", timeout=60))["rated"] == 0
    assert status_of(server, "POST", path, body, Host=own) == 200
    assert json.load(urllib.request.urlopen(f"{server.url}pair", timeout=60))["rated"] == 1


def test_fault_64_without_the_token_nothing_is_shown_and_no_path_leads_to_a_file(server: PageServer) -> None:
    state = json.load(urllib.request.urlopen(f"{server.url}pair", timeout=60))
    for path in ("", "pair", "rating.js", f"image/{state['left']}"):
        assert status_of(server, "GET", f"/{TOKEN}/{path}") == 200
        assert status_of(server, "GET", f"/{path}") == status_of(server, "GET", f"/other/{path}") == 404
    for path in ("../config.yaml", "image/../../config.yaml", "%2e%2e/config.yaml", "//etc/passwd", "live.js"):
        assert status_of(server, "GET", f"/{TOKEN}/{path}") == 404
    with urllib.request.urlopen(server.url, timeout=60) as answer:
        policy, page = answer.headers["Content-Security-Policy"], answer.read().decode()
        assert answer.headers["Referrer-Policy"] == "no-referrer", "the address holds the token"
    assert (
        "default-src 'none'" in policy
        and "script-src 'self'" in policy
        and "http" not in page.replace("http-equiv", "")
    )


def test_a_server_that_accepts_nothing_refuses_every_post(run: Path) -> None:
    with PageServer(lambda path: None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        assert status_of(server, "POST", "/vote", b"{}") == 404
        server.shutdown()
        thread.join()


# --- the command


def test_rate_prints_the_address_and_at_ctrl_c_the_result(run: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cdpo_ray", "rate", str(run), "--voter", "ana", "--out", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout and process.stderr
        url = process.stdout.readline().strip()
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", url)
        for _ in range(NUM_PAIRS):
            pair = json.load(urllib.request.urlopen(f"{url}pair", timeout=60))["pair"]
            headers = {"Content-Type": "application/json", "Origin": url[: url.index("/", 8)]}
            body = json.dumps({"pair": pair, "choice": "left"}).encode()
            urllib.request.urlopen(urllib.request.Request(f"{url}vote", body, headers), timeout=60).close()
        process.send_signal(signal.SIGINT)
        printed = process.stdout.read()
        assert (process.wait(60), process.stderr.read()) == (0, "")
    assert printed.startswith(f"{NUM_PAIRS} of {NUM_PAIRS} pairs rated: {tmp_path / HELDOUT / 'ana.jsonl'}\n")
    assert f"people: {NUM_PAIRS} votes (0 ties) on {NUM_PROMPTS} prompts by ana: win rate of the fine-tuned" in printed
    assert re.search(r"agreement with people, chance is 50 %: clip \d+ % \[.*\] %, oracle \d+ % \[", printed)
    assert "left image preferred: 100 % [100, 100] %; far from 50 %" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--voter", "../ana"],
            "`--voter` must be up to 64 letters, digits, - and _, the first a letter or digit, got",
        ),
        (["--voter", ""], "`--voter` must be up to 64 letters"),
        (["--export", "votes.csv"], "`--export` must end in .parquet, got votes.csv"),
        (["--voter", "ana", "--export", "votes.parquet"], "there are no votes on images of this run"),
        (["--voter", "ana", "--port", "99999"], "`--port` 99999: cannot be used"),
    ],
)
def test_wrong_arguments_are_named_and_nothing_is_written(
    arguments: list[str], message: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rate", str(run), *arguments]) == 2
    assert message in capsys.readouterr().err and not (run / "votes").exists()


def test_a_run_that_is_not_evaluated_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import shutil

    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "5-evaluation")
    assert main(["rate", str(copy), "--voter", "ana"]) == 2
    assert "5-evaluation: is missing or not finished; run the step that makes it first" in capsys.readouterr().err


# --- a person at a browser


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    browser = Browser(tmp_path / "profile")
    yield browser
    browser.close()


READY = 'document.getElementById("count")?.textContent.startsWith("{} of ")'
ENABLED = '&& !document.getElementById("choose-left").disabled'
SHOWN_BYTES = """
Promise.all(["left", "right"].map(async (side) => {
  const image = document.getElementById(side);
  if (!image.complete || image.naturalWidth !== 8) throw new Error(side);
  return [...new Uint8Array(await (await fetch(image.src)).arrayBuffer())];
}))
"""


@pytest.mark.slow
def test_a_person_rates_pairs_by_keys_and_clicks_without_seeing_which_model_made_them(
    server: PageServer, browser: Browser, tmp_path: Path
) -> None:
    path = votes_path(tmp_path / "votes", HELDOUT, "ana")
    browser.open(server.url, width=1280)
    lefts = []

    def votes_after(number: int) -> list[Vote]:
        ready = READY.format(number)
        browser.wait_for(ready if number == NUM_PAIRS else f"{ready} {ENABLED}")
        return read_votes(path)

    def seen() -> tuple[str, str]:
        """Digests of the images on the left and on the right, as the browser has them."""
        left, right = (digest_of(bytes(each)) for each in browser.evaluate(SHOWN_BYTES))
        page = browser.evaluate("document.documentElement.outerHTML")
        assert not re.search(r"base-|tuned", page)
        return left, right

    assert votes_after(0) == []
    for number, (key, choice) in enumerate([("1", "left"), ("2", "right"), ("3", "tie")], start=1):
        images = seen()
        browser.press(key)
        vote = votes_after(number)[-1]
        assert (vote["choice"], vote["left_digest"], vote["right_digest"]) == (choice, *images)
        last = images
    browser.press("u")
    assert [vote["choice"] for vote in votes_after(2)] == ["left", "right"]
    assert seen() == last, "the pair is shown again, with the same sides"
    for key in ("4", "x", "Enter"):
        browser.press(key)
    for number, (element, choice) in enumerate(
        [("choose-left", "left"), ("choose-tie", "tie"), ("choose-right", "right"), ("right", "right")], start=3
    ):
        browser.click(element)
        assert votes_after(number)[-1]["choice"] == choice
    browser.click("undo")
    assert len(votes_after(5)) == 5
    for number in range(6, NUM_PAIRS + 1):
        prompt = browser.evaluate('document.getElementById("prompt").textContent')
        if prompt == HOSTILE:
            lefts.append(prompt)
        browser.press("1")
        votes_after(number)
    assert lefts and browser.evaluate('document.querySelectorAll("#prompt *").length') == 0, "prompts stay text"
    assert not browser.evaluate('document.getElementById("done").hidden')
    assert {vote["left"].partition("-")[0] for vote in read_votes(path)} == {"base", "tuned"}
    loaded = browser.evaluate('performance.getEntriesByType("resource").map((entry) => entry.name)')
    favicon = f"http://127.0.0.1:{server.server_port}/favicon.ico"
    assert loaded and all(each.startswith(server.url) or each == favicon for each in loaded)
    browser.press("u")
    assert len(votes_after(NUM_PAIRS - 1)) == NUM_PAIRS - 1


@pytest.mark.slow
def test_the_page_fits_a_narrow_and_a_wide_window(server: PageServer, browser: Browser) -> None:
    for width in (500, 1280):
        browser.open(server.url, width=width)
        browser.wait_for(f"{READY.format(0)} {ENABLED}")
        assert browser.evaluate("document.documentElement.scrollWidth") <= width
        boxes = {name: browser.evaluate(box_of(name)) for name in ("left", "right", "choose-right", "undo", "progress")}
        assert all(box["left"] >= 0 and box["right"] <= width and box["bottom"] <= 900 for box in boxes.values()), boxes
        assert boxes["left"]["right"] < boxes["right"]["left"] and boxes["left"]["top"] == boxes["right"]["top"]
        if folder := os.environ.get("CDPO_TEST_SCREENSHOTS"):
            (Path(folder) / f"rate-{width}.png").write_bytes(browser.screenshot())


@pytest.mark.slow
def test_the_page_says_that_a_choice_was_not_saved_if_the_command_has_ended(
    run: Path, tmp_path: Path, browser: Browser
) -> None:
    session = session_of(run, tmp_path / "votes")
    with PageServer(session.answer, accept=session.accept, token=TOKEN) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        browser.open(server.url, width=1280)
        browser.wait_for(f"{READY.format(0)} {ENABLED}")
        server.shutdown()
        thread.join()
    browser.press("1")
    browser.wait_for('document.getElementById("fault").textContent.startsWith("The last choice was not saved")')
    assert not session.path.exists()
