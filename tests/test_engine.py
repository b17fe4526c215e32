"""The four modes: greedy is lossless, exact follows vanilla sampling, typical is seeded."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medusa_chat.config import Message, UserError
from medusa_chat.decoding import engine as engine_module
from medusa_chat.decoding.acceptance import make_rule
from medusa_chat.decoding.trees import pause
from medusa_chat.decoding.trees.accuracy import Accuracy
from medusa_chat.decoding.trees.bookkeeping import USUAL
from medusa_chat.decoding.trees.policy import Policy
from medusa_chat.decoding.trees.tree import Tree, chain, paper_trees
from medusa_chat.model.backbone import Backbone
from medusa_chat.sampling import Sampling
from tests.helpers.tiny import (
    NEW,
    PROMPT,
    OracleHeads,
    decode,
    ids_of,
    make_engine,
    prompt_ids,
    random_backbone,
    random_heads,
    random_model,
    random_tree,
    reply,
)

if TYPE_CHECKING:
    from medusa_chat.decoding.report import StepReport
    from medusa_chat.events import Step


def oracle(
    backbone: Backbone, text: list[int], ranks: Any = (0, 0, 1, -1), heads: int = 4, seed: int = 0
) -> OracleHeads:
    return OracleHeads(heads, backbone.vocabulary, text, ranks, seed)


# ---- greedy ----


@pytest.mark.parametrize("name", [*paper_trees(), "chain-1", "chain-4"])
@pytest.mark.parametrize("probing", [False, True])
def test_greedy_equals_vanilla_with_a_named_tree(
    backbone: Any, greedy_text: Any, name: Any, probing: Any
) -> None:
    for heads in (
        random_heads(backbone),
        oracle(backbone, greedy_text),
        oracle(backbone, greedy_text, (0, 2, 5, 9)),
    ):
        engine = make_engine(backbone, heads, name, probing=probing)
        assert PROMPT + reply(engine, PROMPT, max_new_tokens=NEW) == greedy_text


@given(
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 40),
    depth=st.integers(1, 5),
    width=st.integers(1, 8),
    ranks=st.lists(st.integers(-1, 7), min_size=1, max_size=4),
)
@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
def test_greedy_equals_vanilla_with_any_tree_and_heads(
    backbone: Any, greedy_text: Any, seed: Any, nodes: Any, depth: Any, width: Any, ranks: Any
) -> None:
    tree = random_tree(seed, nodes, depth, width)
    for heads in (
        random_heads(backbone, depth, seed=seed),
        oracle(backbone, greedy_text, ranks, depth, seed),
    ):
        engine = make_engine(backbone, heads, tree)
        assert PROMPT + reply(engine, PROMPT, max_new_tokens=NEW) == greedy_text


def test_deep_paths_are_really_accepted(backbone: Any, greedy_text: Any) -> None:
    """A perfect oracle fills every step; one with changing ranks uses many branches."""
    steps = decode(
        make_engine(backbone, oracle(backbone, greedy_text, (0,)), "chain-4"),
        PROMPT,
        max_new_tokens=NEW,
    )
    assert [len(step.tokens) for step in steps[:-1]] == [5] * (len(steps) - 1)
    assert [token.head for token in steps[0].tokens] == [0, 1, 2, 3, 4]
    engine = make_engine(backbone, oracle(backbone, greedy_text, (0, 1, 2, 3)), "mc_sim_7b_63")
    rows = set()
    for _ in engine.generate(PROMPT, Sampling(max_new_tokens=NEW)):
        shown = engine.candidates()
        assert shown is not None
        rows.add(shown.accepted)
    assert max(map(len, rows)) >= 4
    assert len(rows) >= 6
    assert any(row != tuple(range(len(row))) for row in rows)


def test_heads_that_repeat_the_lm_head_are_accepted_where_the_text_repeats() -> None:
    """Real heads accept guesses where the model loops: heads as they start out."""
    from medusa_chat.model.heads import MedusaHeads

    backbone = random_backbone(initializer_range=0.02, tie_word_embeddings=True)
    expected = reply(
        make_engine(backbone), PROMPT, mode="vanilla", temperature=0, max_new_tokens=NEW
    )
    steps = decode(
        make_engine(backbone, MedusaHeads(4, 1, 32), "chain-4"), PROMPT, max_new_tokens=NEW
    )
    assert ids_of(steps) == expected
    assert len(expected) / len(steps) > 3


@pytest.mark.parametrize("tied", [True, False])
def test_greedy_equals_vanilla_where_token_0_is_frequent(tied: Any) -> None:
    """The official code fails here: its padded paths read token 0."""
    model = random_model(seed=3, tie_word_embeddings=tied)
    plain = reply(
        make_engine(Backbone(model)), PROMPT, mode="vanilla", temperature=0, max_new_tokens=NEW
    )
    frequent = Counter(plain).most_common(1)[0][0]
    swap = list(range(64))
    swap[0], swap[frequent] = frequent, 0
    with torch.no_grad():
        for weight in {model.get_input_embeddings().weight, model.get_output_embeddings().weight}:
            weight.copy_(weight[swap].clone())
    backbone = Backbone(model)
    prompt = [swap[token] for token in PROMPT]
    expected = reply(
        make_engine(backbone), prompt, mode="vanilla", temperature=0, max_new_tokens=NEW
    )
    assert expected == [swap[token] for token in plain]
    assert expected.count(0) >= 4
    for seed, ranks in enumerate([(0,), (0, 1, -1), (-1,), (0, 3, 7)]):
        for tree in ("mc_sim_7b_63", "vicuna_13b_stage2", chain(4), random_tree(seed, 30, 4, 6)):
            for heads in (
                random_heads(backbone, seed=seed),
                oracle(backbone, prompt + expected, ranks, seed=seed),
            ):
                assert (
                    reply(make_engine(backbone, heads, tree), prompt, max_new_tokens=NEW)
                    == expected
                )


def test_temperature_0_is_greedy_in_every_mode(backbone: Any, greedy_text: Any) -> None:
    for mode in ("typical", "exact", "vanilla"):
        engine = make_engine(backbone, oracle(backbone, greedy_text), "mc_sim_7b_63")
        new = reply(engine, PROMPT, mode=mode, temperature=0, seed=5, max_new_tokens=NEW)
        assert PROMPT + new == greedy_text


# ---- exact ----

LAWS = [
    {"temperature": temperature, **truncation}
    for temperature in (0.3, 0.7, 1.0)
    for truncation in (
        {},
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"top_p": 0.8, "top_k": 12, "min_p": 0.02},
    )
]


@pytest.mark.parametrize("law", LAWS, ids=str)
def test_exact_gives_the_text_of_vanilla_sampling(backbone: Any, law: Any) -> None:
    for seed in range(2):
        expected = reply(
            make_engine(backbone),
            PROMPT,
            mode="vanilla",
            seed=seed,
            max_new_tokens=NEW,
            **law,
        )
        for heads, tree in (
            (random_heads(backbone, seed=seed), "mc_sim_7b_63"),
            (oracle(backbone, PROMPT + expected, seed=seed), random_tree(seed, 24, 4, 5)),
            (oracle(backbone, PROMPT + expected, (0,)), "chain-4"),
        ):
            engine = make_engine(backbone, heads, tree, probing=seed > 0)
            steps = decode(engine, PROMPT, mode="exact", seed=seed, max_new_tokens=NEW, **law)
            assert ids_of(steps) == expected
        assert max(step.accepted for step in steps) >= 3


def test_seeds_give_different_texts(backbone: Any, greedy_text: Any) -> None:
    for mode in ("exact", "typical"):
        engine = make_engine(backbone, oracle(backbone, greedy_text), "mc_sim_7b_63")
        settings = {"mode": mode, "temperature": 1.0, "max_new_tokens": NEW}
        replies = [tuple(reply(engine, PROMPT, seed=seed, **settings)) for seed in (1, 2, 3, 1)]
        assert (
            replies[0] == replies[3] or mode == "typical"
        )  # the oracle's guesses differ from run to run
        assert len(set(replies[:3])) == 3


def test_typical_with_the_same_seed_and_heads_gives_the_same_text(backbone: Any) -> None:
    engine = make_engine(backbone, random_heads(backbone), "mc_sim_7b_63")
    settings = {"mode": "typical", "temperature": 0.7, "seed": 9, "max_new_tokens": NEW}
    assert reply(engine, PROMPT, **settings) == reply(engine, PROMPT, **settings)


VOCABULARY, DRAWS = 8, 1200


@pytest.mark.parametrize(
    "law",
    [
        {"temperature": 1.0},
        {"temperature": 0.7, "top_p": 0.9},
        {"temperature": 1.5, "top_k": 4, "min_p": 0.05},
    ],
)
def test_sampled_pairs_follow_the_law_of_the_backbone(law: Any) -> None:
    """Two tokens jointly, over many seeds, against the law computed in float64."""
    model = random_model(vocabulary=VOCABULARY, seed=4, initializer_range=0.2)
    law_of_pairs = _law_of_pairs(model, prompt := prompt_ids(6, VOCABULARY), law)
    backbone = Backbone(model)
    engine = make_engine(
        backbone, random_heads(backbone, 2), Tree.of([[0], [1], [2], [0, 0], [0, 1], [1, 0]])
    )
    counts: Counter[tuple[int, int]] = Counter()
    deep = 0
    for seed in range(DRAWS):
        steps = decode(engine, prompt, mode="exact", seed=seed, max_new_tokens=2, **law)
        deep += steps[0].accepted > 0
        first, second = ids_of(steps)
        counts[first, second] += 1
    assert deep > DRAWS / 20  # the tree took part
    expected = {pair: DRAWS * p for pair, p in law_of_pairs.items() if p}
    assert not set(counts) - set(expected), "a token that the truncation forbids"
    _assert_fits(counts, expected)


def _law_of_pairs(
    model: Any, prompt: list[int], law: dict[str, Any]
) -> dict[tuple[int, int], float]:
    first = _law(model, prompt, law)
    return {
        (a, b): float(first[a] * p)
        for a in range(VOCABULARY)
        if first[a]
        for b, p in enumerate(_law(model, [*prompt, a], law))
    }


def _law(model: Any, text: list[int], law: dict[str, Any]) -> list[float]:
    """The next token's law: temperature, then top-k, top-p, min-p, each renormalized."""
    with torch.inference_mode():
        logits = model(torch.tensor([text])).logits[0, -1].double()
    p: list[float] = (logits / law["temperature"]).softmax(-1).tolist()
    order = sorted(range(VOCABULARY), key=lambda token: -p[token])
    if "top_k" in law:
        p = _renormalized(p, order[: law["top_k"]])
    if "top_p" in law:
        kept, mass = [], 0.0
        for token in order:
            if mass < law["top_p"]:
                kept.append(token)
            mass += p[token]
        p = _renormalized(p, kept)
    if "min_p" in law:
        p = _renormalized(p, [token for token in order if p[token] >= law["min_p"] * max(p)])
    return p


def _renormalized(p: list[float], kept: list[int]) -> list[float]:
    mass = sum(p[token] for token in kept)
    return [value / mass if token in kept else 0.0 for token, value in enumerate(p)]


def _assert_fits(counts: Counter[tuple[int, int]], expected: dict[tuple[int, int], float]) -> None:
    """Pearson's chi-square, rare cells pooled; below about the 99.9% quantile (Wilson-Hilferty)."""
    common = {pair for pair, mean in expected.items() if mean >= 5}
    cells = [(counts[pair], expected[pair]) for pair in common]
    rest = [pair for pair in expected if pair not in common]
    if rest:
        cells.append((sum(counts[pair] for pair in rest), sum(expected[pair] for pair in rest)))
    chi_square = sum((seen - mean) ** 2 / mean for seen, mean in cells)
    freedom = len(cells) - 1
    assert freedom > 5
    bound = freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert chi_square < bound


# ---- what the engine says and refuses ----


def test_a_prompt_that_cannot_be_answered_is_refused(backbone: Any) -> None:
    engine = make_engine(backbone, random_heads(backbone), context=20)
    with pytest.raises(UserError, match="empty"):
        engine.generate([], Sampling())
    with pytest.raises(UserError, match="20 tokens; the context of model holds 20"):
        engine.generate([1] * 20, Sampling())
    with pytest.raises(UserError, match="no Medusa heads"):
        make_engine(backbone).generate([1], Sampling(mode="typical"))
    with pytest.raises(UserError, match="context"):
        make_engine(backbone, context=513)


def test_messages_go_through_the_chat_template() -> None:
    backbone = random_backbone(vocabulary=260)
    engine = make_engine(backbone)
    asked: list[Message] = [{"role": "user", "content": "hé <|end|>"}]
    ids = engine.encode(asked)
    assert engine.tokenizer.decode(ids) == "<|user|>hé <|end|><|end|><|assistant|>"
    refusing = "{{ raise_exception('System role not supported') }}"
    from tests.helpers.tiny import tokenizer

    strict = make_engine(backbone, tokenizer=tokenizer(refusing))
    brief: list[Message] = [{"role": "system", "content": "be brief"}]
    with pytest.raises(UserError, match="System role not supported"):
        strict.generate(brief, Sampling())


def test_probes_are_vanilla_steps_among_the_tree_steps(backbone: Any, greedy_text: Any) -> None:
    engine = make_engine(backbone, random_heads(backbone), "chain-3", probing=True)
    steps = decode(engine, PROMPT, max_new_tokens=NEW)
    kinds = [step.kind for step in steps]
    probes = [index for index, kind in enumerate(kinds) if kind == "vanilla"]
    trees = [later - earlier - 1 for earlier, later in pairwise([-1, *probes])]
    gaps = pause.PROBE_GAPS
    assert trees == [gaps[min(probe, len(gaps) - 1)] for probe in range(len(probes))]
    assert len(probes) > 2
    assert all(
        (step.nodes, step.depth) == ((1, 0) if step.kind == "vanilla" else (4, 3)) for step in steps
    )
    assert PROMPT + ids_of(steps) == greedy_text


def test_probes_are_counted_over_replies(backbone: Any) -> None:
    engine = make_engine(backbone, random_heads(backbone), "chain-3", probing=True)
    first = decode(engine, PROMPT, max_new_tokens=3)
    second = decode(engine, PROMPT, max_new_tokens=3)
    kinds = [step.kind for step in first + second if step.nodes]
    assert kinds.index("vanilla") == pause.PROBE_GAPS[0]


def test_learning_counts_with_tree_steps_alone(
    backbone: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Vanilla decoding would not learn, so a probe must not look slower than its steps are."""
    clock = 0.0

    def now() -> float:
        nonlocal clock
        clock += 1e-6
        return clock

    monkeypatch.setattr(engine_module, "time", SimpleNamespace(perf_counter=now))
    learn = Policy.learn

    def slowly(policy: Policy, report: StepReport, step: Step) -> None:
        nonlocal clock
        learn(policy, report, step)
        clock += 1.0

    monkeypatch.setattr(Policy, "learn", slowly)
    engine = make_engine(backbone, random_heads(backbone), "chain-3", probing=True)
    steps = decode(engine, PROMPT, max_new_tokens=40)
    seconds = {
        kind: [round(step.seconds) for step in steps if step.kind == kind]
        for kind in ("vanilla", "tree")
    }
    assert set(seconds["vanilla"]) == {0}
    assert set(seconds["tree"]) == {1, 2}
    assert sum(seconds["tree"]) == round(clock) - (steps[-1].kind == "vanilla")
    bookkeeping = engine.trees.policy.bookkeeping
    assert bookkeeping.of("tree") > USUAL["tree"]
    assert bookkeeping.of("vanilla") < USUAL["vanilla"]


def test_a_new_reply_ends_the_one_before(backbone: Any, greedy_text: Any) -> None:
    engine = make_engine(backbone)
    older = engine.generate(PROMPT, Sampling(mode="vanilla", temperature=0, max_new_tokens=NEW))
    next(older)
    assert (
        PROMPT + reply(engine, PROMPT, mode="vanilla", temperature=0, max_new_tokens=NEW)
        == greedy_text
    )
    assert list(older) == []


def test_ids_outside_the_vocabulary_and_trees_without_heads_are_refused(backbone: Any) -> None:
    engine = make_engine(backbone)
    for ids in ([1, -1], [1, backbone.vocabulary]):
        with pytest.raises(UserError, match="not among"):
            engine.generate(ids, Sampling(mode="vanilla", temperature=0))
    with pytest.raises(UserError, match="no Medusa heads"):
        engine.trees.use("chain-2")


def test_candidates_show_the_last_tree_step(backbone: Any, greedy_text: Any) -> None:
    engine = make_engine(backbone, oracle(backbone, greedy_text, (0,)), Tree.of([[0], [1], [0, 0]]))
    assert engine.candidates() is None
    reply_steps = engine.generate(PROMPT, Sampling(max_new_tokens=NEW))
    step = next(reply_steps)
    shown = engine.candidates()
    assert shown is not None
    assert shown.paths == ((), (0,), (1,), (0, 0))
    assert shown.accepted == (0, 1, 3)
    assert [shown.texts[row] for row in shown.accepted] == [token.text for token in step.tokens]
    reply_steps.close()


def test_candidates_are_the_guesses_of_the_heads_on_the_last_kept_token(backbone: Any) -> None:
    """A wrong hidden state or layout would cost acceptance alone: greedy text would stay right."""
    heads, tree = random_heads(backbone), random_tree(4, 30, 4, 5, spine=4)
    runner = make_engine(backbone, heads, tree).runner
    rule = make_rule(Sampling())
    root, text = runner.prefill(PROMPT, rule), [*PROMPT]
    for _ in range(12):
        with torch.inference_mode():
            hidden = backbone.hidden_of_text(torch.tensor(text))[-1:]
            guesses = heads.logits(hidden, backbone.lm_head)[:, 0].topk(5).indices.tolist()
        report = runner.step(root, tree, rule)
        assert report.candidates == [
            root,
            *(guesses[len(path) - 1][path[-1]] for path in tree.paths[1:]),
        ]
        text += [report.candidates[row] for row in report.rows]
        root = report.next


def test_a_tree_is_pruned_to_the_heads_and_a_notice_says_so(backbone: Any) -> None:
    engine = make_engine(backbone, random_heads(backbone, 2), "mc_sim_7b_63")
    assert engine.trees.current.depth == 2
    assert len(engine.notices) == 1
    assert "it is 4 deep and 10 wide, model has 2 heads" in engine.notices[0]
    assert engine.trees.names()[:3] == ["auto", "chain-1", "chain-2"]
    engine.trees.use("chain-2")
    assert len(engine.notices) == 1
    assert engine.trees.describe() == "chain of 2: 3 nodes, depth 2"
    with pytest.raises(UserError, match="0 guesses"):
        engine.trees.use(Tree())
    with pytest.raises(UserError, match="256 guesses"):
        engine.trees.use(
            Tree.of([path for a in range(16) for path in ([a], *([a, b] for b in range(15)))])
        )
    assert engine.trees.describe() == "chain of 2: 3 nodes, depth 2"


def test_auto_tree_is_measured_and_says_what_it_forecasts(
    backbone: Any, greedy_text: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("medusa_chat.decoding.trees.costs.REPEATS", 1)
    accuracy = Accuracy(((0.6, 0.8), (0.4, 0.5), (0.3, 0.4)))
    engine = make_engine(backbone, random_heads(backbone, 3), "auto", accuracy=accuracy)
    assert engine.notices == []
    assert "expected" in engine.trees.describe()
    assert engine.tokens_in_context == 0
    assert PROMPT + reply(engine, PROMPT, max_new_tokens=NEW) == greedy_text
    unmeasured = make_engine(backbone, random_heads(backbone, 3), "auto")
    assert "calibrate" in unmeasured.notices[0]
    assert unmeasured.trees.current.depth <= 3


def test_an_engine_without_heads_has_no_tree(backbone: Any) -> None:
    engine = make_engine(backbone, None, "auto")
    assert (engine.heads, len(engine.trees.current)) == (0, 1)
    assert "no Medusa heads" in engine.trees.describe()
    assert engine.notices == []
