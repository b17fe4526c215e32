"""Answers of a model on this machine: the native step's, or those of transformers' generate()."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from medusa_chat.config import LoadOptions, Message, ModelSpec, UserError
from medusa_chat.decoding.native_texts import continue_texts
from medusa_chat.decoding.reply import eos_ids
from medusa_chat.hub import fetch as hub
from medusa_chat.machine.devices import choose_device
from medusa_chat.model.backbone import Backbone
from medusa_chat.model.native_weights import choose_step, pack_native
from medusa_chat.model.pretrained import load_config, load_pretrained, loading_errors
from medusa_chat.model.templates import named_template, resolve_template
from medusa_chat.sampling import COLD
from medusa_chat.training import invention
from medusa_chat.training.memory import check_answers
from medusa_chat.training.questions import Answer, DistillJob, Question
from medusa_chat.training.server import draw_seed

if TYPE_CHECKING:
    from collections.abc import Sequence


MARK = "\N{REPLACEMENT CHARACTER}user"  # stands for a user's turn; no template changes it


class LocalModel:
    """A model that is loaded when it is first asked.

    Attributes:
        name: the model's name.
    """

    def __init__(
        self, spec: ModelSpec, job: DistillJob, device: str, ignore_memory: bool = False
    ) -> None:
        self.name = spec.name
        self._spec = spec
        self._job = job
        self._device = device
        self._ignore_memory = ignore_memory
        self._backbone: Any = None

    def answer(self, questions: Sequence[Question]) -> list[Answer | None]:
        """Answer questions of one batch and turn; None for one that may not fit the context.

        Raises:
            UserError: the model cannot be loaded, its template refuses a conversation, or the
                memory does not suffice.
        """
        self._load()
        if questions[0].turn == 0:
            # Each batch has its own seed, so that a resumed run draws the same.
            torch.manual_seed(self._job.seed + questions[0].index // self._job.batch)
        rows = [self._template.encode(cast("list[Message]", each.messages)) for each in questions]
        return self._answer(rows, self._job.temperature, self._job.max_new_tokens)

    def invent(self, questions: Sequence[Question], attempt: int) -> list[str | None]:
        """Write the user's next turn in each conversation; None for one without an end.

        Raises as `answer` does.
        """
        self._load()
        if questions[0].turn == 0:
            torch.manual_seed(draw_seed(self._job.seed, questions[0].index, attempt))
        openings = [self._opening(each.messages) for each in questions]
        rows = [self._template.tokens(text)["input_ids"] for text, _ in openings]
        answers = self._answer(rows, invention.TEMPERATURE, invention.TOKENS)
        marks = [mark for _, mark in openings]
        return [_user_turn(*each) for each in zip(answers, marks, strict=True)]

    def _opening(self, messages: list[dict[str, Any]]) -> tuple[str, str]:
        """Return the prompt up to where the user speaks, and the mark that ends what they say."""
        turn: Message = {"role": "user", "content": MARK}
        text = self._template.render([*cast("list[Message]", messages), turn])
        before, _, after = text.partition(MARK)
        return before, next(iter(after.strip().splitlines()), "")

    def _answer(
        self, rows: list[list[int]], temperature: float, new_tokens: int
    ) -> list[Answer | None]:
        """Go on with rows of one batch; None for one that may not fit the context."""
        fits = [self._fits(row, new_tokens) for row in rows]
        taken = [row for row in rows if self._fits(row, new_tokens)]
        try:
            answers = iter(self._generate(taken, temperature, new_tokens))
        except torch.OutOfMemoryError:
            raise UserError(
                "out of memory; a smaller --batch, with another --out, needs less"
            ) from None
        return [next(answers) if fit else None for fit in fits]

    def _fits(self, row: list[int], new_tokens: int) -> bool:
        """Tell if the context holds a prompt and the longest reply.

        A prompt closer to the end would shorten the other replies of its batch.
        """
        return self._context is None or len(row) + new_tokens <= self._context

    def _load(self) -> None:
        if self._backbone is not None:
            return
        if self._spec.template:
            named_template(self._spec.template)  # an unknown name fails before the load
        device = choose_device(self._device)
        if not self._ignore_memory:
            check_answers(self._spec, str(device), self._job.batch, self._job.max_new_tokens)
        native = self._native_dtype(device)
        model, self._tokenizer = load_pretrained(self._spec, native)
        self._template = resolve_template(self._tokenizer, self._spec)
        config = model.config.get_text_config()
        self._context: int | None = getattr(config, "max_position_embeddings", None)
        if self._context is not None and self._context <= self._job.max_new_tokens:
            raise UserError(
                f"--max-new-tokens must be below the {self._context} of the context of {self.name}"
            )
        self._ends = sorted(eos_ids(model, self._tokenizer) | self._template.stop_ids)
        if native is None:
            self._backbone = model.to(device).eval()
            return
        self._backbone = Backbone(model, own_attention=True)
        pack_native(self._backbone, None, "auto", "auto", LoadOptions(context=self._context))

    def _native_dtype(self, device: torch.device) -> torch.dtype | None:
        """Return the dtype in which the native step runs the model; None if torch's has to."""
        place = str(hub.backbone_of(self._spec))
        with loading_errors(place):
            config = load_config(Path(place)).get_text_config()
        dtype: Any = "float32" if config.dtype == torch.float32 else "auto"
        spec = replace(self._spec, backbone=place, quant="auto")
        choice = choose_step(spec, device, LoadOptions(dtype=dtype))
        return choice.dtype if choice.native else None

    def _generate(self, rows: list[list[int]], temperature: float, new_tokens: int) -> list[Answer]:
        if not rows:
            return []
        if isinstance(self._backbone, Backbone):
            found = continue_texts(self._backbone, rows, self._ends, new_tokens, temperature)
            return [self._read(ids) for ids in found]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        # The model's own distribution, without the changes of its generation config.
        sampling: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
        if temperature >= COLD:
            sampling |= {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        with torch.inference_mode():
            output = self._backbone.generate(
                input_ids=ids.to(self._backbone.device),
                attention_mask=mask.to(self._backbone.device),
                max_new_tokens=new_tokens,
                eos_token_id=self._ends or None,
                pad_token_id=0,
                **sampling,
            )
        return [self._read(row) for row in output[:, width:].tolist()]

    def _read(self, ids: list[int]) -> Answer:
        """The answer up to the first id that ends one. Without such an id it was cut."""
        stop = next((i for i, token in enumerate(ids) if token in self._ends), None)
        text = self._tokenizer.decode(ids[:stop], skip_special_tokens=True)
        return Answer(text, cut=stop is None)


def _user_turn(answer: Answer | None, mark: str) -> str | None:
    """Return what comes before the mark or the model's end; None without either, or for nothing."""
    if answer is None:
        return None
    text = answer.text
    whole = not answer.cut
    if mark and mark in text:
        text = text.partition(mark)[0]
        whole = True
    return (text.strip() or None) if whole else None
