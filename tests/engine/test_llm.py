"""The offline face: shapes, streaming, options, errors, and what is left behind."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from engineroom import SamplingParams
from engineroom.engine.core.checks import AdmissionError
from engineroom.engine.core.parameter import ParameterError
from engineroom.engine.load.chat_template import TemplateError
from tests.engine import golden

pytestmark = pytest.mark.torch
PROMPT = list(b"Once upon a time")


@pytest.fixture(scope="module")
def llm(make_llm):
    return make_llm(max_num_seqs=8, max_waiting=16)


@pytest.fixture(autouse=True)
def nothing_left_behind(llm):
    """After every test: no request, no owned block, the books in order."""
    yield
    llm.engine.step()
    assert not llm.engine.has_work
    llm.engine.scheduler.check_integrity()
    stats = llm.engine.scheduler.stats()
    assert stats.owned_blocks == 0


def greedy(**changes):
    return SamplingParams(temperature=0, ignore_eos=True, **changes)


def test_text_ids_and_lists_of_either(llm):
    one = llm.generate("hello", greedy(max_tokens=5))
    same = llm.generate(list(b"hello"), greedy(max_tokens=5))
    many = llm.generate(["hello", list(b"hello")], [greedy(max_tokens=5), greedy(max_tokens=3)])
    assert len(one) == len(same) == 1 and len(many) == 2
    assert one[0].outputs[0].token_ids == same[0].outputs[0].token_ids
    assert many[1].outputs[0].token_ids == one[0].outputs[0].token_ids[:3]
    assert one[0].outputs[0].finish_reason == "length"
    assert one[0].usage.prompt_tokens == 5 and one[0].usage.completion_tokens == 5
    assert one[0].prompt == "hello" and same[0].prompt is None


def test_more_prompts_than_the_queue_holds(llm):
    outputs = llm.generate([[i % 200] for i in range(60)], greedy(max_tokens=2))
    assert [o.prompt_token_ids for o in outputs] == [(i % 200,) for i in range(60)]


def test_stream_deltas_are_the_whole_text(llm):
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=60, ignore_eos=True)
    whole = llm.generate([PROMPT], params)[0].outputs[0].text
    pieces = [out.deltas[0] for out in llm.stream(PROMPT, params)]
    assert "".join(pieces) == whole
    assert len(pieces) > 10


def test_leaving_a_stream_aborts_it(llm):
    stream = llm.stream(PROMPT, greedy(max_tokens=400))
    next(stream)
    stream.close()


def test_two_streams_in_turn_lose_nothing(llm):
    params = [greedy(max_tokens=12), greedy(max_tokens=9, stop=["zzz"])]
    alone = [llm.generate([PROMPT], p)[0].outputs[0].text for p in params]
    streams = [llm.stream(PROMPT, p) for p in params]
    texts = ["", ""]
    live = {0, 1}
    while live:
        for i in sorted(live):
            out = next(streams[i], None)
            if out is None:
                live.discard(i)
            else:
                texts[i] += out.deltas[0]
    assert texts == alone


def test_chat_goes_through_the_template(llm):
    out = llm.chat([{"role": "user", "content": "hi"}], greedy(max_tokens=3))[0]
    assert out.prompt_token_ids == (golden.USER, *b"hi", golden.ASSISTANT)
    with pytest.raises(TemplateError, match="role"):
        llm.chat([{"content": "hi"}], greedy())


def test_n_samples_differ_and_best_of_keeps_the_likely(llm):
    params = SamplingParams(n=3, seed=4, max_tokens=8, temperature=1.5, logprobs=0)
    out = llm.generate([PROMPT], params)[0]
    assert [s.index for s in out.outputs] == [0, 1, 2]
    assert len({s.token_ids for s in out.outputs}) == 3
    best = llm.generate([PROMPT], params.replace(n=1, best_of=3, ignore_eos=True))[0].outputs[0]
    every = llm.generate([PROMPT], params.replace(ignore_eos=True))[0].outputs
    mean = {s.token_ids: s.cumulative_logprob / len(s.token_ids) for s in every}
    assert best.token_ids == max(mean, key=mean.get)


def test_seed_is_returned_and_replays(llm):
    params = SamplingParams(max_tokens=12, temperature=1.2)
    first = llm.generate([PROMPT], params)[0].outputs[0]
    again = llm.generate([PROMPT], params.replace(seed=first.seed))[0].outputs[0]
    other = llm.generate([PROMPT], params.replace(seed=first.seed ^ 1))[0].outputs[0]
    assert again.token_ids == first.token_ids != other.token_ids


def test_stop_strings_and_ids(llm):
    text = llm.generate([PROMPT], greedy(max_tokens=40))[0].outputs[0].text
    stop = text[6:9]
    cut = llm.generate([PROMPT], greedy(max_tokens=40, stop=[stop]))[0].outputs[0]
    assert cut.text == text[: text.index(stop)]
    assert (cut.finish_reason, cut.stop_reason) == ("stop", stop)
    kept = llm.generate(
        [PROMPT], greedy(max_tokens=40, stop=[stop], include_stop_str_in_output=True)
    )[0].outputs[0]
    assert kept.text == cut.text + stop
    ids = llm.generate([PROMPT], greedy(max_tokens=40))[0].outputs[0].token_ids
    by_id = llm.generate([PROMPT], greedy(max_tokens=40, stop_token_ids=[ids[5]]))[0].outputs[0]
    assert by_id.stop_reason == ids[5] and by_id.token_ids == ids[: ids.index(ids[5]) + 1]


def test_allowed_banned_and_biased_tokens(llm):
    allowed = list(b"abc")
    out = llm.generate([PROMPT], SamplingParams(max_tokens=20, seed=1, allowed_token_ids=allowed))
    assert set(out[0].outputs[0].token_ids) <= set(allowed)
    forced = llm.generate([PROMPT], greedy(max_tokens=4, logit_bias={65: 100.0}))[0].outputs[0]
    assert forced.text == "AAAA"
    free = llm.generate([PROMPT], greedy(max_tokens=8))[0].outputs[0]
    word = free.text[:1]
    banned = llm.generate([PROMPT], greedy(max_tokens=8, bad_words=[word]))[0].outputs[0]
    assert not banned.text.startswith(word)
    unrepeated = llm.generate([PROMPT], greedy(max_tokens=60, no_repeat_ngram_size=2))[0]
    ids = [*unrepeated.prompt_token_ids, *unrepeated.outputs[0].token_ids]
    pairs = list(itertools.pairwise(ids))[len(PROMPT) :]
    assert len(set(pairs)) == len(pairs)


def test_everything_banned_is_an_error_of_that_request_alone(llm):
    bad = greedy(max_tokens=4, allowed_token_ids=[65], logit_bias={65: -100.0}, bad_words=["A"])
    out = llm.generate([PROMPT, PROMPT], [bad, greedy(max_tokens=4)])
    assert out[0].outputs[0].finish_reason == "error" and out[0].outputs[0].error
    assert out[1].outputs[0].finish_reason == "length"


def test_echo_and_max_tokens_zero(llm):
    out = llm.generate(["hello"], greedy(max_tokens=0, echo=True, prompt_logprobs=1))[0]
    assert out.outputs[0].text == "hello" and out.outputs[0].token_ids == ()
    assert out.outputs[0].finish_reason == "length"
    assert len(out.prompt_logprobs) == 5 and out.prompt_logprobs[0] is None


def test_logprobs_are_the_float64_forward_pass(llm):
    expected = golden.forward(PROMPT)
    expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    out = llm.generate([PROMPT], greedy(max_tokens=1, prompt_logprobs=2, logprobs=2))[0]
    for position, entry in enumerate(out.prompt_logprobs[1:]):
        token = PROMPT[position + 1]
        assert entry[token].logprob == pytest.approx(expected[position, token], abs=1e-4)
        assert entry[token].rank == 1 + (expected[position] > expected[position, token]).sum()
        assert len(entry) in (2, 3)
    top = out.outputs[0].logprobs[0]
    assert max(e.logprob for e in top.values()) == pytest.approx(expected[-1].max(), abs=1e-4)


def test_score_and_its_full_vocabulary_stream(llm):
    prompt = PROMPT * 10
    expected = golden.forward(prompt)
    expected -= np.log(np.exp(expected).sum(axis=1, keepdims=True))
    score = llm.score([prompt])[0]
    own = expected[np.arange(len(prompt) - 1), prompt[1:]]
    np.testing.assert_allclose(score.logprobs, own, atol=1e-4)
    rows = {}
    for position, chunk in llm.score_stream(prompt):
        assert len(chunk) <= 65
        for j, row in enumerate(chunk):
            assert position + j not in rows
            rows[position + j] = row
    assert sorted(rows) == list(range(1, len(prompt) + 1))
    np.testing.assert_allclose([rows[i] for i in sorted(rows)], expected, atol=1e-4)


def test_a_logits_processor_steers_its_own_request(llm):
    def only_b(tokens, logits):
        logits[:] = -np.inf
        logits[66] = 0.0
        return logits

    def broken(tokens, logits):
        raise RuntimeError("my own bug")

    outs = llm.generate(
        [PROMPT] * 3,
        [
            greedy(max_tokens=3, logits_processor=only_b),
            greedy(max_tokens=3),
            greedy(max_tokens=3, logits_processor=broken),
        ],
    )
    assert outs[0].outputs[0].text == "BBB"
    assert (
        outs[1].outputs[0].token_ids
        == llm.generate([PROMPT], greedy(max_tokens=3))[0].outputs[0].token_ids
    )
    assert outs[2].outputs[0].finish_reason == "error" and "my own bug" in outs[2].outputs[0].error


def test_refusals_name_the_numbers_and_leave_nothing(llm):
    with pytest.raises(AdmissionError, match="512"):
        llm.generate([[1] * 600], greedy(max_tokens=1))
    with pytest.raises(AdmissionError, match="260|259"):
        llm.generate([[1], [5000]], greedy(max_tokens=1))
    with pytest.raises(AdmissionError):
        llm.generate([[]], greedy(max_tokens=1))
    with pytest.raises(ParameterError, match="259"):
        llm.generate([[1]], greedy(stop_token_ids=[260]))
    with pytest.raises(ValueError, match="2 SamplingParams for 1"):
        llm.generate([[1]], [greedy(), greedy()])


@pytest.mark.parametrize("prompts", [None, 5, b"abc", {"prompt": "a"}, [None], ["a", 5], [b"a"]])
def test_what_is_no_prompt_is_named(llm, prompts):
    with pytest.raises(ParameterError, match="a prompt is text or a list of token ids, not"):
        llm.generate(prompts, greedy(max_tokens=1))


@pytest.mark.parametrize("messages", [None, 5, "hi", {"role": "user"}, [5], [None], [{}], []])
def test_what_is_no_conversation_is_named(llm, messages):
    with pytest.raises(TemplateError, match="messages"):
        llm.chat(messages, greedy(max_tokens=1))


@pytest.mark.parametrize("prompt", [None, 5, {"role": "user"}, b"a"])
def test_what_cannot_be_streamed_is_named(llm, prompt):
    with pytest.raises(ParameterError, match="a prompt is text or a list of token ids, not"):
        next(llm.stream(prompt))


def test_a_closed_engine_says_so(make_llm):
    llm = make_llm()
    llm.close()
    llm.close()
    with pytest.raises(RuntimeError, match="was closed; make a new one"):
        llm.generate("a")


@pytest.mark.parametrize("params", [5, {"top_p": 1}, [None], "greedy"])
def test_what_is_no_params_is_named(llm, params):
    with pytest.raises(ValueError, match="SamplingParams"):
        llm.generate("a", params)


def test_arrays_of_token_ids_are_prompts(llm):
    lists = llm.generate([PROMPT, PROMPT[:3]], greedy(max_tokens=2))
    arrays = llm.generate([np.array(PROMPT), np.array(PROMPT[:3])], greedy(max_tokens=2))
    single = llm.generate(np.array(PROMPT), greedy(max_tokens=2))
    tokens = [out.outputs[0].token_ids for out in lists]
    assert [out.outputs[0].token_ids for out in arrays] == tokens
    assert [out.outputs[0].token_ids for out in single] == tokens[:1]


def test_echo_of_a_truncated_prompt_is_what_was_kept(llm):
    params = greedy(max_tokens=1, echo=True, truncate_prompt_tokens=4)
    assert llm.generate("Once upon a time", params)[0].outputs[0].text.startswith("time")


def test_truncate_prompt_tokens_keeps_the_last(llm):
    out = llm.generate([PROMPT], greedy(max_tokens=1, truncate_prompt_tokens=4))[0]
    assert out.prompt_token_ids == tuple(PROMPT[-4:])


def test_unknown_options_name_the_nearest(golden_model):
    from engineroom import LLM

    with pytest.raises(ValueError, match="did you mean 'max_num_seqs'"):
        LLM(str(golden_model), max_num_seq=3)


def test_the_timeline_adds_up(llm):
    timings = llm.generate([PROMPT], greedy(max_tokens=6))[0].timings
    parts = timings.queued_s + timings.prefill_s + timings.decode_s
    assert parts == pytest.approx(timings.total_s, abs=1e-6)
    assert 0 < timings.time_to_first_token_s <= timings.total_s


@pytest.mark.parametrize("part", ["_executable", "_sampler"])
def test_a_failing_step_ends_its_requests_and_the_engine_goes_on(part, llm, monkeypatch):
    failing = getattr(llm.engine._runner, part)
    real = failing.run
    calls = iter([True])

    def once(*inputs):
        if next(calls, False):
            raise MemoryError("injected")
        return real(*inputs)

    monkeypatch.setattr(failing, "run", once)
    out = llm.generate([PROMPT], greedy(max_tokens=2))[0].outputs[0]
    assert out.finish_reason == "error" and "injected" in out.error
    assert llm.generate([PROMPT], greedy(max_tokens=2))[0].outputs[0].finish_reason == "length"


def test_special_tokens_that_are_kept_show_in_the_text(llm):
    ids = [golden.USER, golden.ASSISTANT]
    params = {"allowed_token_ids": ids, "max_tokens": 6, "seed": 1, "temperature": 5.0}
    ask = lambda **more: llm.generate("a", SamplingParams(**params, **more))[0].outputs[0]  # noqa: E731
    output = ask()
    assert output.text == "" and set(output.token_ids) == set(ids)
    kept = ask(keep_special_tokens=("<|user|>", "<|no such|>", "ab"))
    assert kept.token_ids == output.token_ids
    assert kept.text == "<|user|>" * output.token_ids.count(golden.USER)
