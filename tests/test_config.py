"""Settings: defaults, values that are refused, and complaints that name the setting."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import medusa_chat
from medusa_chat.config import LoadOptions, UserError, out_of_memory
from medusa_chat.sampling import Sampling


def test_defaults_are_those_of_the_paper() -> None:
    assert (Sampling().mode, Sampling().epsilon, Sampling().delta) == ("greedy", 0.09, 0.3)
    with pytest.raises(FrozenInstanceError):
        Sampling().mode = "exact"  # type: ignore[misc]


@pytest.mark.parametrize(
    "wrong",
    [
        {"mode": "fast"},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"epsilon": 0},
        {"epsilon": 2},
        {"delta": 0},
        {"max_new_tokens": 0},
        {"seed": -1},
        {"seed": 2**32},
        {"stop": ("a", "")},
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(wrong: Any) -> None:
    with pytest.raises(
        UserError, match=next(iter(wrong)).replace("stop", "stop string")
    ) as refusal:
        Sampling(**wrong)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("settings", "greedy"),
    [
        ({}, True),
        ({"mode": "vanilla"}, False),
        ({"mode": "vanilla", "temperature": 0}, True),
        ({"mode": "typical"}, False),
        ({"mode": "typical", "temperature": 0}, True),
        ({"mode": "exact"}, False),
        ({"mode": "exact", "temperature": 0.0}, True),
        ({"mode": "exact", "temperature": 1e-9}, True),
        ({"mode": "exact", "temperature": 0.01}, False),
    ],
    ids=str,
)
def test_which_settings_are_greedy(settings: Any, greedy: Any) -> None:
    assert Sampling(**settings).greedy is greedy


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("mode", "exact", "exact"),
        ("temperature", "0.5", 0.5),
        ("top_k", "40", 40),
        ("seed", "7", 7),
        ("ignore_eos", "on", True),
        ("ignore_eos", "No", False),
        ("ignore_eos", "true", True),
        ("stop", "", ()),
        ("stop", "Ende", ("Ende",)),
        ("stop", r"\n", ("\n",)),
        ("stop", "é🙂", ("é🙂",)),
        ("stop", "end\\", ("end\\",)),
    ],
)
def test_a_value_is_read_from_text(name: Any, text: Any, value: Any) -> None:
    changed = Sampling().with_value(name, text)
    assert getattr(changed, name) == value
    assert all(
        getattr(changed, field.name) == getattr(Sampling(), field.name)
        for field in fields(Sampling)
        if field.name != name
    )


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("warmth", "1", "no setting 'warmth'; the settings are mode, temperature"),
        ("mode", "fast", "mode must be one of"),
        ("temperature", "hot", "temperature must be a number, not 'hot'"),
        ("temperature", "nan", "finite"),
        ("temperature", "inf", "finite"),
        ("temperature", "-1", "0 or more"),
        ("top_k", "1.5", "a whole number"),
        ("ignore_eos", "maybe", "on or off"),
        ("seed", "", "a whole number"),
        ("max_new_tokens", "0", "1 or more"),
    ],
)
def test_a_wrong_text_is_refused(name: Any, text: Any, complaint: Any) -> None:
    with pytest.raises(UserError, match=complaint):
        Sampling().with_value(name, text)


@given(name=st.sampled_from([field.name for field in fields(Sampling)]), text=st.text(max_size=8))
def test_any_text_is_a_value_or_a_user_error(name: Any, text: Any) -> None:
    try:
        changed = Sampling().with_value(name, text)
    except UserError as error:
        complaint = str(error)
    else:
        complaint = name
        assert isinstance(changed, Sampling)
    assert name in complaint or name == "stop"


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (
            RuntimeError(
                "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
            ),
            True,
        ),
        (
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes."),
            True,
        ),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("could not create a primitive"), True),
        (RuntimeError("shape mismatch"), False),
        (UserError("no"), False),
    ],
    ids=str,
)
def test_errors_that_say_that_memory_ran_out(error: Any, memory: Any) -> None:
    assert out_of_memory(error) is memory


def test_an_unknown_option_of_load_is_named() -> None:
    with pytest.raises(UserError, match="no setting 'devise'; the settings are device, dtype"):
        medusa_chat.load(devise="cpu")


@pytest.mark.parametrize(
    ("wrong", "complaint"),
    [
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, mps, not 'tpu'"),
        ({"dtype": "float8"}, "dtype must be one of auto, float32, bfloat16, float16"),
        ({"quant": "int3"}, "quant must be one of auto, none, nf4"),
        ({"quant_heads": "int3"}, "quant_heads must be one of auto, none, nf4"),
        ({"context": 0}, "the context must be at least 1 token, not 0"),
    ],
    ids=str,
)
def test_options_of_load_that_are_refused(wrong: Any, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        LoadOptions(**wrong)


def test_a_device_may_have_a_number() -> None:
    assert LoadOptions(device="cuda:1").device == "cuda:1"
