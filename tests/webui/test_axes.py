"""The X/Y/Z plot's axes: what each changes in a tag, and which values are refused before the first picture."""

from __future__ import annotations

import pytest

ONES = ",".join("1" * 17)
IN04 = "0,0,0,0,0,{},0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0"


def axis(webui, label):
    return next(one for one in webui.modules.scripts.scripts_data[0].module.axis_options if one.label == label)


def parameters(webui, prompt):
    return webui.modules.processing.StableDiffusionProcessingTxt2Img(prompt=prompt)


AXES = [
    ("LoRA 1: name", "wash", "a <lora:wash:0.5> <lora:echo>"),
    ("LoRA 2: name", "ink", "a <lora:ink:0.5> <lora:ink>"),
    ("LoRA 1: te strength", 0.30000000004, "a <lora:ink:0.3:0.5> <lora:echo>"),
    ("LoRA 1: unet strength", -1.0, "a <lora:ink:0.5:-1> <lora:echo>"),
    ("LoRA 2: unet strength", 2.0, "a <lora:ink:0.5> <lora:echo:1:2>"),
    ("LoRA 1: block preset", "MIDD", "a <lora:ink:0.5:lbw=MIDD> <lora:echo>"),
    ("LoRA 1: block preset", "sine+0.5", "a <lora:ink:0.5:lbw=sine+0.5> <lora:echo>"),
    ("LoRA 1: block preset", ONES, f"a <lora:ink:0.5:lbw={ONES}> <lora:echo>"),
    ("LoRA 1: single block", "IN04", f"a <lora:ink:0.5:lbw={IN04.format(1)}> <lora:echo>"),
    ("LoRA 2: single block", "IN04 = 0.5", f"a <lora:ink:0.5> <lora:echo:lbw={IN04.format(0.5)}>"),
    ("LoRA 1: single block", "BASE", f"a <lora:ink:0.5:lbw=1{',0' * 25}> <lora:echo>"),
    ("LoRA 1: element", "IN05-OUT05:attn2.to_q:0.3", "a <lora:ink:0.5:lbwe=IN05-OUT05;attn2.to_q;0.3> <lora:echo>"),
    ("LoRA 1: element", "ATTNDEEPOFF", "a <lora:ink:0.5:lbwe=ATTNDEEPOFF> <lora:echo>"),
    ("LoRA 1: start", 3.0, "a <lora:ink:0.5:start=3> <lora:echo>"),
    ("LoRA 1: start", 0.30000000004, "a <lora:ink:0.5:start=0.3> <lora:echo>"),
    ("LoRA 2: stop", 0.0, "a <lora:ink:0.5> <lora:echo:stop=0>"),
    ("LoRA 1: curve", "0@0;1@1", "a <lora:ink:0.5:0@0;1@1> <lora:echo>"),
    ("LoRA 2: curve", "0@0,1@9", "a <lora:ink:0.5> <lora:echo:1:0@0,1@9>"),
]


@pytest.mark.parametrize(("label", "value", "changed"), AXES)
def test_axes_change_one_thing_of_one_tag(webui, label, value, changed):
    p = parameters(webui, "a <lora:ink:0.5> <lora:echo>")
    option = axis(webui, label)
    option.confirm(p, [value])
    option.apply(p, option.type(value), [value])
    assert p.prompt == changed


CHANGED_TAGS = [
    ("block preset", "MIDD", "<lora:ink:1:w=INS:lbw=OUTS:lbwe=ATTNDEEPON:x=2>", "ink:1:lbwe=ATTNDEEPON:x=2:lbw=MIDD"),
    ("element", ":attn;0", "<lora:lbwe=PROJDEEPOFF:ink:lbw=INS>", "ink:lbw=INS:lbwe=;attn;0"),
    ("start", 2.0, "<lora:ink:1:start=9:stop=12>", "ink:1:stop=12:start=2"),
    ("start", 2.0, "<lora:ink:1:step=4-12>", "ink:1:stop=12:start=2"),
    ("stop", 2.0, "<lora:ink:1:step=0.1-12:hr=0>", "ink:1:start=0.1:hr=0:stop=2"),
    ("curve", "1@0;0@1", "<lora:ink:te=0.5:unet=0.2:stop=4>", "ink:0.5:1@0;0@1:stop=4"),
]


@pytest.mark.parametrize(("what", "value", "tag", "changed"), CHANGED_TAGS)
def test_what_a_tag_says_of_the_same_is_replaced_and_all_else_stays(webui, what, value, tag, changed):
    p = parameters(webui, f"{tag} a")
    axis(webui, f"LoRA 1: {what}").apply(p, value, [value])
    assert p.prompt == f"<lora:{changed}> a"


WRONG = [
    ("block preset", ["MIDD", "MID"], "lbw names no preset 'MID'; there are MIDD"),
    ("block preset", ["FLUXALL"], "weigh no block of this model"),
    ("block preset", ["1,2,3"], "lbw holds 3 numbers"),
    ("block preset", ["sine+x"], "added to the curve of lbw is 'x'"),
    ("single block", ["IN04", "IN12"], "the model has no block 'IN12'; it has BASE, IN00, IN01"),
    ("single block", ["in04"], "the model has no block 'in04'"),
    ("single block", ["IN04=x"], "the weight is 'x', not a number"),
    ("single block", ["IN04=1=2"], "the weight is '1=2', not a number"),
    ("element", ["IN05:attn"], "'IN05;attn' of lbwe is not BLOCKS:ELEMENTS:RATIO"),
    ("element", ["NOSUCH"], "lbwe names no preset 'NOSUCH'"),
    ("element", ["IN05:a>b:1"], "a tag can not hold 'IN05;a>b;1'"),
    ("element", ["IN05:a=b:1"], "a tag can not hold 'IN05;a=b;1'"),
    ("start", [-1.0], "start is -1, beyond the limits"),
    ("start", [float("nan")], "start is nan"),
    ("stop", [2.5], "write a whole step, or a part of all steps"),
    ("start", [0.0, 0.5, 1.0], "write one kind of them"),
    ("curve", ["0@0;1@1", "x@0"], "the curve is 'x', not a number"),
    ("curve", ["1;0@1"], "the curve has the point '1'"),
    ("curve", ["0@0.5;1@9"], "write one kind of them"),
    ("curve", ["0@0;1@1>"], "a position of the curve is '1>'"),
    ("te strength", [1.0, 101.0], "the strength is 101.0, beyond the limits"),
    ("unet strength", [float("inf")], "the strength is inf"),
]


@pytest.mark.parametrize(("what", "values", "said"), WRONG)
def test_a_value_that_can_not_be_is_refused_before_the_first_picture(webui, what, values, said):
    webui.generate("a <lora:ink:1>")
    with pytest.raises(RuntimeError) as caught:
        axis(webui, f"LoRA 2: {what}").confirm(parameters(webui, "a <lora:ink:1> <lora:echo>"), values)
    assert str(caught.value).startswith(f"LoRA 2: {what}: ")
    assert said in str(caught.value)


@pytest.mark.parametrize("moments", [[0.0, 0.5, 0.9], [0.0, 1.0, 20.0], [0.25]])
def test_steps_or_parts_of_all_steps_are_good(webui, moments):
    axis(webui, "LoRA 1: start").confirm(parameters(webui, "a <lora:ink:1>"), moments)


def test_an_axis_of_a_tag_that_is_not_there_says_so(webui):
    p = parameters(webui, "a cat <lora:ink:1>")
    for label, value in (("LoRA 2: name", "ink"), ("LoRA 3: start", 1.0), ("LoRA 2: single block", "IN04")):
        with pytest.raises(RuntimeError, match=f"the prompt has no {label[5]} LoRA tags"):
            axis(webui, label).apply(p, value, [value])


def test_names_to_choose_from_are_those_that_tags_can_hold(webui):
    assert axis(webui, "LoRA 1: name").choices() == ["alias", "broken", "ink", "my lora (v1).2", "wash"]


@pytest.mark.parametrize("is_used", [False, True])
def test_blocks_to_choose_from_are_the_models(webui, is_used):
    if is_used:
        webui.generate("a <lora:ink:1>")
    expected = [f"IN{number:02d}" for number in range(12)], [f"OUT{number:02d}" for number in range(12)]
    assert axis(webui, "LoRA 1: single block").choices() == ["BASE", *expected[0], "M00", *expected[1]]


def test_presets_to_choose_from_are_those_that_weigh_the_model_as_the_files_are_now(webui, tmp_path):
    choices = axis(webui, "LoRA 1: block preset").choices
    shipped = ["NONE", "ALL", "INS", "IND", "INALL", "MIDD", "OUTD", "OUTS", "OUTALL", "ALL0.5"]
    curves = ["sine", "cosine", "linear", "reverse_linear", "zeros"]
    assert choices() == [*shipped, *curves]
    (tmp_path / "lbwpresets.txt").write_text(f"MINE:{ONES}\na=b:{ONES}\n")
    assert choices() == [*shipped, "MINE", *curves]


def test_each_value_of_an_axis_gives_the_picture_of_the_tag_written_by_hand(webui):
    def plotted(label, value):
        p = parameters(webui, "a cat <lora:ink:0.8>")
        axis(webui, label).apply(p, value, [value])
        return webui.picture(p.prompt)

    pictures = [
        (plotted("LoRA 1: single block", "IN04"), webui.picture(f"a cat <lora:ink:0.8:lbw={IN04.format(1)}>")),
        (plotted("LoRA 1: stop", 0.0), webui.picture("a cat <lora:ink:0>")),
        (plotted("LoRA 1: curve", "0.5@0"), webui.picture("a cat <lora:ink:0.8:0.5>")),
    ]
    assert all((one == other).all() for one, other in pictures)
    assert len({one.numpy().tobytes() for one, _ in pictures}) == 3
