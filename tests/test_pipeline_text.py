"""A pipeline's text: what it may say, and that printing and reading undo each other."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsmoe_compiler.ir.errors import InputError
from dsmoe_compiler.ir.graph import ProgramGraph
from dsmoe_compiler.ir.passes import Pass, PassLog
from dsmoe_compiler.pipeline import DEFAULT, PASSES, steps_of
from dsmoe_compiler.pipeline_text import options, parse, print_pipeline


@dataclass(frozen=True)
class _Idle:
    """Does nothing."""

    def run(self, graph: ProgramGraph, log: PassLog) -> bool:
        return False


@dataclass(frozen=True)
class Plain(_Idle):
    """Has no options."""

    name: ClassVar[str] = "plain"


@dataclass(frozen=True)
class Rich(_Idle):
    """Has an option of every type."""

    name: ClassVar[str] = "rich"
    count: int = 4
    scale: float = 0.5
    exact: bool = False
    label: str = ""
    mode: Literal["fast", "two words", 8, True] = "fast"
    sizes: tuple[int, ...] = ()
    pair: tuple[str, float] = ("a", 1.0)


@dataclass(frozen=True)
class Needy(_Idle):
    """Cannot do without its option, and wants it positive."""

    name: ClassVar[str] = "needy"
    bits: int

    def __post_init__(self) -> None:
        if self.bits <= 0:
            raise ValueError(f"{self.bits} bits are too few")


KNOWN: dict[str, type[Pass]] = {each.name: each for each in (Plain, Rich, Needy)}
numbers = st.floats(allow_nan=False)
rich = st.builds(
    Rich,
    count=st.integers(),
    scale=numbers,
    exact=st.booleans(),
    label=st.text(),
    mode=st.sampled_from(["fast", "two words", 8, True]),
    sizes=st.lists(st.integers()).map(tuple),
    pair=st.tuples(st.text(), numbers),
)
pipelines = st.lists(st.one_of(st.just(Plain()), rich, st.builds(Needy, bits=st.integers(1)))).map(tuple)


@given(pipelines)
def test_reading_undoes_printing(steps: tuple[Pass, ...]) -> None:
    text = print_pipeline(steps)
    assert parse(text, KNOWN) == steps
    assert print_pipeline(parse(text, KNOWN)) == text


@given(st.text(alphabet="plainrch{}=,\"' \\8"))
def test_any_other_text_is_an_input_error(text: str) -> None:
    try:
        steps = parse(text, KNOWN)
    except InputError:
        return
    assert parse(print_pipeline(steps), KNOWN) == steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("", ()),
        (" \n ", ()),
        ("plain", (Plain(),)),
        ("plain{}", (Plain(),)),
        (" plain , plain ", (Plain(), Plain())),
        ("rich{count=8}", (Rich(count=8),)),
        ("rich { count = -8  scale=1e-6 }", (Rich(count=-8, scale=1e-6),)),
        ("rich{exact}", (Rich(exact=True),)),
        ("rich{exact count=1}", (Rich(exact=True, count=1),)),
        ("rich{exact=True}", (Rich(exact=True),)),
        ("rich{mode=8}", (Rich(mode=8),)),
        ("rich{mode=true}", (Rich(mode=True),)),
        ("rich{mode='two words'}", (Rich(mode="two words"),)),
        ('rich{label="a \\"b\\", c"}', (Rich(label='a "b", c'),)),
        ("rich{label='a \\n'}", (Rich(label="a \\n"),)),
        ("rich{sizes=1,2,3},plain", (Rich(sizes=(1, 2, 3)), Plain())),
        ("rich{sizes={} pair={b,2}}", (Rich(sizes=(), pair=("b", 2.0)),)),
        ("needy{bits=4}", (Needy(4),)),
    ],
)
def test_what_one_may_write(text: str, steps: tuple[Pass, ...]) -> None:
    assert parse(text, KNOWN) == steps


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("plian", "unknown pass 'plian'; the nearest names are: plain"),
        ("zzz", "unknown pass 'zzz'; the names are: plain, rich, needy"),
        ("plain{x=1}", "plain: unknown option 'x'; there is none"),
        ("rich{scal=1}", "rich: unknown option 'scal'; the nearest names are: scale"),
        ("rich{name=plain}", "rich: unknown option 'name'"),
        ("rich{count=1 count=2}", "rich: option 'count' is given twice"),
        ("rich{count=x}", "option 'count' wants int, not 'x'"),
        ("rich{count=1.5}", "option 'count' wants int, not '1.5'"),
        ("rich{count}", "option 'count' wants int, not nothing"),
        ("rich{count=1,2}", "option 'count' wants int, not '1' '2'"),
        ("rich{scale=half}", "option 'scale' wants float, not 'half'"),
        ("rich{exact=maybe}", "option 'exact' wants bool, not 'maybe'"),
        ("rich{mode=slow}", "option 'mode' wants fast | \"two words\" | 8 | true, not 'slow'"),
        ("rich{sizes=1,x}", "option 'sizes' wants {int, …}, not '1' 'x'"),
        ("rich{pair=a}", "option 'pair' wants {str, float}, not 'a'"),
        ("needy", "needy needs its option bits : int"),
        ("needy{bits=0}", "needy: 0 bits are too few"),
        ("rich{count=1", "the '{' at character 5 is never closed"),
        ("rich{sizes={1,2}", "the '{' at character 5 is never closed"),
        ("rich{sizes={1,2", "it ends at character 16 where '}' should stand"),
        ("rich{count=", "it ends at character 12 where the value of count should stand"),
        ("rich{=1}", "there is '=' at character 6 where an option of rich or '}' should stand"),
        ("plain}", "there is '}' at character 6 where ',' before the next pass should stand"),
        ("plain plain", "there is 'plain' at character 7 where ',' before the next pass should stand"),
        ("plain,", "it ends at character 7 where the name of a pass should stand"),
        (",plain", "there is ',' at character 1 where the name of a pass should stand"),
        ("plain,,plain", "there is ',' at character 7 where the name of a pass should stand"),
        ("rich{label='a}", "the quote at character 12 is never closed"),
        ('rich{label="\\q"}', "the text at character 12 has an escape that JSON does not know"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(text: str, says: str) -> None:
    with pytest.raises(InputError) as caught:
        parse(text, KNOWN)
    line = str(caught.value)
    assert says in line
    assert line.startswith(f"pipeline {text!r}: ")
    assert "\n" not in line


def test_every_option_is_spelled_out() -> None:
    wanted = 'plain,rich{count=4 scale=0.5 exact=false label="" mode=fast sizes={} pair={a,1.0}}'
    assert print_pipeline((Plain(), Rich())) == wanted


def test_text_stays_readable() -> None:
    assert 'label="zwei Wörter"' in print_pipeline((Rich(label="zwei Wörter"),))


def test_options_name_type_and_default() -> None:
    assert [str(option) for option in options(Rich)] == [
        "count : int = 4",
        "scale : float = 0.5",
        "exact : bool = false",
        'label : str = ""',
        'mode : fast | "two words" | 8 | true = fast',
        "sizes : {int, …} = {}",
        "pair : {str, float} = {a,1.0}",
    ]
    assert [str(option) for option in options(Needy)] == ["bits : int"]
    assert options(Plain) == ()


def test_an_option_of_another_type_is_the_authors_error() -> None:
    @dataclass(frozen=True)
    class Odd(_Idle):
        name: ClassVar[str] = "odd"
        where: bytes = b""

    with pytest.raises(TypeError, match="an option cannot be a <class 'bytes'>"):
        parse("odd{where=x}", {"odd": Odd})


def test_the_registry_names_every_pass_and_the_default_pipeline_is_made_of_it() -> None:
    assert all(step.name == name for name, step in PASSES.items())
    assert [type(step) for step in DEFAULT] == [PASSES[step.name] for step in DEFAULT]
    assert steps_of(print_pipeline(DEFAULT)) == steps_of(None) == steps_of(list(DEFAULT)) == DEFAULT
