"""The one door to faster ways to take steps than the eager one."""

from __future__ import annotations

from typing import TYPE_CHECKING

from medusa_chat.decoding.graphs.capture import CudaGraphs, capturable, not_recorded
from medusa_chat.decoding.graphs.static_step import StaticStep
from medusa_chat.decoding.native_step import NativeProgram

if TYPE_CHECKING:
    from medusa_chat.decoding.state import State, StepProgram


def fast_step(state: State, eager: bool | None) -> StepProgram | None:
    """Return the fastest way to take steps that may work here; None for the eager one.

    Args:
        state: the model and its text.
        eager: True for the eager step, False for a step over buffers that never move even if it
            cannot be recorded, None for the fastest. Weights that are packed for the native step
            run in no other.
    """
    if state.backbone.native is not None:
        return NativeProgram(state, state.backbone.native)
    if eager:
        return None
    if capturable(state.backbone, state.heads):
        return StaticStep(state, CudaGraphs(state.backbone.device))
    return StaticStep(state, not_recorded) if eager is False else None
