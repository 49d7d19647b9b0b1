# SPDX-License-Identifier: Apache-2.0
"""Wrong values at the library's doors: one line that names value and rule, and no harm done."""

import array
import collections
import dataclasses
import decimal
import fractions
import functools
import gc
import math
import typing
import weakref
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.host.batch import StepShape
from jpaged.host.checks import shown
from jpaged.host.config import CHOICES
from tests.jpaged.exact import EXACT, run_steps
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, tiny_params


class Hostile:
    """Raises whatever is asked of it."""

    def __getattr__(self, name):
        raise RuntimeError(name)

    def __repr__(self):
        raise RuntimeError("repr")

    def __index__(self):
        raise KeyError("index")

    def __float__(self):
        raise OSError("float")

    def __len__(self):
        raise ZeroDivisionError


class TensorOfTorch:
    """As a tensor of torch answers: `operator.index` takes one of one element, or a bool."""

    def __init__(self, value):
        self.shape = np.shape(value)
        self.dtype = "torch.bool" if value is True else "torch.int64"

    def __index__(self):
        return 1


class Nullable:
    """As pandas' Int64 answers: integers, one of which is missing."""

    ndim, dtype = 1, np.dtype(np.int64)

    def __len__(self):
        return 2

    def __array__(self, dtype=None, copy=None):
        return np.array([1, None], object)


DELETED = jnp.array([1, 2])
DELETED.delete()
# Of them, what fields of token ids take.
EMPTY, ONE_WORD = {}, [[1]]

# Nothing that any field takes, beside texts, numbers and lists of these.
STRANGE = (
    b"4",
    bytearray(b"4"),
    memoryview(b"44"),
    EMPTY,
    {"a": 1},
    {1: 2}.keys(),
    object(),
    object,
    len,
    (i for i in (1, 2)),
    1j,
    np.complex64(1),
    decimal.Decimal(1),
    np.array([[1, 2]]),
    np.array([1.5]),
    np.array(["a"]),
    np.array(None),
    np.datetime64(1, "s"),
    np.timedelta64(1, "s"),
    np.array(1, "m8[s]"),
    np.array((1,), [("a", "i4")]),
    np.array(1, object),
    np.ma.masked,
    np.ma.array(1),
    np.ma.array(1, mask=True),
    np.ma.array(0.5, mask=True),
    np.ma.array(True, mask=True),
    np.ma.array([1, 2], mask=[0, 1]),
    [np.ma.array(1, mask=True)],
    TensorOfTorch([1]),
    DELETED,
    jnp.ones((1, 1)),
    ONE_WORD,
    [None],
    ["a", 1],
    [2.0],
    [True],
    Hostile(),
    NotImplemented,
    ...,
)
NO_NUMBER = (*STRANGE, "4", "0.7", "nan", "", [1], (1,), ["a"], np.array([1]), range(3))
NO_INTEGER = (*NO_NUMBER, True, False, np.True_, jnp.array(True), 2.5, 4.0, np.float32(4), math.nan)
NO_INTEGER += (math.inf, jnp.float32(2), fractions.Fraction(4), fractions.Fraction(1, 2))
NO_INTEGER += (TensorOfTorch(True),)
WRONG = {
    int: (*NO_INTEGER, -(10**400), 10**400, 10**5000, -1, -(2**63), 2**63, np.int64(-5)),
    float: (*NO_NUMBER, True, np.False_, math.nan, math.inf, -math.inf, 10**400, np.float64("nan")),
    bool: (*NO_NUMBER, 2.5, math.nan, "false", "true", "yes", 0, 1, 2, 0.0, 1.0, np.int8(1)),
    str: (*(v for v in NO_INTEGER if not isinstance(v, str)), 3, "\ud800", "no such choice"),
    tuple[int, ...]: (*STRANGE, "ab", "12", 3, 2.5, True, [1, -1], [10**400, "a"], range(10**9)),
    tuple[str, ...]: (*STRANGE, 3, 2.5, True, [""], "", ["a", ""], ["\udc00"], [b"a"], range(3)),
    Mapping[int, float]: (
        *(v for v in STRANGE if v is not EMPTY), 3, True, "4", "", [1], [(1,)], [(1, 2, 3)],
        [(1, "2")], {1: math.nan}, {1: math.inf}, {1: 101}, {1: None}, {1: True}, {-1: 1},
        {"1.0": 1}, {"-": 1}, {"1": 1, 1: 2}, [(1, 1), (1, 2)], dict.fromkeys(range(2**15), 1.0),
    ),
    Mapping[tuple[int, ...], float]: (
        *(v for v in STRANGE if v is not EMPTY), 3, True, "4", "", [1], {1: 2.0}, {"12": 1},
        [((), 1)], [((1,), math.nan)], [((1,), math.inf)], [((1,), "2")], [((-1,), 1)],
        [((1, 2),)], [((1, 2), 1, 1)], [(("1",), 1)], [((True,), 1)],
    ),
    tuple[tuple[int, ...], ...]: (
        *(v for v in STRANGE if v is not ONE_WORD), 3, True, "4", "", ["12"], [[1], []], [[1.5]],
        [[True]], [["1"]], [[-1]], [[[1]]], [[1]] * 2**15,
    ),
}  # fmt: skip


def members(hint):
    return [t for t in typing.get_args(hint) or (hint,) if t is not type(None)]


# That take any text.
TEXTS = ("record_steps", "record", "compilation_cache_dir", "kv_scales", "prompt_cache")
# That take texts of a form of theirs.
FORMS = ("step_shapes",)


def wrong_fields(cls):
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        kinds = [hint] if typing.get_origin(hint) is tuple else members(hint)
        for value in WRONG[kinds[0]]:
            if field.name in TEXTS and isinstance(value, str):
                continue
            if len(kinds) == 1 or not any(isinstance(value, k) for k in kinds if type(k) is type):
                yield field.name, value
        if kinds == [str] and field.name not in (*CHOICES, "logprobs_mode", *TEXTS, *FORMS):
            raise AssertionError(f"{field.name} takes any text: say so here")


RULES = (
    "must be", "must exceed", "no meaning", "is empty", "outside the vocabulary", "no room",
    "half of a surrogate", "do not pair",
)  # fmt: skip


def refused(make, names):
    """Makes something; returns what was made, or None after a good refusal."""
    try:
        return make()
    except ValueError as e:
        message = str(e)
        assert "\n" not in message and len(message) < 400, message
        assert any(name in message for name in names), message
        assert any(rule in message for rule in RULES), message
        return None


class TestFields:
    @pytest.mark.parametrize("cls", [SamplingParams, EngineConfig])
    def test_wrong_types_and_ranges(self, cls):
        tried, taken = 0, []
        for name, value in wrong_fields(cls):
            made = refused(lambda n=name, v=value: cls(**{n: v}), [f"{name}="])
            tried += 1
            if made is not None:
                taken.append((name, value))
        assert tried >= 300
        # Of these a negative one is a number like others.
        assert {name for name, _ in taken} <= {"length_penalty", "priority"}
        assert all(-(2**63) <= value < 0 for _, value in taken)

    @pytest.mark.parametrize("cls", [SamplingParams, EngineConfig])
    def test_none_is_the_default_of_every_field(self, cls):
        names = [field.name for field in dataclasses.fields(cls)]
        assert cls(**dict.fromkeys(names)) == cls()

    @pytest.mark.parametrize(
        ("given", "plain"),
        [
            (np.int64(3), 3), (np.uint8(3), 3), (jnp.int32(3), 3), (np.array(3), 3),
            (np.float32(0.5), 0.5), (np.float16(0.5), 0.5), (jnp.float32(0.5), 0.5),
            (jnp.bfloat16(0.5), 0.5), (np.array(0.5), 0.5), (fractions.Fraction(1, 2), 0.5),
        ],
        ids=repr,
    )  # fmt: skip
    def test_scalars_are_the_numbers_that_they_are(self, given, plain):
        name = "top_k" if isinstance(plain, int) else "temperature"
        got = getattr(SamplingParams(**{name: given}), name)
        assert got == plain and type(got) is type(plain)
        got = SamplingParams(temperature=given).temperature
        assert got == plain and type(got) is float

    def test_texts_and_lists_of_other_kinds_become_plain(self):
        class Text(str):
            def __str__(self):
                return "another"

        params = SamplingParams(
            stop=[Text("a")], stop_token_ids=np.array([3, 1]), suppress_tokens={2, 1}
        )
        assert (params.stop, params.stop_token_ids, params.suppress_tokens) == (
            ("a",), (3, 1), (1, 2),
        )  # fmt: skip
        assert [type(text) for text in params.stop] == [str]
        assert SamplingParams(ignore_eos=np.True_).ignore_eos is True

    def test_a_message_shows_any_value_in_a_short_line(self):
        for value in (*STRANGE, 10**5000, "x" * 10**6, [1] * 10**6, range(10**9)):
            text = shown(value)
            assert "\n" not in text and 0 < len(text) <= 100


PROMPTS = (
    *(value for value in STRANGE if not isinstance(value, type(NotImplemented))),
    None, True, 3, 2.5, math.nan, "", [], (), range(0), np.array([], np.int32),
    "a\ud800b", "\udfff", [1.0], [1, 2.5], [1, True], [1, None], [1, "2"], ["1"], [[1], [2]],
    [1, [2]], [-1], [97], [10**400], [10**5000], [1, 2**31], [1, -(2**63)], (1, b"2"), {1, 2},
    frozenset((1,)), {1: 2}, np.array([[1, 2]]), np.array([1.0]), np.array([True]), np.array(3),
    np.array(["a"]), np.array([1, 97]), np.array([-1]), np.array([2**40]), jnp.ones(3), range(98),
    jnp.array([[1]]), array.array("d", [1.0]), collections.deque([1.5]), [np.float32(1)],
    np.ma.array([1, 2, 3], mask=[0, 1, 0]), np.ma.array([1, 2]), [1, np.ma.masked],
    [1, TensorOfTorch([1])], np.array([1, 2], object), np.array([1], "m8[s]"),
    np.array([(1,)], [("a", "i4")]), Nullable(),
    [np.True_], [jnp.float32(1)], [Hostile()], [1, Hostile()], iter([1, 2]), map(int, "12"),
    zip([1], [2], strict=True), [fractions.Fraction(1)], [decimal.Decimal(1)], [1j],
    range(10**9), [1] * 128, [b"a"], [object()], [{}], [()], [set()],
)  # fmt: skip
GOOD_PROMPTS = (
    (1, 2), range(1, 3), np.array([1, 2]), np.array([1, 2], np.uint8), jnp.array([1, 2]),
    [np.int64(1), 2], [jnp.int32(1), np.uint16(2)], array.array("i", [1, 2]),
    collections.deque([1, 2]), "one two",
)  # fmt: skip
OTHERS = (
    ("params", (None, {}, 3, "x", SamplingParams, [SamplingParams()], Hostile(), ())),
    ("request_id", (3, b"a", ["a"], {}, 2.5, True, ("a",), object(), "\ud800", Hostile())),
    ("cache_salt", (3, b"a", ["a"], {}, 2.5, False, ("a",), object(), "\udfff", Hostile())),
    ("stream", ("false", "true", 0, 1, [], "yes", 1.0, b"", np.int8(1), Hostile())),
)


@pytest.fixture(scope="module")
def worded():
    """An engine whose texts have the words "one" and "two"; others have no token."""
    tokenizer = Tokenizer(WordLevel({"one": 1, "two": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return tiny_engine(tokenizer=tokenizer, **EXACT)


class TestRequests:
    GOOD = SamplingParams(max_tokens=12, temperature=0.9, seed=4)

    def test_wrong_requests_harm_no_other(self, worded):
        """>= 300 of them, while a good one runs: its tokens are those that it has by itself."""
        engine = worded
        (prompt,) = prompts_of([9])
        want = engine.generate([prompt], self.GOOD)[0].outputs[0].token_ids
        good = engine.add_request(prompt, self.GOOD)
        calls = [
            (lambda p=p, s=s: engine.add_request(p, self.GOOD, stream=s), ["prompt", "token id"])
            for p in PROMPTS
            for s in (False, True)
        ]
        calls += [
            (lambda p=p: engine.stream(p, self.GOOD), ["prompt", "token id"]) for p in PROMPTS
        ]
        for name, values in OTHERS:
            for value in values:
                kwargs = dict(params=self.GOOD) | {name: value}
                calls.append((lambda k=kwargs: engine.add_request([1], **k), [f"{name}="]))
        for k in (0, -1, 1.0, True, "1", None, 10**9, 10**400, [1], Hostile(), np.float32(1)):
            calls.append((lambda k=k: engine.fork(good, k), ["k="]))
        for params in (3, {}, "x", [self.GOOD], Hostile()):
            calls.append((lambda p=params: engine.fork(good, 1, p), ["params="]))
        for name in ("stop_token_ids", "suppress_tokens"):
            bad = SamplingParams(max_tokens=3, **{name: [5, 97]})
            calls.append((lambda p=bad: engine.add_request([1], p), [name]))
        assert len(calls) >= 250
        before = set(engine._live.by_id)
        for index, (call, names) in enumerate(calls):
            assert refused(call, names) is None, index
            assert set(engine._live.by_id) == before, index
            if index % 40 == 0 and len(engine._live.by_id[good].sequences[0].token_ids) < 18:
                engine.step()
        done = run_steps(engine)
        assert done[good].outputs[0].token_ids == want
        engine.check_invariants()

    def test_prompts_of_generate(self, worded):
        tried = 0
        wholes = (
            *(value for value in STRANGE if type(value) not in (np.ndarray, list)),
            [None], [2.0], [[2.0]],
            None, 3, "one", b"one", [1, 2], (1, 2), np.array([1, 2]), [np.int64(1)],
            [1.5, 2], [True], np.array(3), {"one"}, {"one": 1}, iter(["one"]),
        )  # fmt: skip
        for prompts in (
            *wholes,
            *([[1], prompt] for prompt in PROMPTS),
        ):
            assert (
                refused(lambda p=prompts: worded.generate(p, self.GOOD), ["prompt", "token id"])
                is None
            ), prompts
            tried += 1
        for params in (None, 3, "x", {}, [None], [3], ["x"], [{}], (SamplingParams,), Hostile()):
            assert refused(lambda p=params: worded.generate([[1]], p), ["params="]) is None
            tried += 1
        assert tried >= 90
        assert not worded.has_unfinished_requests
        assert worded.generate([], self.GOOD) == []

    @pytest.mark.parametrize("prompt", GOOD_PROMPTS, ids=repr)
    def test_prompts_of_other_types(self, prompt, worded):
        (output,) = worded.generate([prompt], self.GOOD)
        assert output.prompt_token_ids == [1, 2]
        assert [type(token) for token in output.prompt_token_ids] == [int, int]

    def test_a_matrix_is_a_list_of_prompts(self, worded):
        outputs = worded.generate(np.array([[1, 2], [3, 4]]), self.GOOD)
        assert [output.prompt_token_ids for output in outputs] == [[1, 2], [3, 4]]
        with pytest.raises(ValueError, match="not a masked array"):
            worded.generate(np.ma.array([[1, 2], [3, 4]], mask=[[0, 0], [0, 1]]), self.GOOD)

    @pytest.mark.parametrize(
        "request_id",
        [3, None, [], {}, Hostile(), b"x"],
        ids=["int", "None", "list", "dict", "hostile", "bytes"],  # no address: workers compare ids
    )
    def test_no_live_request_has_such_an_id(self, request_id, worded):
        for call in (worded.abort, worded.fork):
            with pytest.raises(KeyError, match="no live request"):
                call(request_id)

    def test_a_prompt_that_the_tokenizer_cannot_encode(self):
        """A model of words without its unknown token: tokenizers raises a bare Exception."""
        tokenizer = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = WhitespaceSplit()
        engine = tiny_engine(tokenizer)
        engine.add_request("a b", SamplingParams(max_tokens=2, temperature=0), "good")
        with pytest.raises(ValueError, match=r"cannot encode prompt='a c': .*\[UNK\]"):
            engine.add_request("a c", SamplingParams(max_tokens=2))
        assert [o.outputs[0].finish_reason for o in run_steps(engine).values()] == ["length"]

    def test_what_is_to_be_compiled(self, worded):
        shape = worded._buckets.all_shapes()[0]
        good = worded.add_request([1], self.GOOD)
        for name, values in {
            "shapes": [5, "x", [(4, 4)], [None], [StepShape(10**13, 4)], [StepShape(3, 4)], {1: 2}],
            "num_logprobs": ["3", 2.5, -1, 98, 10**9, True, None],
            "params": ["x", 5, [None], SamplingParams(beam_width=2), [{}]],
        }.items():
            for value in values:
                kwargs = {"shapes": [shape], name: value}
                assert refused(lambda k=kwargs: worded.warm_up(**k), [name]) is None, value
        assert run_steps(worded)[good].outputs[0].finish_reason == "length"

    def test_how_generate_and_stream_report(self, worded):
        for name, values in {
            "progress": ["false", 1, None, []],
            "on_step": [5, None, "x"],
            "on_output": [5, "x", [1]],
        }.items():
            for value in values:
                kwargs = {name: value}
                call = functools.partial(worded.generate, [[1]], self.GOOD, **kwargs)
                assert refused(call, [f"{name}="]) is None, value
        for value in (5, None, "x"):
            call = functools.partial(worded.stream, [1], self.GOOD, on_step=value)
            assert refused(call, ["on_step="]) is None, value
        assert not worded.has_unfinished_requests

    def test_what_an_engine_is_made_of(self):
        for path in (5, None, b"x", [], "~nobody_of_this_name/x"):
            with pytest.raises(ValueError, match=r"model_path=.* must be the path of a directory"):
                Engine.load(path)
        for name, value in (
            ("model_config", None),
            ("model_config", {}),
            ("params", None),
            ("tokenizer", "gpt2"),
            ("generation_config", {"top_k": 3}),
        ):
            given = dict(model_config=TINY, params=tiny_params()) | {name: value}
            with pytest.raises(ValueError, match=f"{name}=.* must be a"):
                Engine(**given)


def test_an_idle_engine_holds_nothing_of_what_it_did():
    engine = tiny_engine(**EXACT)
    (output,) = engine.generate([[1, 2]], TestRequests.GOOD)
    left = [weakref.ref(output)]
    del output
    request_id = engine.add_request([1, 2], TestRequests.GOOD)
    left.append(weakref.ref(engine._live.by_id[request_id]))
    run_steps(engine)
    gc.collect()
    assert [ref() for ref in left] == [None, None]
