"""The page over HTTP: its address, its token, its parts, and what happens on a click."""

import asyncio
import socket
import threading
import urllib.error
import urllib.request
from contextlib import closing, contextmanager

import pytest
import torch
from bokeh.client import pull_session
from bokeh.document import Document
from tornado.ioloop import IOLoop

import pyro_vae as pv
from pyro_vae.errors import UsageError
from pyro_vae.explore.cards import Cards
from pyro_vae.explore.page import Page, Session
from pyro_vae.explore.server import Server
from pyro_vae.explore.view import HeldOut, view


@contextmanager
def answering(page):
    """A server in a thread of its own."""
    ready, found = threading.Event(), []

    def work():
        asyncio.set_event_loop(asyncio.new_event_loop())
        found.append((Server(page), IOLoop.current()))
        ready.set()
        found[0][0].run()
        found[0][1].close(all_fds=True)

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(10)
    server, loop = found[0]
    try:
        yield server
    finally:
        loop.add_callback(loop.stop)
        thread.join(10)
        assert not thread.is_alive()


def get(address, **headers):
    """The status, the type and the body of an answer."""
    request = urllib.request.Request(address, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.headers["Content-Type"], error.read().decode()


@pytest.fixture(scope="module")
def page():
    torch.manual_seed(0)
    pair = pv.HierarchicalVAE.mlp((5,), latent_dim=(4, 2), hidden=(8,), likelihood=pv.Gaussian)
    held = HeldOut(
        torch.randn(9, 5), ids=[f"<row {i}>" for i in range(9)], labels=list("aabbccabc")
    )
    return Page(view(pair, held, num_samples=30), Cards(), "A run <of> mine", steps=5)


@pytest.fixture(scope="module")
def server(page):
    with answering(page) as found:
        yield found


def test_the_page_and_its_files_come_from_the_server(server):
    status, kind, text = get(server.address)
    assert (status, kind.split(";")[0]) == (200, "text/html")
    assert "A run &lt;of&gt; mine" in text
    sources = [part.split('"')[0] for part in text.split('src="')[1:]]
    assert sources
    assert all(one.startswith("static/") or server.token in one for one in sources)
    base = server.address.rpartition("/")[0]
    script = next(one for one in sources if "bokeh" in one)
    path = script.split("?")[0]
    where = f"{base}{path}" if path.startswith("/") else f"{base}/{path}"
    assert get(where)[0] == 200
    assert "cdn." not in text


def test_requests_without_the_token_get_403(server):
    base = server.address.rpartition("/")[0]
    script = "static/js/bokeh.min.js"
    wrong = server.token[:-1] + ("A" if server.token[-1] != "A" else "B")
    paths = ["", "/", "/favicon.ico", f"/{script}", "/ws", "/card/0/0", f"/{wrong}", f"/{wrong}/ws"]
    paths += [f"/{wrong}/card/0/0", f"/{wrong}/{script}", f"/x/{server.token}", "/%2e%2e/x", "//"]
    for path in paths:
        assert get(base + path)[0] == 403, path
    assert get(base, Cookie=f"token={server.token}")[0] == 403
    assert len(server.token) >= 43  # 256 bits


def test_the_port_is_open_on_the_loopback_address_only(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=5):
        pass
    for other in ("127.0.0.2", "::1"):
        family = socket.AF_INET6 if ":" in other else socket.AF_INET
        with socket.socket(family) as one:
            one.settimeout(5)
            assert one.connect_ex((other, server.port)) != 0


def test_a_session_opens_over_the_websocket(server):
    with closing(pull_session(url=server.address)) as session:
        names = {root.name for root in session.document.roots}
        assert {"plane", "table", "sliders", "datum"} <= names
        assert (
            len(session.document.get_model_by_name("plane").renderers[0].data_source.data["up"])
            == 9
        )
    with pytest.raises(OSError, match="403"):
        pull_session(url=server.address.rpartition("/")[0])


def test_each_point_has_a_card(server, page):
    status, kind, text = get(f"{server.address}/card/1/3")
    assert (status, kind) == (200, "image/svg+xml")
    assert text == page.card(1, 3)
    assert get(f"{server.address}/card/2/0")[0] == 404
    assert get(f"{server.address}/card/0/9")[0] == 404


def test_two_servers_have_two_tokens(server, page):
    with answering(Page(page.view, page.cards, "other")) as other:
        assert other.token != server.token
        base = other.address.rpartition("/")[0]
        assert get(f"{base}/{server.token}")[0] == 403


def test_a_port_that_is_taken(server, page):
    with pytest.raises(UsageError, match=f"port {server.port} cannot be used"):
        Server(page, server.port)


def opened(page):
    """A session, and its document with the callbacks that wait."""
    document = Document()
    return Session(page, document), document


def test_the_axes_the_colors_and_the_levels_are_chosen(page):
    session, _ = opened(page)
    sizes = [level.codes.shape[1] for level in page.view.levels]
    wide, narrow = sizes.index(4), sizes.index(2)
    session.chosen.value = str(wide)
    level = page.view.levels[wide]
    first, second = (str(unit) for unit in level.order[:2])
    assert (session.across.value, session.up.value) == (first, second)
    assert session.source.data["across"] == level.codes[:, int(first)].tolist()
    session.across.value = "component 1"
    assert session.source.data["across"] == level.coordinates("component 1").tolist()
    assert len(set(session.source.data["color"])) == 3
    session.color.value = "one color"
    assert len(set(session.source.data["color"])) == 1
    session.chosen.value = str(narrow)  # it has no component
    other = page.view.levels[narrow]
    assert session.level is other
    assert session.source.data["across"] == other.coordinates(session.across.value).tolist()
    assert session.source.data["card"][2] == f"{page.prefix}/card/{narrow}/2"


def test_a_slider_decodes(page):
    session, _ = opened(page)
    level = session.level
    assert [knob.value for knob in session.knobs] == level.codes[0, level.order].tolist()
    session.knobs[0].value = 1.25
    session.knobs[0].trigger("value_throttled", None, 1.25)  # as on release of the mouse
    made = page.view.moved(0, level.site, {level.order[0]: 1.25})
    assert page.compared(level, 0, {"decoded": made}) in session.moved.text
    assert "1 unit differs" in session.moved.text


def test_a_click_refines_the_datum():
    torch.manual_seed(0)
    pair = pv.VAE.mlp((5,), latent_dim=2, hidden=(8,), likelihood=pv.Gaussian)
    held = HeldOut(torch.randn(9, 5), ids=[f"<row {i}>" for i in range(9)])
    page = Page(view(pair, held, num_samples=30), Cards(), "run", steps=5)
    session, document = opened(page)
    session.source.selected.indices = [6]
    assert "Datum &lt;row 6&gt;" in session.datum.text
    assert "Refining" in session.change.text
    (waiting,) = document.session_callbacks
    waiting.callback()
    found = page.view.refined(6, steps=page.steps)
    assert f"{found.after.elbo:.3f}" in session.change.text
    site, axis = session.level.site, int(session.across.value)
    ends = [means[site][0, axis].item() for means in found.means]
    assert [session.moves.data["x0"], session.moves.data["x1"]] == [[ends[0]], [ends[1]]]


def test_a_click_on_another_datum_replaces_the_first(page):
    session, document = opened(page)
    session.source.selected.indices = [6]
    (first,) = document.session_callbacks
    session.source.selected.indices = [2]
    first.callback()
    assert "Refining" in session.change.text


def test_a_discrete_latent_colors_the_points_and_has_no_sliders():
    torch.manual_seed(0)
    pair = pv.MixtureVAE.mlp((4,), 3, latent_dim=2, hidden=(4,))
    shown = view(pair, HeldOut(torch.rand(20, 4).round()), 30)
    session, _ = opened(Page(shown, Cards(), "run"))
    session.color.value = "latent k"
    classes = pv.predict(pair, shown.held.x).argmax(-1)
    colors = session.source.data["color"]
    assert len(set(colors)) == len(classes.unique())
    assert len(set(zip(colors, classes.tolist(), strict=True))) == len(classes.unique())
    session.chosen.value = str([level.site for level in shown.levels].index("k"))
    assert session.moved.text == "The latent is discrete."
    assert not session.knobs
