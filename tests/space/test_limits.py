"""The page over real sockets, asked by programs that mean no good; started as `python space/app.py` starts it."""

import asyncio
import concurrent.futures
import contextlib
import json
import os
import socket
import threading
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from settings import MAX_IMAGE_BYTES, MAX_WAITING


HOST = "127.0.0.1"


@pytest.fixture(scope="module")
def page(app):
    """Address of the page, in this process. As for `app`, gradio is called in a loop, or leaves its own."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    options = {"server_name": HOST, "server_port": port, "prevent_thread_lock": True, "quiet": True}

    async def launch():
        app.demo.launch(**app.LAUNCH, **options)

    asyncio.run(launch())
    yield f"http://{HOST}:{port}"
    app.demo.close()


def call(page, name, *data):
    """What the page's interface for programs answers: the last event and what it says."""
    request = urllib.request.Request(
        f"{page}/gradio_api/call/{name}",
        json.dumps({"data": data}).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        event = json.load(answer)["event_id"]
    with urllib.request.urlopen(f"{page}/gradio_api/call/{name}/{event}", timeout=60) as answer:
        lines = answer.read().decode().strip().splitlines()
    return lines[-2].removeprefix("event: "), lines[-1].removeprefix("data: ")


def upload(page, content, name="picture.png"):
    boundary = "b0undary"
    head = f'--{boundary}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
    body = head.encode() + content + f"\r\n--{boundary}--\r\n".encode()
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary}"}
    with urllib.request.urlopen(urllib.request.Request(f"{page}/gradio_api/upload", body, kind), timeout=30) as answer:
        return json.load(answer)


def file_at(path, **more):
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **more}


def test_an_upload_that_is_too_large_is_refused(page):
    assert upload(page, b"x" * 1000)
    with pytest.raises(urllib.error.HTTPError) as refused:
        upload(page, bytes(MAX_IMAGE_BYTES + 1))
    assert refused.value.code == 413
    refused.value.close()


def test_what_is_uploaded_lies_where_uploads_lie(page):
    from gradio.utils import get_upload_folder

    for name in ("../../escaped.png", "/tmp/escaped.png", "a\\..\\b.png"):
        (path,) = upload(page, b"x", name)
        assert Path(path).resolve().is_relative_to(Path(get_upload_folder()).resolve())
    with pytest.raises(urllib.error.HTTPError) as refused:
        upload(page, b"x", "..")
    assert refused.value.code == 400
    refused.value.close()


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../etc/passwd", "space/app.py", "http://127.0.0.1:1/a.png"])
def test_no_file_of_this_machine_can_be_asked_for(page, path):
    event, told = call(page, "ask", file_at(path), "what is it?")
    assert event == "error" and "root:" not in told
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{page}/gradio_api/file={path}", timeout=30)
    assert refused.value.code in (403, 404)
    refused.value.close()


def test_visitors_are_told_what_is_wrong_and_nothing_else(page):
    (path,) = upload(page, b"no picture")
    event, told = call(page, "ask", file_at(path), "what is it?")
    assert event == "error" and "cannot be read as an image" in told and path not in told
    for data in ((None, "what?"), ("text", 3), ([], {}), ({"path": 3}, None), (file_at(path), "\ud800")):
        event, told = call(page, "ask", *data)
        assert event == "error" and "Traceback" not in told
    for data in (("x", 0, "go", ["AEGIS"], 0), (0, "x", "go", ["AEGIS"], 0), (0, 0, 3, "AEGIS", [])):
        event, told = call(page, "act", *data)
        assert event == "error" and "Traceback" not in told


def test_visitors_beyond_the_line_are_sent_away(app, page, monkeypatch):
    """One is served, so many wait, and the next one is told at once."""
    entered, release = threading.Event(), threading.Event()
    function = next(each for each in app.demo.fns.values() if each.api_name == "ask")

    def slowly(*arguments):
        entered.set()
        assert release.wait(30)
        return "done"

    monkeypatch.setattr(function, "fn", slowly)
    statuses = []

    def ask():
        request = urllib.request.Request(
            f"{page}/gradio_api/call/ask",
            json.dumps({"data": [None, "what?"]}).encode(),
            {"Content-Type": "application/json"},
        )
        with contextlib.suppress(urllib.error.HTTPError), urllib.request.urlopen(request, timeout=30) as answer:
            statuses.append(answer.status)
            return json.load(answer)["event_id"]

    try:
        first = ask()
        assert entered.wait(30)
        line = [ask() for _ in range(MAX_WAITING + 5)]
        assert len([event for event in line if event is not None]) == MAX_WAITING
    finally:
        release.set()
    for event in (first, *line):
        if event is not None:
            with urllib.request.urlopen(f"{page}/gradio_api/call/ask/{event}", timeout=60) as answer:
                assert b"done" in answer.read()


def test_a_question_waits_while_an_example_is_answered(app, page, monkeypatch):
    entered, release, asked = threading.Event(), threading.Event(), threading.Event()
    events = app.demo.fns
    example = next(index for index, each in events.items() if getattr(each.fn, "func", None) is app.answer_example)

    def slowly(*arguments):
        entered.set()
        assert release.wait(30)
        return None, "", "done"

    def answer(*arguments):
        asked.set()
        return "done"

    monkeypatch.setattr(events[example], "fn", slowly)
    monkeypatch.setattr(next(each for each in events.values() if each.api_name == "ask"), "fn", answer)
    join = {"data": [], "fn_index": example, "session_hash": "visitor"}
    request = urllib.request.Request(
        f"{page}/gradio_api/queue/join", json.dumps(join).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=30):
        pass
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        try:
            assert entered.wait(30)
            told = pool.submit(call, page, "ask", None, "what?")
            assert not asked.wait(0.5)
        finally:
            release.set()
        assert told.result(60) == ("complete", '["done"]')


def test_traffic_is_not_shown_to_visitors(page):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{page}/monitoring", timeout=30)
    assert refused.value.code in (403, 404)
    refused.value.close()


@pytest.mark.parametrize(
    ("options", "host", "warned"), [((), "127.0.0.1", False), (("--host", "0.0.0.0"), "0.0.0.0", True)]
)
def test_it_listens_on_this_machine_alone_unless_told_otherwise(monkeypatch, capsys, options, host, warned):
    from hf_aegis.cli import main, space

    started = []
    monkeypatch.setattr(space.runpy, "run_path", lambda path, run_name: started.append(path))
    monkeypatch.setattr(space.sys, "path", [*space.sys.path])
    for name in ("GRADIO_SERVER_NAME", "GRADIO_SERVER_PORT"):
        monkeypatch.setenv(name, "")
    assert main(["space", *options]) == 0
    assert len(started) == 1 and os.environ["GRADIO_SERVER_NAME"] == host
    assert ("without authentication" in capsys.readouterr().err) == warned
