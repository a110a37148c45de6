# SPDX-License-Identifier: Apache-2.0
"""On a GPU a call is checked when its signature is new: no wrong call may have the signature of a right one."""

from collections import OrderedDict
from types import SimpleNamespace

import numpy as np
import pytest
from test_errors_call import (
    CALL,
    FP8_HIDDEN,
    FP8_PADDED,
    LAYER,
    MAX_TOKENS,
    PADDED,
    WRONG_BATCHED,
    WRONG_CALLS,
    E,
    K,
    M,
    floats,
    names,
)

from cupy_moe import fused, spec

LAYERS = {
    "dynamic": {},
    "number": {"a1_scale": 0.5},
    "array": {"a1_scale": floats(1)},
    "float16 out": {"out_dtype": "float16"},
    "batch invariant": {"batch_invariant": True, "a2_scale": 0.5},
}
RIGHT = [{}, {"out": floats(M, K)}, {"topk_ids": np.zeros((M, 2), np.int64)}]
SCALES = (0.5, floats(), floats(1), floats(1, 1), floats(M, 1))
RIGHT += [{"hidden_states": FP8_HIDDEN, "a1_scale": scale} for scale in SCALES]
RIGHT_PADDED = [{}, {"out": floats(E, MAX_TOKENS, K)}]
PADDED_SCALES = (0.5, floats(1), floats(E, MAX_TOKENS, 1))
RIGHT_PADDED += [{"hidden_states": FP8_PADDED, "a1_scale": scale} for scale in PADDED_SCALES]


def describe(layer, options, *, padded):
    ids = options["expert_num_tokens" if padded else "topk_ids"]
    return spec.describe_call(
        layer, options["hidden_states"], ids, options.get("topk_weights"), options.get("out"), options.get("a1_scale"),
        padded=padded,
    )


def is_right(layer, call):
    try:
        spec.check_call(layer, call)
    except (TypeError, ValueError):
        return False
    return True


WRONG = [(CALL, RIGHT, changes, False) for changes, *_ in WRONG_CALLS] + [
    (PADDED, RIGHT_PADDED, changes, True) for changes, *_ in WRONG_BATCHED
]


@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize(("start", "right", "changes", "padded"), WRONG, ids=names([(case[2],) for case in WRONG]))
def test_wrong_calls_are_new(start, right, changes, padded, options):
    layer = spec.layer_spec(**LAYER, **options)
    try:
        call = describe(layer, start | changes, padded=padded)
    except (TypeError, ValueError):
        return  # refused before its signature is looked up
    if is_right(layer, call):
        return  # with the scale of this layer
    for other in right:
        seen = describe(layer, start | other, padded=padded)
        assert not is_right(layer, seen) or seen.signature() != call.signature(), other


@pytest.mark.parametrize("layer_scale", [None, 0.5, floats(1)], ids=["dynamic", "number", "array"])
@pytest.mark.parametrize("given", [0.25, floats(1)], ids=["number", "array"])
def test_a_scale_that_is_not_wanted(given, layer_scale):
    layer = spec.layer_spec(**LAYER, a1_scale=layer_scale)
    right, wrong = describe(layer, CALL, padded=False), describe(layer, CALL | {"a1_scale": given}, padded=False)
    assert is_right(layer, right)
    assert not is_right(layer, wrong)
    assert right.signature() != wrong.signature()


def test_a_scale_that_batch_invariant_misses():
    layer = spec.layer_spec(**LAYER, batch_invariant=True, a2_scale=0.5)
    wrong = describe(layer, CALL, padded=False)
    right = describe(layer, CALL | {"hidden_states": FP8_HIDDEN, "a1_scale": 0.5}, padded=False)
    assert is_right(layer, right)
    assert not is_right(layer, wrong)
    assert right.signature() != wrong.signature()


def test_a_scale_that_is_missing():
    layer = spec.layer_spec(**LAYER)
    codes = CALL | {"hidden_states": FP8_HIDDEN}
    right, wrong = describe(layer, codes | {"a1_scale": 0.5}, padded=False), describe(layer, codes, padded=False)
    assert is_right(layer, right)
    assert not is_right(layer, wrong)
    assert right.signature() != wrong.signature()


def test_the_same_call_again_is_not_new():
    layer = spec.layer_spec(**LAYER)
    for other in RIGHT:
        first, again = (describe(layer, CALL | other, padded=False) for _ in range(2))
        assert first.signature() == again.signature()
        copies = {name: x.copy() if isinstance(x, np.ndarray) else x for name, x in (CALL | other).items()}
        assert describe(layer, copies, padded=False).signature() == first.signature()
    fp8 = CALL | {"hidden_states": FP8_HIDDEN}
    values = [describe(layer, fp8 | {"a1_scale": value}, padded=False).signature() for value in (0.5, 2.0)]
    assert values[0] == values[1]  # a number is an argument of the launch


@pytest.mark.parametrize("name", ["hidden_states", "out"])
def test_another_alignment_is_new(name):
    """Kernels are chosen for the words that the address allows; the same again 16 bytes further on."""
    layer, wide = spec.layer_spec(**LAYER), floats(M, 2 * K)
    seen = [describe(layer, CALL | {name: wide[:, i : i + K]}, padded=False).signature() for i in range(5)]
    assert len({*seen}) == 4
    assert seen[0] == seen[4]


def test_layers_that_fused_experts_finds_again(monkeypatch):
    """The latest ones, one for each stream; a capture takes what the calls before it made."""
    made = []

    def make(checked, backend, workspace):
        made.append(SimpleNamespace(backend="sm90", _layer=SimpleNamespace(copies=[]), workspace=workspace))
        return made[-1]

    def find(name, stream=7):
        library = SimpleNamespace(stream=lambda device: stream)
        return fused._cached_experts(SimpleNamespace(device=0, library=library, without_arrays=lambda: name), None)

    monkeypatch.setattr(fused.Experts, "_of", make)
    monkeypatch.setattr(fused.arrays, "is_capturing", lambda library, device: False)
    monkeypatch.setattr(fused, "LAYERS_KEPT", 3)
    monkeypatch.setattr(fused, "_layers", OrderedDict())
    first, second = find("first"), find("second")
    assert find("first") is first
    assert first.workspace is second.workspace
    other = find("first", stream=8)
    assert other is not first
    assert other.workspace is not first.workspace
    find("third")  # "second" is the one called longest ago
    assert len(fused._layers) == 3
    assert find("first") is first
    assert find("second") is not second
    monkeypatch.setattr(fused.arrays, "is_capturing", lambda library, device: True)
    assert find("first", stream=9) is first, "a capture has a stream of its own"
