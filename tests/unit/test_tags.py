"""What a tag means, case by case, and what is refused."""

import time

import pytest

from lib_lora.prompt.tags import LoraRequest, parse_numbers, parse_prompt, writable_name

# Tag, name, te, unet, dyn. Expected values: the WebUI 1.10.1 was run on these tags.
WEBUI_TABLE = [
    ("<lora:a>", "a", 1.0, 1.0, None),
    ("<lora:a:0.5>", "a", 0.5, 0.5, None),
    ("<lora:a:0.5:0.7>", "a", 0.5, 0.7, None),
    ("<lora:a:0.5:0.7:16>", "a", 0.5, 0.7, 16),
    ("<lora:a:te=0.2>", "a", 0.2, 0.2, None),
    ("<lora:a:unet=0.2>", "a", 1.0, 0.2, None),
    ("<lora:a:0.5:unet=0.2>", "a", 0.5, 0.2, None),
    ("<lora:a:0.5:te=0.2>", "a", 0.2, 0.2, None),
    ("<lora:a:0.5:0.7:te=0.2>", "a", 0.2, 0.7, None),
    ("<lora:a:te=0.2:unet=0.3>", "a", 0.2, 0.3, None),
    ("<lora:a:te=0.2:0.5:0.7>", "a", 0.2, 0.7, None),
    ("<lora:unet=0.2:a:0.5>", "a", 0.5, 0.2, None),
    ("<lora:te=0.2:unet=0.3:dyn=4:a>", "a", 0.2, 0.3, 4),
    ("<lora:a:te=0.2:te=0.3>", "a", 0.3, 0.3, None),
    ("<lora:a:te=x:te=0.3>", "a", 0.3, 0.3, None),
    ("<lora:a:1:dyn=0>", "a", 1.0, 1.0, 0),
    ("<lora:a:dyn=8>", "a", 1.0, 1.0, 8),
    ("<lora:a:1:1:4:dyn=8>", "a", 1.0, 1.0, 8),
    ("<lora:a:1:1: 4 >", "a", 1.0, 1.0, 4),
    ("<lora:my lora (v1).2:0.8>", "my lora (v1).2", 0.8, 0.8, None),
    ("<lora: a : 0.8 >", " a ", 0.8, 0.8, None),
    ("<lora: :1>", " ", 1.0, 1.0, None),
    ("<lora:a=b:1>", "1", 1.0, 1.0, None),
    ("<lora:a=b=c:1>", "a=b=c", 1.0, 1.0, None),
    ("<lora:a==b:1>", "a==b", 1.0, 1.0, None),
    ("<lora:sub/dir/a:1>", "sub/dir/a", 1.0, 1.0, None),
    ("<lora:../../etc/passwd:1>", "../../etc/passwd", 1.0, 1.0, None),
    ("<lora:a<b:1>", "a<b", 1.0, 1.0, None),
    ("<lora:<lora:1>", "<lora", 1.0, 1.0, None),
    ("<lora:a\nb:1>", "a\nb", 1.0, 1.0, None),
    ("<lora:絵,画:1>", "絵,画", 1.0, 1.0, None),
    ("<lora:a:-0.5>", "a", -0.5, -0.5, None),
    ("<lora:a:+.5:0>", "a", 0.5, 0.0, None),
    ("<lora:a:1e-1:1E1>", "a", 0.1, 10.0, None),
    ("<lora:a:1_0>", "a", 10.0, 10.0, None),
    ("<lora:a:１.５>", "a", 1.5, 1.5, None),
    ("<lora:a:100:-100>", "a", 100.0, -100.0, None),
    ("<lora:a:0.5:lbw=MIDD:stop=9>", "a", 0.5, 0.5, None),
    ("<lora:a:TE=0.2>", "a", 1.0, 1.0, None),
    ("<lyco:a:0.5:0.7:3>", "a", 0.5, 0.7, 3),
]

# Tag, and what its sentence must hold.
REFUSED = [
    ("<lora:a:>", "te is ''"),
    ("<lora:a:te=>", "te is ''"),
    ("<lora:a:1:unet=>", "unet is ''"),
    ("<lora:a:x>", "te is 'x'"),
    ("<lora:a:x:te=0.5>", "te is 'x'"),
    ("<lora:a:0.8:MIDD>", "unet is 'MIDD'"),
    ("<lora:a:1,5>", "te is '1,5'"),
    ("<lora:a:0x10>", "te is '0x10'"),
    ("<lora:a:nan>", "te is nan"),
    ("<lora:a:1:-inf>", "unet is -inf"),
    ("<lora:a:unet=Infinity>", "unet is Infinity"),
    ("<lora:a:1e999>", "te is 1e999"),
    ("<lora:a:-1e30>", "te is -1e30"),
    ("<lora:a:100.001>", "from -100 to 100"),
    ("<lora:a:1:1:-1>", "dyn is -1"),
    ("<lora:a:dyn=-4>", "dyn is -4"),
    ("<lora:a:dyn=4.0>", "dyn is '4.0'"),
    ("<lora:a:dyn=nan>", "dyn is 'nan'"),
    ("<lora:a:dyn=1000001>", "from 0 to 1000000"),
    ("<lora:a:" + "9" * 5000 + ">", "not a number"),
    ("<lora:a:dyn=" + "9" * 5000 + ">", "not a whole number"),
    ("<lora::1>", "names no LoRA"),
    ("<lora:te=1>", "names no LoRA"),
    ("<lora:a=b>", "names no LoRA"),
    ("<lora:a:1:lbw=1,2,3>", "lbw holds 3 numbers; write 12, 17, 20 or 26"),
    ("<lora:a:1:lbw=" + "1," * 17 + ">", "lbw holds 18 numbers"),
    ("<lora:a:1:lbw=" + "1," * 11 + ">", "number 12 of lbw is ''"),
    ("<lora:a:1:lbw=" + "1," * 11 + "r>", "number 12 of lbw is 'r'"),
    ("<lora:a:1:lbw=" + "1," * 11 + "nan>", "number 12 of lbw is nan"),
    ("<lora:a:1:lbw=" + "1," * 11 + "X*2>", "number 12 of lbw is 'X*2'"),
    ("<lora:a:1:lbw=X+," + "1," * 10 + "1>", "number 1 of lbw is ''"),
    ("<lora:a:1:lbw=X+60," + "1," * 10 + "1:x=60>", "number 1 of lbw is 120.0"),
    ("<lora:a:1:lbw=MIDD:x=>", "x is ''"),
    ("<lora:a:in=x>", "in is 'x'"),
    ("<lora:a:out=inf>", "out is inf"),
    ("<lora:a:lbwe=IN05;attn>", "'IN05;attn' of lbwe is not BLOCKS:ELEMENTS:RATIO"),
    ("<lora:a:lbwe=IN05;attn;x>", "the ratio of lbwe is 'x'"),
    ("<lora:a:lbwe=IN05-OUT12;attn;1>", "'IN05-OUT12' of lbwe is no range of blocks"),
    ("<lora:a:lbwe=" + "a " * 20_000 + ";;1>", "40003 letters"),
]


@pytest.mark.parametrize(("tag", "name", "te", "unet", "dyn"), WEBUI_TABLE)
def test_a_tag_means_what_the_webui_makes_of_it(tag: str, name: str, te: float, unet: float, dyn: int | None) -> None:
    parsed = parse_prompt(f"a {tag} b")
    (request,) = parsed.requests
    assert (request.name, request.te, request.unet, request.dyn, request.raw) == (name, te, unet, dyn, tag)
    assert parsed.text == "a  b"
    assert parsed.problems == ()


@pytest.mark.parametrize(("tag", "said"), REFUSED)
def test_a_bad_tag_is_refused_with_a_sentence_and_the_others_stay(tag: str, said: str) -> None:
    parsed = parse_prompt(f"<lora:good:0.5>{tag}<lora:also good:0.7>.")
    assert [request.name for request in parsed.requests] == ["good", "also good"]
    (problem,) = parsed.problems
    assert problem.raw == tag
    assert said in problem.message
    assert len(problem.message) < 250
    assert parsed.text == "."


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a photo, (blue:1.2), [a:b:0.5]",
        "<hypernet:h:1> <LORA:a:1> <Lora:a:1> <locon:a:1>",
        "<lora:a:1 never closed",
        "<lora:>",
        "<lora>",
        "< lora:a:1>",
        "<lora :a:1>",
        "lora:a:1>",
        "<hypernet:<lora:a:1>",
    ],
)
def test_text_without_lora_tags_is_kept_letter_by_letter(text: str) -> None:
    parsed = parse_prompt(text)
    assert parsed.text == text
    assert parsed.requests == parsed.problems == ()


def test_several_tags_are_taken_out_of_the_text_in_order() -> None:
    parsed = parse_prompt("x <lora:b:1>, <hypernet:h:1>y<lyco:a:0.5>\n<lora:b:0.8><lora:c")
    assert parsed.text == "x , <hypernet:h:1>y\n<lora:c"
    assert [(request.name, request.te) for request in parsed.requests] == [("b", 1.0), ("a", 0.5), ("b", 0.8)]


def test_a_tag_within_another_word_starts_at_its_own_bracket() -> None:
    parsed = parse_prompt("<b<lora:a:1>>")
    assert parsed.text == "<b>"
    assert parsed.requests[0].name == "a"


def test_arguments_without_a_meaning_are_ignored_and_told() -> None:
    tag = "<lora:a:0.5:LBW=MIDD:0.6:note=x:8:seventh:e=m=c>"
    assert parse_prompt(tag).requests == (
        LoraRequest("a", 0.5, 0.6, 8, tag, ("LBW=MIDD", "note=x", "seventh", "e=m=c")),
    )


# Tag, and the block weights it asks for: list or name, elements, thirds, what X stands for.
BLOCK_WEIGHTS = [
    ("<lora:a:1:lbw=MIDD>", ("MIDD", "", (), 1.0)),
    ("<lora:a:1:w=MIDD>", ("MIDD", "", (), 1.0)),
    ("<lora:a:1:w=IND:lbw=MIDD>", ("MIDD", "", (), 1.0)),
    ("<lora:lbw=MIDD:a>", ("MIDD", "", (), 1.0)),
    ("<lora:a:1:0.5:lbwe=ATTNDEEPON>", ("", "ATTNDEEPON", (), 1.0)),
    ("<lora:a:in=0:out=0.5>", ("", "", (("in", 0.0), ("out", 0.5)), 1.0)),
    ("<lora:a:mid=-1>", ("", "", (("mid", -1.0),), 1.0)),
    ("<lora:a:1:lbw=MY:x=0.3>", ("MY", "", (), 0.3)),
    ("<lora:a:1:1:8:lbw=MY>", ("MY", "", (), 8.0)),
    ("<lora:a:1:1:8:lbw=MY:x=0.3>", ("MY", "", (), 0.3)),
]


@pytest.mark.parametrize(("tag", "asked"), BLOCK_WEIGHTS)
def test_block_weights_are_read_from_named_arguments(tag: str, asked: tuple[object, ...]) -> None:
    (request,) = parse_prompt(tag).requests
    blocks = request.blocks
    assert blocks is not None
    assert (blocks.weights, blocks.elements, blocks.thirds, blocks.x) == asked
    assert request.ignored == ()


def test_random_weights_are_drawn_from_the_pictures_seed_and_the_loras_name() -> None:
    tags = "<lora:a:1:lbw=MY><lora:b:1:lbw=MY>"
    seeds = [request.blocks.seed for seed in (1, 2, 1) for request in parse_prompt(tags, seed).requests]
    assert seeds[:2] == seeds[4:]
    assert len(set(seeds)) == 4


def test_a_problem_shows_a_hostile_tag_short_and_on_one_line() -> None:
    (problem,) = parse_prompt("<lora:a\n\x1b[31m" + "b" * 10_000 + ":x>").problems
    assert problem.message.isprintable()
    assert len(problem.message) < 250


def test_numbers_from_python_have_the_limits_of_tags() -> None:
    parsed = parse_numbers([("a:b", 0.5), ("c", 0.5, -1), ("d", float("nan")), ("e", 101), ("", 1), ("f",), ("g", "x")])
    assert [(request.name, request.te, request.unet) for request in parsed.requests] == [
        ("a:b", 0.5, 0.5),
        ("c", 0.5, -1),
    ]
    assert [problem.raw for problem in parsed.problems] == ["d:nan", "e:101", ":1", "f", "g:x"]
    assert parsed.text == ""


@pytest.mark.parametrize(
    ("name", "spelling"),
    [
        ("plain (v1).2", "plain (v1).2"),
        ("a:b>c", "a_b_c"),
        ("a=b", "a_b"),
        ("a=b=c", "a=b=c"),
        ("a\nb\udcff", "a_b_"),
    ],
)
def test_a_name_that_no_tag_can_hold_has_a_writable_spelling(name: str, spelling: str) -> None:
    assert writable_name(name) == spelling
    assert parse_prompt(f"<lora:{spelling}:1>").requests[0].name == spelling


LINEAR_SECONDS = 5.0
"""Quadratic time would take hours; the limit leaves room for a busy computer."""


@pytest.mark.parametrize(
    "text",
    [
        "<lora:" * 1_700_000,
        "<lora:" * 1_700_000 + ">",
        "<" * 10_000_000 + ">",
        "<" + "a" * 10_000_000,
        "<lora:a:" + "9" * 10_000_000 + ">",
        "<lora:a:dyn=" + "9" * 10_000_000 + ">",
        "<lora:a" + ":1" * 5_000_000 + ">",
        "<lora:" + "=" * 10_000_000 + ">",
        "<lora:a:lbw=" + "1," * 5_000_000 + ">",
        "<lora:a:lbw=" + "X" * 10_000_000 + ">",
        "<lora:a:lbwe=" + ";," * 5_000_000 + ">",
    ],
    ids=[
        *("open", "nested", "brackets", "word", "number", "rank", "arguments", "equals"),
        *("block weights", "preset", "elements"),
    ],
)
def test_ten_megabytes_of_anything_take_linear_time(text: str) -> None:
    start = time.process_time()
    parsed = parse_prompt(text)
    assert time.process_time() - start < LINEAR_SECONDS
    assert len(parsed.requests) <= 1


def test_a_hundred_thousand_tags_in_ten_megabytes_take_less_than_a_second() -> None:
    text = "<lora:a:0.5> word " * 100_000 + "x" * 8_200_000
    seconds: list[float] = []
    for _ in range(3):
        start = time.process_time()
        parsed = parse_prompt(text)
        seconds.append(time.process_time() - start)
        assert len(parsed.requests) == 100_000
    assert min(seconds) < 1
