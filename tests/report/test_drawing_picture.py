"""What a reader sees: nothing overlaps, nothing is missing, nothing comes from elsewhere."""

import re
from html.parser import HTMLParser
from itertools import combinations
from xml.etree import ElementTree

import pytest

from dsmoe_compiler.report.drawing.compose import compose
from dsmoe_compiler.report.drawing.draw import DRAWINGS
from dsmoe_compiler.report.drawing.fold import sketch
from dsmoe_compiler.report.drawing.layout import Box, place
from dsmoe_compiler.report.drawing.svg import svg
from tests.report.layers_to_draw import FEW, LAYERS, drawn, inspected

SVG = "{http://www.w3.org/2000/svg}"


@pytest.mark.parametrize("name", LAYERS)
def test_no_two_labels_overlap(name: str) -> None:
    scene = compose(drawn(name))
    assert len(scene.labels) > 20
    for a, b in combinations(scene.labels, 2):
        assert not a.box.meets(b.box), f"{a.text!r} and {b.text!r}"


@pytest.mark.parametrize("name", LAYERS)
def test_labels_lie_within_the_picture_and_their_cards(name: str) -> None:
    scene = compose(drawn(name))
    page = Box(0, 0, scene.width, scene.height)
    for group in scene.groups:
        cards = [shape.box for shape in group.shapes if shape.look.startswith("card")]
        for label in group.labels:
            assert _within(label.box, cards[-1] if cards else page), label.text


@pytest.mark.parametrize("name", LAYERS)
def test_cards_lie_apart_and_arrows_end_at_them(name: str) -> None:
    drawing = sketch(drawn(name).before)
    laid = place(drawing)
    for a, b in combinations(laid.boxes.values(), 2):
        assert not a.meets(b)
    for (source, target), points in zip(drawing.arrows, laid.arrows, strict=True):
        assert points[0][1] == pytest.approx(laid.boxes[source].bottom, abs=0.2)
        assert points[-1][1] == pytest.approx(laid.boxes[target].y, abs=0.2)
        assert all(a[0] == b[0] or a[1] == b[1] for a, b in zip(points, points[1:], strict=False))


@pytest.mark.parametrize("name", LAYERS)
def test_operators_of_one_role_lie_in_their_field(name: str) -> None:
    drawing = sketch(drawn(name).before)
    laid = place(drawing)
    for card in drawing.cards:
        if card.kind == "operator" and card.role:
            assert _within(laid.boxes[card.key], laid.groups[card.role])


def test_an_svg_says_what_was_and_what_became() -> None:
    root = ElementTree.fromstring(svg(compose(drawn("few"))))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert {"Before", "After", "topk", "index_add", "dsmoe.moe", f"×{FEW}"} <= set(texts)
    assert [t for t in ("router", "permutation", "experts", "combine", "shared") if t in texts] == [
        "router",
        "permutation",
        "experts",
        "combine",
        "shared",
    ]


def test_a_refused_layer_is_drawn_as_it_is_with_its_refusal() -> None:
    anatomy = drawn("refused")
    texts = [label.text for label in compose(anatomy).labels]
    assert anatomy.report.refusal is not None
    assert "After" not in texts and "understanding ended here" in texts
    assert any(text.startswith(anatomy.report.refusal.code) for text in texts)
    assert any(text.startswith("# not fused: ") for text in anatomy.text.splitlines())


@pytest.mark.parametrize("ending", DRAWINGS)
def test_the_same_layer_is_drawn_in_the_same_bytes(ending: str) -> None:
    assert DRAWINGS[ending](inspected("few")) == DRAWINGS[ending](drawn("few"))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("ending", [".svg", ".html"])
def test_nothing_comes_from_elsewhere(ending: str, name: str) -> None:
    made = DRAWINGS[ending](drawn(name)).replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"https?:|\bsrc=|\bhref=|url\(|@import|<link", made)


class _Reader(HTMLParser):
    """Reads a page's texts, and that its tags are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "rect", "path"):
            self.open.append(tag)
        if tag == "pre":
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("rect", "path"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self.open:
            self.texts[-1] += data


@pytest.mark.parametrize("name", ["grouped", "refused"])
def test_a_page_holds_both_texts(name: str) -> None:
    anatomy, reader = drawn(name), _Reader()
    reader.feed(DRAWINGS[".html"](anatomy))
    assert not reader.open
    sides = [anatomy.before, anatomy.after]
    assert reader.texts == [side.text for side in sides if side is not None]


@pytest.mark.parametrize("name", LAYERS)
def test_graphviz_text_declares_what_it_joins(name: str) -> None:
    lines = [line.strip() for line in DRAWINGS[".dot"](drawn(name)).splitlines()]
    nodes = {line.split(" [")[0] for line in lines if re.match(r'"[^"]*" \[label=', line)}
    arrows = [line.rstrip(";").split(" -> ") for line in lines if " -> " in line]
    assert arrows and all(end in nodes for arrow in arrows for end in arrow)
    opened, closed = (sum(line.endswith(brace) for line in lines) for brace in "{}")
    assert opened == closed


def _within(inner: Box, outer: Box) -> bool:
    across = outer.x <= inner.x and inner.right <= outer.right
    return across and outer.y <= inner.y and inner.bottom <= outer.bottom
